"""Fused operators for adapters and cross-attention, each beside its readable torch reference."""
