"""Bad input at the command line: one message that names the thing and the fix, its exit code, and nothing lost."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize import checkpoints
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.export.exporter import export
from lit_personalize.run_directory import RunDirectory
from lit_personalize.stop_signals import NOTICES, listen
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

Refused = Callable[..., str]
FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--checkpoint.every", "2", "--sampling.steps", "2",
    "--sampling.every", "100", "--model.init_args.dtype", "float32",
]  # fmt: skip


@pytest.fixture
def workplace(tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three photos and the run.yaml of a Textual Inversion on them, as working directory."""
    monkeypatch.chdir(tmp_path)
    write_folder(sample_pictures(3, 1, kind="object"), tmp_path / "photos")
    for extra in [*(tmp_path / "photos").glob("*.txt"), *(tmp_path / "photos").glob("*.json")]:
        extra.unlink()
    given = ["--images", "photos", "--class-noun", "cat", "--name", "run", "--steps", "6"]
    assert main(["init", *given, "--method", "textual_inversion", "--base", str(tiny_bases["sd1"])]) == 0
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run `litp`, expect a code and one message with these parts; returns the message."""
    # Handlers keep the captured stream of the test that made them, and would complain that it is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(arguments: list[str], code: int, *parts: str) -> str:
        capsys.readouterr()
        found = main(arguments)
        return judge(found, capsys.readouterr().err, arguments[0], code, *parts)

    return run


def judge(found: int, text: str, verb: str, code: int, *parts: str) -> str:
    assert found == code, text
    assert "Traceback" not in text and 'Parser key "' not in text, text
    assert text.count(f"litp {verb}: ") == 1, text
    message = text[text.index(f"litp {verb}: ") :]
    assert message.count("\n") <= 2, f"a message and at most one detail:\n{message}"
    for part in parts:
        assert part in message
    return message


def edit(old: str, new: str) -> None:
    """Change run.yaml as a person would."""
    path = Path("run.yaml")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.init_args.resolutoin", "64"], ["unknown key 'resolutoin'", "did you mean 'resolution'?"]),
        (["--data.init_args.batch_size", "two"], ["data.batch_size must be int, not two"]),
        (["--data.init_args.batch_size", "0"], ["data.batch_size must be at least 1, not 0"]),
        (["--data.init_args.flip", "sometimes"], ["data.flip must be bool or float, not sometimes"]),
        (["--data.init_args.crop", "centre"], ["data.crop must be 'center', 'random' or 'squash', not centre"]),
        (["--data.init_args.concepts", "photos"], ["data.concepts must be list, not photos"]),
        (["--data.init_args.concepts", "[{path: photos, repeats: many}]"], ["repeats must be int, not many"]),
        (["--data.init_args.resolution", "33"], ["data.resolution 33 is no multiple of 2"]),
        (["--data", "PersonalizationDta"], ["no class 'PersonalizationDta'", "did you mean 'PersonalizationData'?"]),
        (["--sampling.steps", "0"], ["at least 1 denoising step, not 0"]),
    ],
)
def test_a_wrong_option_on_the_command_line(
    workplace: Path, refused: Refused, arguments: list[str], parts: list[str]
) -> None:
    refused([*FIT, *arguments], 2, *parts)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("    resolution:", "    resolutoin:", ["unknown key 'resolutoin'", "did you mean 'resolution'?"]),
        ("class_noun: cat", "class_nuon: cat", ["unknown key 'class_nuon'", "did you mean 'class_noun'?"]),
        ("path: photos, ", "", ["data.concepts lacks path"]),
        ("name: run\n", "", ["the configuration lacks name"]),
        ("name: run\n", "name: [run\n", ["run.yaml is not YAML: line "]),
    ],
)
def test_a_wrong_key_in_the_file(workplace: Path, refused: Refused, old: str, new: str, parts: list[str]) -> None:
    edit(old, new)
    refused(["fit", "-c", "run.yaml"], 2, *parts)


# ---- pictures, captions, tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [["fit"], ["data", "check"]])
def test_a_missing_and_an_empty_folder(workplace: Path, refused: Refused, verb: list[str]) -> None:
    edit("path: photos", "path: pictures")
    refused([*verb, "-c", "run.yaml"], 3, "image folder pictures does not exist", "give a folder")
    (workplace / "pictures").mkdir()
    (workplace / "pictures" / "notes.txt").write_text("no picture")
    refused([*verb, "-c", "run.yaml"], 3, "image folder pictures holds no jpg, png or webp", "put the pictures")


def test_init_on_a_missing_and_an_empty_folder(workplace: Path, refused: Refused) -> None:
    given = ["init", "--images", "pictures", "--class-noun", "cat", "-o", "other.yaml"]
    refused(given, 3, "folder pictures does not exist")
    (workplace / "pictures").mkdir()
    refused(given, 3, "folder pictures holds no jpg, png or webp file", "put the pictures")
    assert not (workplace / "other.yaml").exists()


def test_a_caption_that_is_not_utf8(workplace: Path, refused: Refused) -> None:
    caption = workplace / "photos" / "00000.txt"
    caption.write_bytes("photo of a <new1> café".encode("latin-1"))
    refused(FIT, 3, "caption photos/00000.txt is not UTF-8 (byte 0xe9 at offset 21)", "save it as UTF-8")
    caption.write_bytes(b"photo of a cat")
    refused(FIT, 3, "caption photos/00000.txt", "token <new1> is not in the caption", "write <new1>")


def test_a_token_that_the_tokenizer_already_has(workplace: Path, refused: Refused) -> None:
    edit("<new1>", "dog")
    refused(FIT, 2, "token 'dog' is already in the vocabulary", "choose another")


# ---- bases and adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_base_without_a_part(tiny_bases: dict[str, Path], workplace: Path, refused: Refused, part: str) -> None:
    base = shutil.copytree(tiny_bases["sd1"], workplace / "base")
    shutil.rmtree(base / part)
    parts = [f"base {base} lacks {part}", "copy the complete diffusers directory"]
    refused([*FIT, "--model.init_args.base", str(base)], 3, *parts)
    refused(["sample", "a cat", "--base", str(base)], 3, *parts)


@pytest.fixture
def sdxl_adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    """The files of a LoRA that was made for the SDXL base."""
    base = load_base(tiny_bases["sdxl"])
    adapter = LoRA(rank=2)
    adapter.attach(base)
    export(adapter.export_weights(), tmp_path / "adapter", base, "xl", ["diffusers"])
    return tmp_path / "adapter"


def test_an_adapter_for_another_base(
    tiny_bases: dict[str, Path], workplace: Path, sdxl_adapter: Path, refused: Refused
) -> None:
    given = ["sample", "a cat", "--base", str(tiny_bases["sd1"]), "--steps", "1", "--adapter"]
    file = sdxl_adapter / "pytorch_lora_weights.safetensors"
    refused([*given, str(file)], 3, f"{file} was trained on base sdxl", "give that base")
    refused([*given, str(file), "--force"], 3, "names no layer of this base", "made for another one")
    assert not (workplace / "samples").exists()
    given[given.index("--base") + 1] = str(tiny_bases["sdxl"])
    assert main([*given, str(file)]) == 0


def test_an_adapter_for_a_copy_in_another_precision(
    tiny_bases: dict[str, Path], workplace: Path, sdxl_adapter: Path, refused: Refused
) -> None:
    copy = shutil.copytree(tiny_bases["sdxl"], workplace / "half")
    for file in copy.rglob("*.safetensors"):
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    given = ["sample", "a cat", "--base", str(copy), "--steps", "1", "--adapter", str(sdxl_adapter)]
    refused(given, 3, "was trained on base sdxl", "another precision (fp16 instead of fp32)", "add --force")
    assert main([*given, "--force"]) == 0


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.bin", "adapter.safetensors"])
def test_a_pickle_is_refused_under_any_name(
    tiny_bases: dict[str, Path], workplace: Path, refused: Refused, name: str
) -> None:
    torch.save({"layer": torch.zeros(1)}, name)
    why = [f"{name} is a pickle: loading one can run any code", "`litp import` takes the weights out"]
    refused(["sample", "a cat", "--base", str(tiny_bases["sd1"]), "--adapter", name], 3, *why)
    refused(["inspect", name], 3, *why)


def test_wrong_arguments_of_sample(tiny_bases: dict[str, Path], workplace: Path, refused: Refused) -> None:
    given = ["sample", "a cat", "--base", str(tiny_bases["sd1"])]
    refused([*given, "--adapter", "run@strong"], 2, "'strong' behind the @ is no strength", "FILE@0.8")
    refused([*given, "--adapter", "run@0.5"], 3, "adapter file run does not exist")
    refused([*given, "--steps", "0"], 2, "at least 1 denoising step, not 0")


# ---- the run -----------------------------------------------------------------------------------------


def test_a_run_that_is_owned_already(workplace: Path, refused: Refused) -> None:
    run = RunDirectory("runs", "run").create()
    shutil.copy("run.yaml", run.config)
    before = run.config.read_bytes()
    with run.lock():
        for command in (FIT, ["export", "runs/run"]):
            refused(command, 2, f"run runs/run is owned by process {os.getpid()}", "choose another run name")
    assert run.config.read_bytes() == before and not run.command.exists()


CALLBACKS = '''
import resource
import signal

import lightning.pytorch as pl


class FullDisk(pl.Callback):
    """From step 3 on, no file can grow beyond `limit` bytes, as on a full disk."""

    def __init__(self, limit: int):
        self.limit = limit

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))


class PressControlC(pl.Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)
'''


def test_a_disk_that_fills_up_while_saving(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (workplace / "filling.py").write_text(CALLBACKS)
    # The state needs more than 4 KiB; without a logger it is the only file that is written from then on.
    fill = "[{class_path: filling.FullDisk, init_args: {limit: 4096}}]"
    command = [sys.executable, "-m", "lit_personalize", *FIT, "--trainer.callbacks", fill]
    command += ["--trainer.logger", "false", "--allow", "filling"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(workplace), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    # The save of step 4 fails as well: that is a warning, and training goes on.
    assert "checkpoint of step 4 was not written" in done.stderr and "training goes on" in done.stderr
    parts = ["checkpoint of step 6 was not written", "make room", "earlier checkpoints are intact"]
    judge(done.returncode, done.stderr, "fit", 1, *parts)
    folder = workplace / "runs" / "run" / "checkpoints"
    found = checkpoints.find_complete(folder)
    assert found is not None and found.step == 2 and not found.skipped
    assert [p.name for p in folder.glob(".*")] == []
    assert main(FIT) == 0
    assert "resumed at step 2 of 6" in caplog.text


def test_a_notice_before_the_first_step_has_its_code(
    workplace: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in NOTICES}
    try:
        listen(*NOTICES)
        signal.raise_signal(signal.SIGUSR1)
        refused(FIT, 75, "SIGUSR1", "stopped before the first step", "the same command continues")
        assert not checkpoints.published(workplace / "runs/run/checkpoints")
        # Slurm has the slower ranks ended once the first is gone: they are about to.
        assert {signal.getsignal(number) for number in NOTICES} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert main(FIT) == 0


def test_an_interrupt_saves_and_has_its_code(
    workplace: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (workplace / "pressing.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(workplace))
    press = "[{class_path: pressing.PressControlC}]"
    given = [*FIT, "--trainer.callbacks", press, "--allow", "pressing"]
    refused(given, 130, "interrupted", "saved at step 3", "the same command continues")
    assert main(FIT) == 0
    assert "resumed at step 3 of 6" in caplog.text
