"""Where a picture reads each word: cross-attention maps averaged over heads, layers and steps.

After DAAM (Tang et al., 2022, arXiv 2210.04885, eqs. 6-8), with three differences: maps are averages and not sums, so
that they stay probabilities; they are enlarged linearly and not bicubically, for the same reason; and the map of a
word is the sum of its tokens'. The maps of all tokens, start, end and padding among them, sum to 1 in every cell.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kernels.attention import AttentionProcessor
from lit_personalize.errors import UsageError
from lit_personalize.sampling.words import Words


class HeatMaps:
    """A tap that records the cross-attention of the last `rows` of the batch: those that are told a prompt."""

    def __init__(self, rows: int):
        self.rows = rows
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = defaultdict(int)

    def __call__(self, processor: AttentionProcessor, probabilities: Tensor) -> None:
        if not processor.is_cross:
            return
        mean = probabilities[-self.rows :].detach().float().mean(1)  # over heads: [rows, cells, S]
        side = math.isqrt(mean.shape[1])
        self.sums[side] = self.sums[side] + mean if side in self.sums else mean
        self.counts[side] += 1

    def average(self, side: int | None = None) -> Tensor:
        """Maps `[rows, S, side, side]` of the layers of one resolution; None takes all, enlarged to the largest.

        Raises:
            UsageError: No layer has this resolution.
        """
        if side is not None and side not in self.sums:
            raise UsageError(f"no cross-attention of {side} x {side} cells; there are {sorted(self.sums)}")
        largest = side or max(self.sums)
        total = sum(
            F.interpolate(_as_maps(self.sums[s], s), (largest, largest), mode="bilinear", align_corners=False)
            for s in self.sums
            if side in (None, s)
        )
        count = sum(self.counts[s] for s in self.sums if side in (None, s))
        return torch.as_tensor(total) / count

    def of_words(self, row: int, words: Words, side: int | None = None) -> Tensor:
        """Maps `[words, side, side]` of one row, each the sum over the word's tokens."""
        maps = self.average(side)[row]
        return torch.stack([maps[first:last].sum(0) for first, last in words.spans])


def _as_maps(sums: Tensor, side: int) -> Tensor:
    return sums.transpose(1, 2).unflatten(-1, (side, side))


def save_overlays(path: Path, picture: np.ndarray, words: Sequence[str], maps: Tensor, title: str = "") -> None:
    """Write a PNG: the picture, and for every word the picture darkened and tinted by its map, with a colour bar.

    Colours run from a word's own least to its largest share, which the bar says: maps of two words are compared by
    their places and numbers, not by their colours.

    Args:
        picture: uint8 `[H, W, 3]`.
        maps: `[words, side, side]`.
    """
    from matplotlib.figure import Figure

    columns = min(5, 1 + len(words))
    lines = -(-(1 + len(words)) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * lines + 0.4), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(lines, columns)).flat)
    figure.suptitle(title, fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    height, width = picture.shape[:2]
    box = (0, width, height, 0)
    axes[0].imshow(picture, extent=box)
    axes[0].set_title("picture", fontsize=9)
    grey = picture.mean(-1) / 255
    for axis, word, found in zip(axes[1:], words, maps, strict=False):
        values = found.cpu().numpy()
        axis.imshow(grey, extent=box, cmap="gray", vmin=0, vmax=1)
        shown = axis.imshow(values, extent=box, cmap="inferno", alpha=0.7, interpolation="bilinear")
        axis.set_title(word, fontsize=9)
        bar = figure.colorbar(shown, ax=axis, fraction=0.046, format="%.2g")
        bar.ax.tick_params(labelsize=6)
    figure.supxlabel("colour: share of the attention of a cell that the word gets", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
