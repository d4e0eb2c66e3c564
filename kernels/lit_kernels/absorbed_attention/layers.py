"""A text of a UNet whose weights stand still: its K and V, and the layers that are absorbed into them.

A text is worth absorbing when it comes a second time. Each layer decides then, where its number of image tokens is
known, whether that pays (`costs.worthwhile`) and whether the GPU's table says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.absorbed_attention.costs import worthwhile
from lit_kernels.absorbed_attention.function import MAX_KEYS, NAME, Absorbed, absorb, absorbed_attention, key_of
from lit_kernels.slices import Projection, projection_of


@dataclass(eq=False)
class KeptText:
    """A text, and what was made of it."""

    text_BSD: Tensor
    """Held, so that its memory becomes no other's."""
    strength: float
    """Of all adapters in K and V; those of other layers have it themselves."""
    key_values: Mapping[str, tuple[Tensor, Tensor]]
    """K and V `[B, S, C]` by layer name."""
    passes: int
    """How many passes are expected to see this text."""
    backend: backends.Backend | None
    """Of `absorbed_attention`; None absorbs nothing."""
    seen: int = 0
    """How many passes have."""
    _layers: dict[str, Absorbed | None] = field(default_factory=dict, init=False)
    _prompts: int = field(default=0, init=False)

    def is_of(self, text: Tensor, strength: float) -> bool:
        """Whether this is the same tensor, or another view of its very memory, and as strong."""
        mine = self.text_BSD
        if strength != self.strength or text is mine:
            return strength == self.strength
        here, there = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (text, mine))
        return text.data_ptr() != 0 and here == there

    def attend(self, name: str, attn: Any, x_BTC: Tensor) -> Tensor | None:
        """What the layer gives for x, with its output projection; None where it is left as it is."""
        if self.backend is None or self.seen < 2 or name not in self.key_values:
            return None
        if name not in self._layers:
            self._layers[name] = self._absorb(name, attn, x_BTC)
        absorbed = self._layers[name]
        if absorbed is None or absorbed.keys_PNSC.dtype != x_BTC.dtype:
            return None
        return absorbed_attention(x_BTC, absorbed, self.backend)

    def _absorb(self, name: str, attn: Any, x: Tensor) -> Absorbed | None:
        key, value = self.key_values[name]
        query, out = projection_of(attn.to_q), projection_of(attn.to_out[0])
        drops = attn.to_out[1].training and attn.to_out[1].p > 0
        if drops or attn.norm_q is not None or attn.norm_k is not None or key.dtype != x.dtype:
            return None
        if isinstance(query, str) or isinstance(out, str) or query.bias is not None:
            return None
        (samples, tokens, width), keys, prompts = x.shape, key.shape[1], self._number_of_prompts()
        rows = samples // prompts * tokens
        if width != key.shape[2] or not worthwhile(width, rows, keys, attn.heads, prompts, self.passes):
            return None
        half = x.dtype in (torch.float16, torch.bfloat16)
        unsupported = f"{keys} keys are more than {MAX_KEYS}" if keys > MAX_KEYS else ""
        unsupported = unsupported or ("" if half else f"torch multiplies {x.dtype} as fast")
        case = key_of(x.dtype, prompts, rows, attn.heads, keys, width)
        if self.backend == "auto" and backends.choose(NAME, "auto", x.device, unsupported, case) != "triton":
            return None
        each = len(key) // prompts
        return absorb(key[::each], value[::each], _merged(query), _merged(out), attn.heads, out.bias)

    def _number_of_prompts(self) -> int:
        """P, if the first B/P rows are one text, the next B/P another, and so on. Waits for the GPU, once."""
        if not self._prompts:
            samples = len(self.text_BSD)
            shared = (p for p in range(1, samples) if not samples % p and _come_in_groups(self.text_BSD, p))
            self._prompts = next(shared, samples)
        return self._prompts


def _come_in_groups(text_BSD: Tensor, prompts: int) -> bool:
    groups = text_BSD.unflatten(0, (prompts, -1))
    return torch.equal(groups, groups[:, :1].expand_as(groups))


def _merged(projection: Projection) -> Tensor:
    """W + s B A, in fp32 at least where there are factors."""
    if projection.down is None or projection.up is None:
        return projection.weight
    dtype = torch.promote_types(projection.weight.dtype, torch.float32)
    down, up = projection.down.to(dtype), projection.up.to(dtype)
    return torch.addmm(projection.weight.to(dtype), up, down, alpha=projection.scale)
