"""What a layer takes of the host, forward and backward: at batch 1 a GPU waits for it.

    python kernels/benchmarks/host.py [--out kernels/benchmarks/results]

Layers of 4 rows and 16 columns, 20 in a chain. Ours allocate what they return and launch nothing: a launch takes the
host some microseconds more, one forward and up to five backward. PEFT's operators do run, on next to nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lit_kernels import backend
from lit_kernels.bank_lora import backward, forward, layers

CHAIN, WIDTH, ROWS, RANK = 20, 16, 4, 4


def peft_layers(count: int) -> list[Any]:
    """Linear layers in bf16 with LoRA in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    made = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))).to(torch.bfloat16)
    config = LoraConfig(r=RANK, target_modules=[str(i) for i in range(count)])
    inject_adapter_in_model(config, made.requires_grad_(False))
    for parameter in made.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return list(made)


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """The kernels' results, but with nothing in them."""

    def allocate(x: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor], *rest: Any) -> Any:
        return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights], x.new_empty((len(weights), ROWS, RANK))

    def allocate_gradients(grads: Any, x: Tensor, s: Any, weights: Any, downs: Any, ups: Any, *rest: Any) -> Any:
        factors = (f.new_empty((len(weights), 1, *f.shape)) for f in (downs[0], ups[0]))
        return torch.empty_like(x), *factors

    with mock.patch.object(forward, "launch", allocate), mock.patch.object(backward, "launch", allocate_gradients):
        yield


def measure(repeats: int = 15) -> dict[str, dict[str, float]]:
    """Microseconds of a layer, and of q, k and v together; the least of some runs, the ways in turn.

    "registered" is ours through torch's registry of operators, as under `torch.compile`.
    """
    ways: dict[str, dict[str, Callable[[], None]]] = {}
    for name, count in (("a LoRA layer", 1), ("q, k and v with LoRA", 3)):
        stock, ours = peft_layers(count), peft_layers(count)
        for layer in ours:
            layers.fuse(layer, "triton")
        ways[name] = {
            "peft": lambda stock=stock: _run(lambda x: [layer(x) for layer in stock], True),  # type: ignore[misc]
            "ours": lambda ours=ours: _run(lambda x: layers.project(ours, x), False),  # type: ignore[misc]
            "registered": lambda ours=ours: _registered(lambda x: layers.project(ours, x)),  # type: ignore[misc]
        }
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    with without_launches():
        for _ in range(repeats):
            for name, both in ways.items():
                for way, run in both.items():
                    begun = time.perf_counter()
                    run()
                    taken = 1e6 * (time.perf_counter() - begun) / CHAIN
                    found[name][way] = min(taken, found[name].get(way, taken))
    return found


def _registered(apply: Callable[[Tensor], list[Tensor]]) -> None:
    with mock.patch.object(backend, "launches_directly", lambda x: False):
        _run(apply, False)


def _run(apply: Callable[[Tensor], list[Tensor]], autocast: bool) -> None:
    x = torch.ones(1, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    y = x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(CHAIN):
            outs = apply(y)
            y = outs[0] if len(outs) == 1 else torch.addcmul(*outs)
    y.backward(torch.ones_like(y))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write host.json there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(60)
    for name, times in found.items():
        ours = f"ours {times['ours']:6.1f} us, through the registry {times['registered']:6.1f} us, and its launches"
        print(f"{name:22} PEFT {times['peft']:6.1f} us, {ours}")
    if given.out:
        report = {"torch": torch.__version__.partition("+")[0], "python": platform.python_version(), "layers": found}
        (given.out / "host.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are chosen, none is launched
    sys.exit(main())
