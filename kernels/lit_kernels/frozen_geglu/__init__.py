"""The gate of a transformer's feed-forward block, keeping nothing for its gradient but its input."""

from lit_kernels.frozen_geglu.function import frozen_geglu

__all__ = ["frozen_geglu"]
