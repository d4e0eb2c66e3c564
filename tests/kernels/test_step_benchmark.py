"""`kernels/benchmarks/step.py` on a UNet small enough for a CPU: every way learns the same, and results are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels/benchmarks"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    root = FOLDER.parents[1]
    paths = os.pathsep.join(str(root / name) for name in (".", "kernels", "datamodules", "callbacks", "slurm"))
    command = [sys.executable, str(FOLDER / "step.py"), *options]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.parametrize("targets", ["attention", "full_key_value"])
def test_ways_are_measured_side_by_side_and_once(tmp_path: Path, targets: str) -> None:
    given = ["--size", "tiny", "--targets", targets, "--steps", "2", "--out", str(tmp_path)]
    given += ["--ways", "stock", "kernels"]
    done = run(*given)
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"step-tiny-{targets}-batch1.json"
    report = json.loads(path.read_text())
    assert list(report["ways"]) == ["stock", "kernels"] and not report["failed"]
    assert all(way["ms"] >= way["cpu_ms"] > 0 and way["stock_ms"] > 0 for way in report["ways"].values())
    before = path.read_bytes()
    assert "is there" in run(*given).stdout and path.read_bytes() == before


def test_real_sizes_are_refused_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        done = run("--size", "sdxl", "--out", str(tmp_path))
        assert done.returncode == 2 and "needs a GPU" in done.stderr
