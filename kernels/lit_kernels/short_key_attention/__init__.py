"""Cross-attention to a short text: exact softmax over up to 128 keys, forward and backward, with an optional map."""

from lit_kernels.short_key_attention.function import short_key_attention

__all__ = ["short_key_attention"]
