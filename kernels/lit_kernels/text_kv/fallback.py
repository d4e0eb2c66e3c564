"""The same in plain torch: slices of one width in a row are computed together, 3 launches in place of 5 a slice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lit_kernels.packing import packed


def text_key_values(
    text_BSD: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor] = (),
    ups: Sequence[Tensor] = (),
    scales: Tensor | None = None,
    detach_first_token: bool = False,
) -> list[Tensor]:
    """As `reference.text_key_values`."""
    batch, tokens, depth = text_BSD.shape
    text = text_BSD.reshape(batch * tokens, depth)
    if detach_first_token:
        first = torch.zeros(tokens, 1, dtype=torch.bool, device=text.device)
        first[0] = True
    found: list[Tensor] = [text] * len(weights)
    for width, run in groupby(range(len(weights)), key=lambda g: len(weights[g])):
        members = list(run)
        base = packed([weights[g] for g in members]).to(text.dtype)
        y = (text @ base.T).view(len(text), len(members), width).transpose(0, 1)
        if downs and scales is not None:
            rank = len(downs[0])
            down = packed([downs[g] for g in members]).to(text.dtype)
            up = packed([ups[g] for g in members]).to(text.dtype).view(len(members), width, rank)
            scale = scales if len(members) == len(scales) else scales[members]
            s = (text @ down.T).view(len(text), len(members), rank) * scale.to(text.dtype)[:, None]
            y = torch.baddbmm(y, s.transpose(0, 1), up.transpose(1, 2))
        y = y.reshape(len(members), batch, tokens, width)
        if detach_first_token:
            y = torch.where(first, y.detach(), y)
        for g, part in zip(members, y.unbind(), strict=True):
            found[g] = part
    return found
