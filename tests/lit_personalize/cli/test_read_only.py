"""A checkpoint directory that turns read-only in the midst of a run, and checkpoints that are not whole.

Mode bits, which bind root only where the test gives up its right to pass over them: this works in any container, where
mounting is not allowed.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from file_modes import modes_bind
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.cli.main import main

FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--checkpoint.every", "2", "--sampling.prompts", "[]",
    "--model.init_args.dtype", "float32", "--export.formats", "[diffusers]", "--export.verify", "false",
]  # fmt: skip
STEPS = 6


class TurnReadOnly(pl.Callback):
    """From a step on nothing can be made in `folder`; then perhaps a notice comes.

    Args:
        at: After this step.
        notice: And this one, or -1.
    """

    def __init__(self, folder: str, at: int, notice: int = -1):
        self.folder, self.at, self.notice = Path(folder), at, notice

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        import signal

        if trainer.global_step == self.at:
            self.folder.chmod(0o555)
        if trainer.global_step == self.notice:
            signal.raise_signal(signal.SIGUSR2)


@pytest.fixture
def run(tiny_bases: dict[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of the run.yaml of a Textual Inversion of six steps, not begun."""
    (workplace / "turning.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("LITP_ALLOW", "turning")
    given = ["--images", "photos", "--class-noun", "cat", "--method", "textual_inversion", "--name", "run"]
    assert main(["init", *given, "--base", str(tiny_bases["sd1"]), "--steps", str(STEPS)]) == 0
    return workplace / "runs" / "run"


def turning(**arguments: object) -> list[str]:
    given = {"folder": "runs/run/checkpoints", **arguments}
    pairs = ", ".join(f"{name}: {value}" for name, value in given.items())
    return ["--trainer.callbacks", f"[{{class_path: turning.TurnReadOnly, init_args: {{{pairs}}}}}]"]


def token(run: Path) -> object:
    return load_file(run / "exports/learned_embeds.safetensors")["<new1>"].tolist()


def test_a_checkpoint_directory_turns_read_only(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on, the last save is an error; a notice ends it at once; nothing that was saved is lost."""
    assert main([*FIT, "--name", "straight"]) == 0
    with modes_bind():
        assert main([*FIT, *turning(at=3)]) == 1
    assert "litp fit: checkpoint of step 6 was not written" in (said := capsys.readouterr().err)
    assert "Permission denied" in said and "earlier checkpoints are intact" in said and "Traceback" not in said
    assert "checkpoint of step 4 was not written" in caplog.text and "next try in 2 steps" in caplog.text
    assert [step for step, _ in checkpoints.published(run / "checkpoints")] == [2]

    (run / "checkpoints").chmod(0o755)
    with modes_bind():
        assert main([*FIT, *turning(at=3, notice=5)]) == 75
    assert "SIGUSR2: saved at step 2; the same command continues" in capsys.readouterr().err
    assert "SIGUSR2 step=2" in (run / "preempt.log").read_text()

    (run / "checkpoints").chmod(0o755)
    assert main(FIT) == 0
    assert token(run) == token(run.parent / "straight")


def test_what_is_passed_over_is_said(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(FIT) == 0
    for step in (2, 4, 6):
        (checkpoints.directory(run / "checkpoints", step) / checkpoints.STATE).write_bytes(b"half")
    checkpoints.staged(run / "checkpoints", 8).mkdir()
    before = token(run)
    (run / "exports/learned_embeds.safetensors").unlink()
    caplog.clear()
    assert main([*FIT, "--resume", "must"]) == 2
    assert main(FIT) == 0
    for step in (2, 4, 6):
        assert f"passed over a checkpoint: step-{step:08d}: state.ckpt has 4 bytes instead of" in caplog.text
    assert "the save of step 8 was ended before it was done" in caplog.text
    assert "run run: none of its checkpoints is whole; it starts at step 0" in caplog.text
    assert token(run) == before and not list((run / "checkpoints").glob(".*"))
