"""K and V of every cross-attention layer, with LoRA, from the text in one launch."""

from lit_kernels.text_kv.function import text_key_values

__all__ = ["text_key_values"]
