"""A disk that fills up outside the checkpoint: one line, exit code 1, and the same command continues."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_datamodules.manifest import Record, write_manifest
from lit_datamodules.sheet import write_sheet
from lit_personalize import atomic, checkpoints
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli import main as stage_one
from lit_personalize.cli.main import main
from lit_personalize.export.pipeline import write_pipeline
from lit_personalize.run_loggers import MetricsFile

CALLBACK = '''
import resource

import lightning.pytorch as pl


class FullDisk(pl.Callback):
    """From a step (or from the end of training) on, no file can grow beyond a few bytes, as on a full disk."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            self.fill()

    def teardown(self, trainer, pl_module, stage):
        if self.at < 0:
            self.fill()

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
'''
FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--checkpoint.every", "2", "--sampling.prompts", "[]",
    "--model.init_args.dtype", "float32", "--trainer.log_every_n_steps", "1", "--export.formats", "[diffusers]",
    "--export.verify", "false",
]  # fmt: skip


@pytest.mark.parametrize(("at", "file", "kept"), [(3, "runs/run/metrics.csv", 2), (-1, "runs/run/exports/", 4)])
def test_a_full_disk_while_logging_and_while_exporting(
    tiny_bases: dict[str, Path], workplace: Path, at: int, file: str, kept: int
) -> None:
    given = ["--images", "photos", "--class-noun", "cat", "--method", "textual_inversion", "--name", "run"]
    assert main(["init", *given, "--base", str(tiny_bases["sd1"]), "--steps", "4"]) == 0
    (workplace / "filling.py").write_text(CALLBACK)
    fill = f"[{{class_path: filling.FullDisk, init_args: {{at: {at}}}}}]"
    command = [sys.executable, "-m", "lit_personalize", *FIT, "--trainer.callbacks", fill, "--allow", "filling"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(workplace), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("litp fit: ")]
    assert line.startswith(f"litp fit: cannot write {file}"), line
    assert line.endswith(f"{os.strerror(errno.EFBIG)}; make room; the same command continues")
    found = checkpoints.find_complete(workplace / "runs/run/checkpoints")
    assert found is not None and found.step == kept
    assert main(FIT) == 0
    assert list((workplace / "runs/run/exports").glob("learned_embeds*.safetensors"))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "cannot write runs/x: No space left on device; make room; the same command continues"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "cannot write runs/x: Read-only file system; allow it, or name another place"),
        (errno.EACCES, "Permission denied; allow it"),
    ],
)
def test_each_reason_has_its_sentence(
    number: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_personalize.cli import doctor

    def fail(arguments: list[str]) -> int:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr(doctor, "main", fail)
    assert main(["doctor"]) == 1
    assert text in capsys.readouterr().err
    with pytest.raises(OSError, match="other"):
        monkeypatch.setattr(doctor, "main", _other)
        main(["doctor"])


def _other(arguments: list[str]) -> int:
    raise OSError(errno.EINVAL, "other")


def test_an_error_without_a_name_gets_that_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic.replacing(tmp_path / "card.md"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "card.md")
    assert str(tmp_path / "card.md") in stage_one.unwritten(caught.value)
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_manifest_sheet_and_metrics_name_themselves(tmp_path: Path) -> None:
    columns = {f"column {i}": 0.5 for i in range(9)}
    logger = MetricsFile(tmp_path)
    logger.log_metrics(columns, step=0)
    writers: dict[str, Callable[[], object]] = {
        "manifest.jsonl": lambda: write_manifest([Record("photos/00000.png", "used")], tmp_path / "manifest.jsonl"),
        "sheet.png": lambda: write_sheet([], tmp_path / "sheet.png"),
        "metrics.csv": logger.save,
    }
    for name, write in writers.items():
        with pytest.raises(OSError) as caught, full_disk(64):
            write()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / name)


def test_a_merged_pipeline_names_itself(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(tiny_bases["sd1"])
    # More than the progress bars of loaders, which pytest keeps in a file; less than the weights.
    with pytest.raises(OSError) as caught, full_disk(1 << 16):
        write_pipeline(AdapterWeights(), base, tmp_path / "pipeline")
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())
