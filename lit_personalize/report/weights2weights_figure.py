"""The figure of docs/weights2weights.md: accuracy on held-out adapters over the size of the corpus, as in the paper."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def draw_accuracy(recorded: Path, path: Path) -> bool:
    """Draw what benchmarks/weights2weights.py recorded as a PNG; False where it recorded no accuracies.

    Points are means over attributes, bars the range of the draws; thin lines are single attributes.
    """
    found = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
    if "attributes" not in found:
        return False
    from matplotlib.figure import Figure

    recorded_sizes = found["attributes"]["accuracy"]
    sizes: dict[int, Any] = {int(size): about["by attribute"] for size, about in recorded_sizes.items()}
    x = list(sizes)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(next(iter(sizes.values()))):
        means = [statistics.mean(by[name]) for by in sizes.values()]
        axes.plot(x, means, color=f"C{number}", linewidth=1, alpha=0.7, label=name)
    draws = [[statistics.mean(values) for values in zip(*by.values(), strict=True)] for by in sizes.values()]
    means = [statistics.mean(each) for each in draws]
    spread = [[m - min(each) for m, each in zip(means, draws, strict=True)],
              [max(each) - m for m, each in zip(means, draws, strict=True)]]  # fmt: skip
    axes.errorbar(x, means, spread, color="black", marker="o", linewidth=2, capsize=3, label="all")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.text(x[0], 0.505, "chance", color="gray", fontsize=8, va="bottom")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{size:,}" for size in x])
    axes.minorticks_off()
    axes.set_ylim(0.48, 1.01)
    axes.set_xlabel("adapters of the corpus")
    axes.set_ylabel("balanced accuracy, held-out adapters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.06), ncols=3)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    return True
