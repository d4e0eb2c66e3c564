"""Weight-decomposed low-rank adaptation (DoRA, Liu et al., 2024, arXiv 2402.09353, eq. 5).

W = m · (W0 + s·B·A) / ‖W0 + s·B·A‖, norms over the inputs of every output; m is trained, and the norm is a constant to
the gradient (sec. 4.3). With g = m / ‖W0 + s·B·A‖ a layer gives g·(W0·x + s·B·A·x), so the merged weight never exists.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class DoraScale(nn.Module):
    """Stands where PEFT keeps a layer's magnitude, with PEFT's signature.

    PEFT forms norm and quotient in the base's dtype: in bf16 g moves in steps of 1/256. Here both are fp32, and
    g - 1 is rounded, not g.
    """

    magnitude: nn.Parameter
    norm: Tensor

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Neither a module nor a parameter of this one: the base owns its layers, the adapter its factors.
        self.__dict__["layer"] = layer
        self._shape = (-1, *[1] * (cast(Tensor, layer._parameters["weight"]).ndim - 2))
        """Of one value per output, beside activations."""

    def own(self, magnitude: nn.Parameter) -> None:
        """Read m `[out]` from an adapter's factor."""
        self.__dict__["magnitude"] = magnitude

    def frozen(self) -> Tensor:
        """W0 as a matrix `[out, in]` in fp32."""
        return cast(Tensor, self.__dict__["layer"]._parameters["weight"]).detach().flatten(1).float()

    @torch.no_grad()
    def refresh(self, down: Tensor, up: Tensor, scale: float) -> None:
        """Take the norms `[out]` of W0 + s·B·A for the coming step."""
        self.norm = torch.addmm(self.frozen(), up.flatten(1), down.flatten(1), alpha=scale).norm(dim=1)

    def forward(
        self, x: Tensor, *, lora_A: nn.Module, lora_B: nn.Module, scaling: float, base_layer: Any,
        base_result: Tensor, adapter_name: str = "",
    ) -> Tensor:  # fmt: skip
        """What comes on top of the base's output: (g - 1)·W0·x + g·s·B·A·x."""
        surplus = ((self.magnitude - self.norm) / self.norm).reshape(self._shape)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias.reshape(self._shape)
        low_rank = scaling * lora_B(lora_A(x))
        return surplus.to(x.dtype) * base_result + (1 + surplus).to(x.dtype) * low_rank
