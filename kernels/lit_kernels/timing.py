"""Times of forward and backward passes on a GPU, also as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_kernels.baselines import Baseline

Bench = Callable[[Callable[[], Any]], float]
"""Microseconds that a function takes."""


def do_bench(run: Callable[[], Any]) -> float:
    """Median of some hundred calls on a GPU, with a cold L2: a quarter of a second and the calls themselves."""
    from triton.testing import do_bench

    return 1000 * float(do_bench(run, return_mode="median"))


def passes_of(way: Baseline, bench: Bench) -> dict[str, float]:
    """Time of the forward pass, and of the backward pass where something learns; in graphs if `way.graphed`."""
    graphed = way.graphed and torch.cuda.is_available()
    # Autograd runs a backward pass on its forward's stream, which must be the one that is captured.
    stream = torch.cuda.Stream() if graphed else None
    # What a compiled forward pass keeps is to serve many backward passes.
    with torch.cuda.stream(stream), torch._functorch.config.patch(donated_buffer=False):
        way.run()
        runs: dict[str, Callable[[], Any]] = {"forward": way.run}
        if way.learning:
            runs["backward"] = backward_of(way)
        if stream is not None:
            runs = {name: _captured(run, stream) for name, run in runs.items()}
    if graphed:
        torch.cuda.synchronize()
    return {name: bench(run) for name, run in runs.items()}


def backward_of(way: Baseline) -> Callable[[], tuple[Tensor, ...]]:
    """Its backward pass from ones, of a forward pass that is made here; it can be run again and again."""
    out = way.run()
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = [torch.ones_like(y) for y in outs]
    return lambda: torch.autograd.grad(outs, way.learning, grads, retain_graph=True)


def _captured(run: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """The same launches as a CUDA graph."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
