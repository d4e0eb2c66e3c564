"""`litp fit` a second time: epochs, metrics, and a configuration that stays that of the run."""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.cli.main import main
from lit_personalize.run_loggers import rows_before

FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--data.init_args.batch_size", "1",
    "--checkpoint.every", "2", "--sampling.prompts", "[]", "--model.init_args.dtype", "float32",
    "--export.formats", "[diffusers]", "--export.verify", "false",
]  # fmt: skip
LOG_ALWAYS = ["--trainer.log_every_n_steps", "1"]


@pytest.fixture
def run(tiny_bases: dict[str, Path], workplace: Path) -> Path:
    """The run directory of the run.yaml of a Textual Inversion of three steps, not begun."""
    given = ["--images", "photos", "--class-noun", "cat", "--method", "textual_inversion", "--name", "run"]
    assert main(["init", *given, "--base", str(tiny_bases["sd1"]), "--steps", "3"]) == 0
    return workplace / "runs" / "run"


def _step(run: Path) -> int:
    found = checkpoints.find_complete(run / "checkpoints")
    return found.step if found else 0


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_of_epochs_goes_on_to_more_epochs(run: Path) -> None:
    epochs = [*FIT, "--trainer.max_steps", "-1", "--trainer.max_epochs"]
    assert main([*epochs, "3", "--name", "straight"]) == 0
    assert main([*epochs, "1"]) == 0
    assert _step(run) == 3  # three photos, one at a time
    assert main([*epochs, "1"]) == 0
    assert _step(run) == 3
    assert main([*epochs, "3"]) == 0
    assert _step(run) == 9
    one, two = (run.parent / name / "exports/learned_embeds.safetensors" for name in ("straight", "run"))
    assert load_file(one)["<new1>"].equal(load_file(two)["<new1>"])


def test_metrics_of_a_resumed_run_are_those_of_an_undisturbed_one(run: Path) -> None:
    assert main([*FIT, *LOG_ALWAYS, "--trainer.max_steps", "5", "--name", "straight"]) == 0
    assert main([*FIT, *LOG_ALWAYS]) == 0
    # What a kill after the last checkpoint leaves: rows of steps that are trained again, and half a line.
    with (run / "metrics.csv").open("a") as file:
        file.write((run / "metrics.csv").read_text().splitlines()[-1].rpartition(",")[0] + ",3\n0,")
    assert main([*FIT, *LOG_ALWAYS, "--trainer.max_steps", "5"]) == 0
    straight, resumed = ([(r["step"], r["loss"]) for r in _rows(run.parent / n)] for n in ("straight", "run"))
    assert [step for step, _ in straight] == ["0", "1", "2", "3", "4"]
    assert resumed == straight
    assert not (run / "hparams.yaml").exists() and list(run.glob("events.*"))


def test_a_clock_that_goes_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour at every look, in both parts of the run."""
    assert main([*FIT, "--trainer.max_steps", "5", "--name", "straight"]) == 0
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(hours))
    assert main(FIT) == 0 and _step(run) == 3
    assert main([*FIT, "--trainer.max_steps", "5"]) == 0
    assert next(hours) > 2, "someone looked"
    one, two = (run.parent / name / "exports/learned_embeds.safetensors" for name in ("straight", "run"))
    assert _step(run) == 5 and load_file(one)["<new1>"].equal(load_file(two)["<new1>"])


def test_a_short_run_has_metrics(run: Path) -> None:
    assert main([*FIT, "--trainer.max_steps", "10"]) == 0
    assert [row["step"] for row in _rows(run)] == ["9"]


def test_rows_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert rows_before(path, 9) == ([], [])
    path.write_text("loss,step\n0.5,0\n0.4,1\n0.3,2\n0.2,")
    assert rows_before(path, 2) == (["loss", "step"], [{"loss": "0.5", "step": "0"}, {"loss": "0.4", "step": "1"}])


def test_a_refused_start_leaves_the_run_as_it_was(
    run: Path, tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(FIT) == 0
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "command.txt", "env.json")}
    longer = ["--trainer.max_steps", "5"]
    nowhere = "[{path: nowhere, class_noun: cat, token: <new1>}]"
    other = ["--model.init_args.base", str(tiny_bases["sd2"])]
    cases: list[tuple[list[str], int, str]] = [
        (other, 3, "use the same base or a new run name"),
        ([*other, *longer], 3, "use the same base or a new run name"),
        (["--model.init_args.base", "nowhere"], 3, "not found"),
        (["--model.init_args.seed", "7"], 2, "started with seed 0, not 7"),
        (["--model.init_args.adapters", "[{class_path: LoRA}]"], 3, "checkpoint of other adapters"),
        (["--data.init_args.concepts", nowhere, *longer], 3, "image folder nowhere does not exist"),
        (["--resume", "never"], 2, "already has a checkpoint"),
    ]
    for arguments, code, message in cases:
        assert main([*FIT, *arguments]) == code, arguments
        assert message in capsys.readouterr().err
        assert {name: (run / name).read_bytes() for name in before} == before, arguments
    assert main(["export", str(run), "--no-verify"]) == 0


@pytest.mark.parametrize(
    "length", [["--trainer.max_steps", "3"], ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]]
)
def test_a_finished_run_rests(run: Path, length: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def written() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}

    assert main([*FIT, *length]) == 0
    before = written()
    Path("photos").rename("elsewhere")  # so that reading them again would fail
    caplog.clear()
    assert main([*FIT, *length]) == 0
    assert f"run run has finished its 3 steps; its exports are in {Path('runs/run/exports')}" in caplog.text
    assert written() == before
    assert main([*FIT, *length, "--resume", "never"]) == 2
    (run / "exports/learned_embeds.safetensors").unlink()
    Path("elsewhere").rename("photos")
    assert main([*FIT, *length]) == 0
    assert (run / "exports/learned_embeds.safetensors").stat().st_size


def test_a_run_out_of_time_has_not_finished(run: Path) -> None:
    assert main([*FIT, "--trainer.max_steps", "1"]) == 0
    finished = run / "exports/finished.json"
    finished.unlink()
    assert main([*FIT, "--trainer.max_time", "00:00:00:00"]) == 0
    assert _step(run) == 1 and not finished.exists()
    assert main(FIT) == 0
    assert _step(run) == 3 and finished.exists()


def test_a_start_that_goes_on_is_the_new_configuration(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([*FIT, "--model.init_args.optimizer.init_args.lr", "0.005"]) == 0
    caplog.clear()
    changed = ["--model.init_args.snr_gamma", "5.0", "--model.init_args.timesteps", "[0, 500]",
               "--model.init_args.optimizer.init_args.lr", "0.5", "--trainer.max_steps", "5"]  # fmt: skip
    assert main([*FIT, *changed]) == 0
    assert "model.snr_gamma was None when the checkpoint was written and is 5.0 now" in caplog.text
    assert "model.timesteps was None when the checkpoint was written and is (0, 500) now" in caplog.text
    assert "learning rate of token:<new1> was 0.005" in caplog.text and "is 0.5 now" in caplog.text
    assert "noise_offset" not in caplog.text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["snr_gamma"] == 5.0 and config["trainer"]["max_steps"] == 5
    assert len((run / "command.txt").read_text().splitlines()) == 2
    kept = checkpoints.read_state(checkpoints.directory(run / "checkpoints", 5))
    assert kept["litp"]["lr"] == {"token:<new1>": pytest.approx(kept["optimizer_states"][0]["param_groups"][0]["lr"])}
