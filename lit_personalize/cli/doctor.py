"""`litp doctor`: versions, devices and known problems, to paste into a report. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lit_personalize.cli.console import add_json, emit

PACKAGES = (
    "torch", "triton", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "webdataset", "safetensors",
    "jsonargparse", "deepspeed",
)  # fmt: skip
BAD = {("lightning", "2.6.2"): "a malicious release", ("lightning", "2.6.3"): "a malicious release"}


def findings() -> tuple[dict[str, str], list[str]]:
    """Facts, and problems with their fix."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    problems = []
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
            if package not in ("deepspeed", "triton"):
                problems.append(f"{package} is not installed: pip install {package}")
        if reason := BAD.get((package, facts[package])):
            problems.append(f"{package} {facts[package]} is {reason}: pip install -U {package}")
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin and Path(spec.origin).parent == Path.cwd() / "kernels":
        problems.append("kernels/__init__.py in this folder hides Hugging Face's package: remove it")
    facts["cpu threads"] = str(os.cpu_count())
    facts["nvidia driver"] = shutil.which("nvidia-smi") or "none"
    facts["free disk"] = f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"
    facts["offline"] = "yes" if os.environ.get("HF_HUB_OFFLINE") == "1" else "no (nothing is fetched unless asked)"
    weights = Path(__file__).parents[1] / "tinyworld" / "weights" / "base" / "model_index.json"
    facts["embedded base"] = "present" if weights.exists() else "missing"
    if not weights.exists():
        problems.append("the embedded base is missing: litp world build, or reinstall the package")
    return facts, problems


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp doctor", description="Report versions, devices and known problems.")
    add_json(parser)
    options = parser.parse_args(arguments)
    facts, problems = findings()
    if options.json:
        emit({**facts, "problems": problems}, True)
    else:
        emit(facts, False)
        print("\n".join(f"problem: {p}" for p in problems) or "no known problem")
    return 3 if problems else 0
