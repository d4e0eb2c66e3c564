"""Fused layers take less of the host than PEFT's: without that, fewer launches would be no gain at batch 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_fused_layer_takes_less_of_the_host(tmp_path: Path) -> None:
    """Side by side, kernels left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "kernels/benchmarks/host.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "host.json").read_text())["layers"]
    assert all(times["ours"] < 0.9 * times["registered"] for times in layers.values()), "the short way is not taken"
    ratios = {name: times["ours"] / times["peft"] for name, times in layers.items()}
    assert ratios["a LoRA layer"] < 0.95, ratios
    assert ratios["q, k and v with LoRA"] < 0.75, ratios
