"""Cross-attention layers for passes without gradients, their projections absorbed into the text."""

from lit_kernels.absorbed_attention.costs import worthwhile
from lit_kernels.absorbed_attention.function import Absorbed, absorb, absorbed_attention

__all__ = ["Absorbed", "absorb", "absorbed_attention", "worthwhile"]
