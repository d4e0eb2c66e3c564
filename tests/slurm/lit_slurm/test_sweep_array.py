"""`litp sweep` on a real Slurm: an array of four small runs, each with its own values."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / holder) for holder in ("", "kernels", "datamodules", "callbacks", "slurm"))
RANK = "model.init_args.adapters.0.init_args.rank"


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_an_array_trains_every_task_with_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_box: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    write_folder(sample_pictures(2, 1, kind="object"), tmp_path / "photos")
    init = {"base": str(write_tiny_base(tmp_path / "base", "sd1")), "adapters": [{"class_path": "LoRA"}]}
    data = {"concepts": [{"path": "photos", "class_noun": "cat"}], "resolution": 32}
    run = {
        "slurm": {"partition": "low", "cpus": 1, "restarts": 1, "environment": {"PYTHONPATH": PATHS}},
        "model": {"class_path": "Denoising", "init_args": init},
        "data": {"class_path": "PersonalizationData", "init_args": data},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
        "export": {"verify": False, "formats": ["diffusers"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    given = ["sweep", "-c", "run.yaml", "--name", "s", "--over", f"{RANK}=2,3", "--over", "seed=4,5", "--json"]

    def swept() -> dict[str, Any]:
        capsys.readouterr()
        assert main(given) == 0
        return json.loads(capsys.readouterr().out)

    first = swept()
    job = first["job"]
    assert first["submitted"] == [0, 1, 2, 3] and {task["state"] for task in first["tasks"]} == {"queued"}
    assert "submitted" not in swept(), "the same command does not queue a task twice"
    end = time.monotonic() + 600
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
        assert time.monotonic() < end, [path.read_text()[-900:] for path in Path("runs/slurm/s").glob("*.log")]
        time.sleep(0.3)
    assert main(["sweep", "status", "s", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    logs = "\n".join(path.read_text()[-900:] for path in Path("runs/slurm/s").glob("*.log"))
    assert [(t["run"], t["state"]) for t in tasks] == [(f"s-00{i}", "finished") for i in range(4)], logs
    assert [task["job"] for task in tasks] == [f"{job}_{i}" for i in range(4)]
    for task in tasks:
        folder = tmp_path / "runs" / task["run"]
        model = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
        values = task["values"]
        assert (model["adapters"][0]["init_args"]["rank"], model["seed"]) == (values[RANK], values["seed"])
        (adapter,) = (folder / "exports").glob("*.safetensors")
        with safe_open(adapter, "pt") as file:
            ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}
        assert ranks == {values[RANK]}, "what was trained, not what was noted"
    assert "job" not in swept(), "all are finished"
