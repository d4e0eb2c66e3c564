"""The closed-form merge at SDXL's real size, beside its bare products and solves, side by side in one run.

140 K and V matrices of cross-attention (20 of 640 x 2048, 120 of 1280 x 2048), two concepts of 7 target states each,
random states of 1,000 captions. *Bare* is what no implementation can leave out: C_reg^T C_reg, one Cholesky
factorization, one solve, and for every matrix ΔW C^T and a solve of the targets' size. Rounds take turns.

    python benchmarks/closed_form_merge.py [--rounds 5] [--states 12000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.merging.closed_form import solve
from lit_personalize.report.circumstances import circumstances

SHAPES = {(640, 2048): 20, (1280, 2048): 120}
TARGETS, LIMIT = 7, 3.0


def bare(deltas: list[list[Tensor]], parts: list[Tensor], states: Tensor) -> None:
    """Products and solves alone; nothing is checked or kept."""
    targets = torch.cat(parts)
    factor = torch.linalg.cholesky(states.T @ states)
    directions = torch.cholesky_solve(targets.T, factor)
    inner = torch.linalg.cholesky(targets @ directions)
    for layer in zip(*deltas, strict=True):
        changes = torch.cat([part @ delta.double().T for part, delta in zip(parts, layer, strict=True)])
        torch.cholesky_solve(changes, inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--states", type=int, default=12_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    deltas = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    concepts = [AdapterWeights(dense={f"layer {i}": t for i, t in enumerate(own)}) for own in deltas]
    states = torch.randn(options.states, 2048, dtype=torch.double)
    parts = [torch.randn(TARGETS, 2048, dtype=torch.double) for _ in deltas]
    ratios, seconds = [], []
    for _ in range(options.rounds):
        start = time.perf_counter()
        bare(deltas, parts, states)
        between = time.perf_counter()
        solve(concepts, parts, states)
        end = time.perf_counter()
        ratios.append((end - between) / (between - start))
        seconds.append(end - between)
    found = {
        **circumstances(Path(__file__).parent), "matrices": len(shapes), "states": options.states,
        "targets": 2 * TARGETS, "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "seconds": statistics.median(seconds), "asked": LIMIT, "reached": statistics.median(ratios) <= LIMIT,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
