"""Diffusers' residual blocks without their division by 1: two launches and four passes over memory a block and step.

Only blocks as SD1, SD2 and SDXL have them: of one size in and out, the time added, an `output_scale_factor` of 1.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn


def plain_blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Its `ResnetBlock2D` modules by name, where only the division by 1 is to be left out."""
    found = {}
    for name, block in unet.named_modules():
        if type(block).__name__ != "ResnetBlock2D":
            continue
        read: Any = block
        same_size = read.upsample is None and read.downsample is None
        if same_size and read.time_embedding_norm == "default" and read.output_scale_factor == 1:
            found[name] = block
    return found


def shorten(block: nn.Module) -> None:
    """Leave the division out; `restore` brings it back."""
    block.__dict__["forward"] = types.MethodType(_forward, block)  # a copy of the block binds it anew


def restore(block: nn.Module) -> None:
    """Undo `shorten`."""
    block.__dict__.pop("forward", None)


def _forward(block: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    hidden = block.conv1(block.nonlinearity(block.norm1(input_tensor)))
    if temb is not None and block.time_emb_proj is not None:
        time = temb if block.skip_time_act else block.nonlinearity(temb)
        hidden = hidden + block.time_emb_proj(time)[:, :, None, None]
    hidden = block.conv2(block.dropout(block.nonlinearity(block.norm2(hidden))))
    if block.conv_shortcut is None:
        return input_tensor + hidden
    # In training diffusers' own makes it contiguous too: DDP compares the strides of gradients.
    return block.conv_shortcut(input_tensor.contiguous() if block.training else input_tensor) + hidden  # type: ignore[no-any-return]
