"""`litp profile kernels`: operators at real sizes as a table and as a roofline picture (Williams et al., 2009).

With `--tune`, the GPU's table of paths and tiles instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_kernels import dispatch, measuring, table_files
from lit_personalize.errors import UsageError

BATCHES = (1, 2, 4, 8, 16)
"""Of which a table is made."""


def measured(batch: int = 1, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Rows of `lit_kernels.measuring`, with times where there is a GPU.

    Raises:
        UsageError: An unknown operator, or a batch below 1.
    """
    cases = _cases(batch, only)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    name = measuring.peaks_of(device)[0]
    rows = measuring.measure(cases, device)
    return {
        "device": None if device is None else torch.cuda.get_device_name(device),
        "limit_of": name,
        "peak_flops": measuring.PEAKS[name][0],
        "bandwidth": measuring.PEAKS[name][1],
        "batch": batch,
        "operators": measuring.as_rows(list(rows)),
    }


def _cases(batch: int, only: Sequence[str] | None) -> list[measuring.Case]:
    if batch < 1:
        raise UsageError(f"--batch must be at least 1, not {batch}")
    cases = list(measuring.cases(batch))
    known = list(dict.fromkeys(case.operator for case in cases))
    if wrong := [name for name in only or () if name not in known]:
        raise UsageError(f"unknown operator {wrong[0]!r}; there are {', '.join(known)}")
    return [case for case in cases if not only or case.operator in only]


def tuned(batches: Sequence[int], only: Sequence[str] | None, folder: Path | None) -> tuple[Path, Iterator[Any]]:
    """The table's file in `folder` (by default where tables are looked for), and its new entries as they are measured.

    Raises:
        UsageError: There is no GPU, an unknown operator, a batch below 1, or a file in its place that is no table.
    """
    cases = [case for batch in batches for case in _cases(batch, only)]
    if not torch.cuda.is_available():
        raise UsageError("--tune measures kernels and needs an NVIDIA GPU, which is not here; without a table the "
                         "kernels run with their default tiles")  # fmt: skip
    from lit_kernels.tuning import tune

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = dispatch.gpu_of(device)
    try:
        file = table_files.file_of(gpu, folder or table_files.own_folder())
        if file.exists():
            table_files.read(file)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return file, tune(cases, file, gpu, device)


def table(report: dict[str, Any]) -> str:
    """For a terminal; below an operator that was timed, the times of its baselines / its own."""
    lines = [f"{'operator':20} {'size':52} {'pass':8} {'MB':>8} {'GFLOP':>8} {'limit us':>9}  by"]
    if report["device"]:
        lines[0] += f"{'':8} {'time us':>9} {'of limit':>8} {'torch us':>9} {'ratio':>6}"
    for row in report["operators"]:
        line = (
            f"{row['operator']:20} {row['size']:52} {row['direction']:8} {row['megabytes']:8.1f} "
            f"{row['gigaflops']:8.2f} {row['limit_us']:9.1f}  {row['limited_by']:10}"
        )
        if row["time_us"] is not None:
            line += f"{row['time_us']:9.1f} {row['share_of_limit']:8.0%} {row['torch_us']:9.1f} {row['ratio']:6.2f}"
        lines.append(line.rstrip())
        if row["ratios"]:
            lines.append("    against " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items()))
        lines += [f"    {name}: {why}" for name, why in row["baselines"].items() if isinstance(why, str)]
    where = f"limits are modelled from {report['limit_of']}'s peaks"
    lines += ["", f"{report['device'] or 'no GPU here: nothing was timed'}; {where}"]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """FLOP/s over FLOPs per byte: the roof, what was reached, or the places of the operators below the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    peak, bandwidth = report["peak_flops"], report["bandwidth"]
    intensities = [0.1, peak / bandwidth, 2000.0]
    axes.plot(intensities, [min(peak, i * bandwidth) / 1e12 for i in intensities], color="black", linewidth=1.5)
    names = list(dict.fromkeys(row["operator"] for row in report["operators"]))
    for number, name in enumerate(names):
        for direction, marker in (("forward", "o"), ("backward", "^")):
            rows = [r for r in report["operators"] if r["operator"] == name and r["direction"] == direction]
            if not rows:
                continue
            times = [row["time_us"] or row["limit_us"] for row in rows]
            axes.plot(
                [1000 * row["gigaflops"] / row["megabytes"] for row in rows],
                [1000 * row["gigaflops"] / time for row, time in zip(rows, times, strict=True)],
                marker, color=f"C{number}", label=f"{name}, {direction}", markersize=7,
                markerfacecolor=f"C{number}" if report["device"] else "none",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("TFLOP/s")
    reached = "measured" if report["device"] else "at the limit that they could reach: nothing was timed"
    axes.set_title(f"roof of {report['limit_of']} (modelled); operators {reached}", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)
