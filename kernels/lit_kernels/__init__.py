"""Fused operators for adapters and cross-attention, each beside its readable torch reference."""

from lit_kernels.backend import Backend
from lit_kernels.patching import Patch, frozen, patch, unpatch

__all__ = ["Backend", "Patch", "frozen", "patch", "unpatch"]
