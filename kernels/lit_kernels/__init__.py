"""Fused operators for adapters and cross-attention, each beside its readable torch reference."""

from lit_kernels.backend import Backend
from lit_kernels.patching import Patch, patch, unpatch

__all__ = ["Backend", "Patch", "patch", "unpatch"]
