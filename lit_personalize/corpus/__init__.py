"""A corpus: trained adapters as rows of numbers that one can compute with."""
