"""`litp sweep`: checked before anything is written, trained here, taken up by the same command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from lit_personalize.cli.main import main
from lit_personalize.run_directory import RunDirectory

RANK = "model.init_args.adapters.0.init_args.rank"


@pytest.fixture
def run_yaml(workplace: Path, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "none"))
    run = {
        "model": {
            "class_path": "Denoising",
            "init_args": {"base": str(tiny_bases["sd1"]), "adapters": [{"class_path": "LoRA"}]},
        },
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {"concepts": [{"path": "photos", "class_noun": "cat"}], "resolution": 32},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
        "export": {"verify": False, "formats": ["diffusers"]},
    }
    (workplace / "run.yaml").write_text(yaml.safe_dump(run))
    return workplace / "run.yaml"


def swept(*arguments: str) -> int:
    return main(["sweep", "-c", "run.yaml", "--name", "s", *arguments])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([f"{RANK[:-4]}rnk=4,8"], "rnk=4: unknown key 'rnk'; did you mean 'rank'?"),
        (["trainer.max_steps=5,many"], "trainer.max_steps=many: trainer.max_steps must be int"),
        (["model.init_args.adapters.1.init_args.rank=4"], "adapters has 1 entries, counted from 0"),
        ([f"{RANK}=4", "model.init_args.adapters=[]"], f"adapters and {RANK} set the same thing"),
        (["seed=4", "data.init_args.seed=5"], "set the same thing; give one of them"),
    ],
)
def test_a_wrong_value_is_told_and_nothing_is_written(
    run_yaml: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(*(part for text in given for part in ("--over", text)), "--here") == 2
    assert said in capsys.readouterr().err
    assert not (run_yaml.parent / "runs").exists()


def test_a_dry_run_shows_table_and_script_and_writes_nothing(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--over", f"{RANK}=2,4", "--over", "seed=0..1", "--dry-run", "--slurm.partition", "gpu", "--at-once", "2"]
    assert swept(*given, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [task["values"] for task in report["tasks"]][1] == {RANK: 2, "seed": 1}
    assert {task["state"] for task in report["tasks"]} == {"not started"}
    script = report["script"]
    assert "#SBATCH --array=0-3%2" in script and "#SBATCH --partition=gpu" in script
    assert 'sweeps/s/tasks/"$(printf %03d "$SLURM_ARRAY_TASK_ID")".yaml' in script
    assert not (run_yaml.parent / "runs").exists()
    assert swept("--over", "seed=0,1", "--slurm.array", "0-3") == 2
    assert "a sweep makes its own array" in capsys.readouterr().err


@pytest.mark.timeout(900)  # it starts three processes that import torch
def test_what_fails_does_not_keep_the_others_from_training_and_the_same_command_goes_on(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    place = run_yaml.parent
    given = ["--over", "data.init_args.concepts.0.path=later,photos", "--over", f"{RANK}=2,3", "--zip"]
    given += ["--here", "--json"]
    assert swept(*given) == 3, "the exit code of the first that failed"
    said = capsys.readouterr()
    assert [task["state"] for task in json.loads(said.out)["tasks"]] == ["failed", "finished"]
    assert "s-000 ended with exit code 3" in said.err
    config = yaml.safe_load(RunDirectory("runs", "s-001").config.read_text())
    assert config["model"]["init_args"]["adapters"][0]["init_args"]["rank"] == 3 and config["name"] == "s-001"
    finished = (place / "runs/s-001/exports/finished.json").stat().st_mtime_ns
    (place / "photos").rename(place / "later")
    assert swept(*given) == 0
    report = json.loads(capsys.readouterr().out)
    assert [task["state"] for task in report["tasks"]] == ["finished", "finished"]
    assert (place / "runs/s-001/exports/finished.json").stat().st_mtime_ns == finished, "it was not trained again"
    assert swept(*given) == 0 and "nothing to do" in capsys.readouterr().err
    assert swept("--over", "seed=1,2", "--here") == 2
    assert "2 tasks with other values" in capsys.readouterr().err
    assert swept(*given, "--trainer.max_steps", "2") == 2
    assert "began with another configuration (trainer.max_steps differ)" in capsys.readouterr().err
    assert main(["sweep", "status", "s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["s-000", "later", "2", "finished", "1/1"]
    assert main(["runs", "compare", "s-*", "--by", "loss", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert sorted(compared["configuration"][RANK]) == [2, 3]
