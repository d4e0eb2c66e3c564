"""The measured part of docs/kernels.md: what `kernels/benchmarks` and `litp profile compile` left in their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRAINED = {"none": "nothing", "key_value": "text K and V", "query_value": "q and v", "attention": "q, k, v, out"}
MODELS = {"sd15": "SD1.5 at 512", "sdxl": "SDXL at 1024"}


def kernel_tables(results: Path) -> str:
    """Counts, compiles, and the steps that were timed on GPUs, or the sentence that none was."""
    parts = [_counts(json.loads((results / "counts.json").read_text(encoding="utf-8")))]
    parts.append(_host(json.loads((results / "host.json").read_text(encoding="utf-8"))))
    for path in sorted(results.glob("compile-triton-*.json")):
        parts.append(_compiles(json.loads(path.read_text(encoding="utf-8"))))
    timed = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/step-*.json"))]
    parts.append("\n\n".join(map(_step, timed)) if timed else NOT_TIMED)
    return "\n\n".join(parts)


NOT_TIMED = (
    "No step and no operator was timed on a GPU yet: `kernels/benchmarks/gpu_suite.sh` does it, and its results would "
    "stand here. Limits that `litp profile kernels` prints are modelled."
)


def _counts(counts: dict[str, Any]) -> str:
    steps = counts["steps"]
    lines = [
        f"Launches and bytes that autograd keeps in one step, batch 1, rank 8, counted with torch {counts['torch']}:",
        "",
        "| model | LoRA on | launches, PEFT | with kernels | ratio | kept, PEFT | with kernels | less |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, name in MODELS.items():
        bare = steps[f"{model} none stock"]
        kept = f"{bare['saved_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {name} | {TRAINED['none']} | {bare['launches']:,} | | | {kept} | | |")
        for targets in ("key_value", "query_value", "attention"):
            stock, ours = (steps[f"{model} {targets} {way}"] for way in ("stock", "patched"))
            less = 1 - ours["saved_bytes"] / stock["saved_bytes"]
            lines.append(
                f"| {name} | {TRAINED[targets]} | {stock['launches']:,} | {ours['launches']:,} | "
                f"{stock['launches'] / ours['launches']:.2f} | {stock['saved_bytes'] / 1e9:.2f} GB | "
                f"{ours['saved_bytes'] / 1e9:.2f} GB | {less:.0%} |"
            )
    return "\n".join(lines)


def _host(report: dict[str, Any]) -> str:
    lines = [
        "Microseconds of the host, forward and backward, side by side on one CPU core with torch "
        f"{report['torch']}; ours without its launches (1 forward, 3 to 5 backward), PEFT's operators on 4 rows of 16 "
        "numbers:",
        "",
        "| layers | PEFT under autocast | with kernels | ratio | kernels through torch's registry, as when compiled |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, times in report["layers"].items():
        figures = f"{times['peft']:.0f} | {times['ours']:.0f} | {times['peft'] / times['ours']:.2f}"
        lines.append(f"| {name} | {figures} | {times['registered']:.0f} |")
    return "\n".join(lines)


def _compiles(report: dict[str, Any]) -> str:
    kernels = report["kernels"]
    architectures = sorted({k["arch"] for k in kernels})
    head = " | ".join(f"registers, {arch}" for arch in architectures)
    lines = [
        f"Compiled ahead of time by Triton {report['triton']}, {len(kernels)} times; the most over a kernel's forms:",
        "",
        f"| kernel | forms | {head} | shared bytes | spills |",
        "| --- |" + " --- |" * (len(architectures) + 3),
    ]
    for name in dict.fromkeys(k["name"] for k in kernels):
        own = [k for k in kernels if k["name"] == name]
        registers = " | ".join(str(max(k["registers"] for k in own if k["arch"] == arch)) for arch in architectures)
        forms = len({k["config"] for k in own})
        shared, spills = (max(k[field] for k in own) for field in ("shared_bytes", "spills"))
        lines.append(f"| {name} | {forms} | {registers} | {shared:,} | {spills} |")
    return "\n".join(lines)


def _step(report: dict[str, Any]) -> str:
    lines = [
        f"{MODELS.get(report['size'], report['size'])}, LoRA on {TRAINED[report['targets']]}, batch {report['batch']}: "
        f"{report['device']}, torch {report['torch']}, {report['date']}, commit {report['commit'][:7]}",
        "",
        "| way | ms a step | of the CPU | peak GB | times as fast as stock |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, figures in report["ways"].items():
        ratio = f"{figures['stock_ms'] / figures['ms']:.2f}"
        peak = "" if figures["peak_gb"] is None else f"{figures['peak_gb']:.2f}"
        lines.append(f"| {way} | {figures['ms']:.2f} | {figures['cpu_ms']:.2f} | {peak} | {ratio} |")
    lines += [f"| {way} | failed: {reason} | | | |" for way, reason in report["failed"].items()]
    return "\n".join(lines)
