"""How long layers of a UNet take, forward and backward, by stamps at their borders.

A layer's backward pass begins when the gradient of its output arrives and ends when that of its input is there. Stamps
are CUDA events on a GPU, whose kernels run behind the Python code, and the clock on a CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

KINDS = {
    "ResnetBlock2D": "resnets",
    "FeedForward": "feed-forward",
    "Downsample2D": "resampling",
    "Upsample2D": "resampling",
}


class Clock:
    """Stamps on a device, and the milliseconds between two of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds; waits for the GPU."""
        if not self.cuda:
            return float(1000 * (end - begin))
        end.synchronize()
        return float(begin.elapsed_time(end))


class LayerTimes:
    """Watch layers; nothing is noted while `active` is false.

    Args:
        groups: Layers by what they are reported as.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Module]], clock: Clock):
        self.clock = clock
        self.active = False
        self.in_backward = False
        self.forward: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.backward: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._begun: list[Any] = []
        self._waiting: dict[int, tuple[str, Any]] = {}
        self._passes = 0
        self._hooks: list[Any] = []
        for name, modules in groups.items():
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(self._begin))
                self._hooks.append(module.register_forward_hook(self._end(name), with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.active and not self.in_backward:
            self._begun.append(self.clock.stamp())

    def _end(self, name: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.active or self.in_backward:
                return
            self.forward[name].append((self._begun.pop(), self.clock.stamp()))
            out, given = _first(output), _first((*args, *kwargs.values()))
            if out is None or not out.requires_grad:
                return
            self._passes += 1
            number = self._passes
            out.register_hook(lambda _: self._waiting.__setitem__(number, (name, self.clock.stamp())))
            if given is not None and given.requires_grad:
                given.register_hook(lambda _: self._close(number))

        return end

    def _close(self, number: int) -> None:
        if number in self._waiting:
            name, begun = self._waiting.pop(number)
            self.backward[name].append((begun, self.clock.stamp()))

    def finish_backward(self) -> None:
        """Close the layers whose input learns nothing."""
        for number in list(self._waiting):
            self._close(number)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def totals(self, steps: int) -> list[dict[str, Any]]:
        """Name, forward and backward milliseconds a step, in the order of the forward pass."""
        return [
            {
                "name": name,
                "forward_ms": sum(self.clock.between(*pair) for pair in self.forward[name]) / steps,
                "backward_ms": sum(self.clock.between(*pair) for pair in self.backward[name]) / steps,
            }
            for name in self.forward
        ]


def blocks_of(unet: nn.Module) -> dict[str, list[nn.Module]]:
    """The UNet's parts in the order of its definition: `conv_in`, `down_blocks.0`, ..., `mid_block`, ..."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in unet.named_children():
        parts = module.named_children() if isinstance(module, nn.ModuleList) else [("", module)]
        found |= {f"{name}.{number}".rstrip("."): [part] for number, part in parts}
    return found


def kinds_of(unet: nn.Module) -> dict[str, list[nn.Module]]:
    """Its layers by kind: self-attention, cross-attention, feed-forward, resnets, resampling."""
    found: dict[str, list[nn.Module]] = {}
    for module in unet.modules():
        kind = KINDS.get(type(module).__name__)
        if hasattr(module, "is_cross_attention"):
            kind = "cross-attention" if module.is_cross_attention else "self-attention"
        if kind:
            found.setdefault(kind, []).append(module)
    return found


def _first(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    return next((value for value in values if isinstance(value, Tensor)), None) if isinstance(values, tuple) else None
