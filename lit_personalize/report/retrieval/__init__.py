"""How good retrieval is on the embedded world, and what its sets do to a training."""
