"""Weights2Weights: the space that a corpus of adapters spans (Dravid et al., 2024, arXiv 2406.09413)."""
