"""Attention of diffusers UNets: the reference formula and the one processor that all code shares."""

from lit_kernels.attention.processor import AttentionProcessor, install

__all__ = ["AttentionProcessor", "install"]
