"""Every command that README.md shows is run, on tiny input: a command that the table lacks fails."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lit_personalize.backbones.tiny import write_tiny_clip
from lit_personalize.cli import quickstart
from lit_personalize.cli.main import main
from lit_personalize.report import science
from lit_personalize.run_directory import RunDirectory
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder, write_shards

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("litp", "make", "python", "pip")


@dataclass(frozen=True)
class Shown:
    """How a command of the README is run here: arguments appended to it, and files that it must leave."""

    more: str = ""
    leaves: tuple[str, ...] = ()


TINY = "--data.init_args.resolution 32 --sampling.steps 2 --trainer.max_steps 2 --trainer.log_every_n_steps 1"
TABLE = {
    "litp init --images photos --class-noun dog --base /models/stable-diffusion-v1-5 -o dog.yaml": Shown(
        "--regularization 4", ("dog.yaml",)
    ),
    "litp data sheet -c dog.yaml": Shown(leaves=("sheet.png",)),
    "litp fit -c dog.yaml": Shown(
        TINY, ("runs/photos/README.md", "runs/photos/exports/verify.json", "runs/photos/samples/grid.png")
    ),
    "litp profile step -c dog.yaml": Shown(
        "--steps 2 --data.init_args.resolution 32", ("runs/photos/profile/step.png",)
    ),
    "litp plan -c dog.yaml --memory 24": Shown("--data.init_args.resolution 32"),
    "litp slurm render -c dog.yaml": Shown(),
    "litp sweep -c dog.yaml --name rates "
    "--over model.init_args.optimizer.init_args.lr=1e-5,3e-5 --over seed=0..2": Shown("--dry-run"),
    "litp runs compare --by loss --html compare.html": Shown(leaves=("compare.html",)),
    "litp prefetch -c dog.yaml --to bundle": Shown(leaves=("bundle/run.yaml", "bundle/prefetch.json")),
    'litp sample "a <new1> dog on the beach" --base /models/stable-diffusion-v1-5 --adapter runs/photos': Shown(
        "--steps 2", ("samples/grid.png", "samples/index.html")
    ),
    "litp gallery runs -o gallery": Shown(leaves=("gallery/index.html", "gallery/photos/sample-00.png")),
    """litp data retrieve --query "photo of a dog" --shards 'laion/{00000..00331}.tar' """
    "--clip /models/clip-vit-l-14 -o reg": Shown("--n 3", ("reg/00000.tar", "reg/retrieval.json")),
    "litp fit -c custom_diffusion/sd15 -c hardware/12gb -c mine.yaml": Shown(
        f"{TINY} --trainer.accumulate_grad_batches 1", ("runs/mine/exports/verify.json",)
    ),
    "litp merge": Shown(
        "svd runs/photos --rank 1 --base /models/stable-diffusion-v1-5 -o merged", ("merged/merge.json",)
    ),
    "litp import delta.bin --base /models/stable-diffusion-v1-5 -o adapters/cat": Shown(
        leaves=("adapters/cat/learned_embeds.safetensors",)
    ),
    "litp evaluate": Shown(
        "--base /models/stable-diffusion-v1-5 --adapter runs/photos --references photos --clip clip --steps 2 "
        "--prompts 'a <new1> dog' 'a <new1> dog on the beach' --seeds 0 1 -o report.json",
        ("report.json",),
    ),
    "python benchmarks/trainer_vs_loop.py": Shown("--steps 2 --rounds 1 --base /models/stable-diffusion-v1-5"),
    "python benchmarks/retrieval.py": Shown("--captions 8 --layers 1 --pictures 2 --vectors 20000 --rounds 1"),
    "make quickstart": Shown("-n"),
    "make test": Shown("-n"),
    "make science": Shown("-n BUDGET=0m JOBS=1"),
}
MINE = """\
name: mine
model: {init_args: {base: BASE}}
data:
  init_args:
    concepts: [{path: photos, class_noun: dog, token: <new1>}]
    regularization: {shards: reg/00000.tar}
"""


def commands(text: str) -> list[str]:
    """Commands in fenced blocks (one a line) and in inline code, in order and once each."""
    found: list[tuple[int, str]] = []

    def blank(fence: re.Match[str]) -> str:
        found.extend((fence.start(), line.strip().removeprefix("$ ")) for line in fence[1].splitlines())
        return " " * len(fence[0])

    prose = re.sub(r"^```\w*\n(.*?)^```$", blank, text, flags=re.M | re.S)
    found += [(span.start(), " ".join(span[1].split())) for span in re.finditer(r"`([^`]+)`", prose)]
    ours = [line for _, line in sorted(found, key=lambda pair: pair[0]) if line.split(" ")[0] in PROGRAMS]
    return list(dict.fromkeys(ours))


def test_the_table_knows_what_the_readme_shows() -> None:
    shown = commands(README)
    assert {"make quickstart", "make test", "litp data sheet -c dog.yaml"} <= set(shown), "nothing was extracted"
    unknown = [command for command in shown if command not in TABLE]
    assert not unknown, f"say in TABLE how these run on tiny input: {unknown}"
    others = {command for command in TABLE if not command.startswith(("litp ", "python "))}
    assert others == {"make quickstart", "make test", "make science"}, "these have a test of their own"


def test_commands_are_found_in_fences_and_in_prose() -> None:
    text = "Say `litp\n  fit -c a` or `pip install x`, not `apt-get make`.\n\n```sh\n$ make\nruns/litp\n```\n`python b`"
    assert commands(text) == ["litp fit -c a", "pip install x", "make", "python b"]


def arguments_of(command: str, base: Path) -> list[str]:
    places = {"/models/stable-diffusion-v1-5": str(base), "/models/clip-vit-l-14": "clip"}
    return [places.get(part, part) for part in shlex.split(f"{command} {TABLE[command].more}")]


def test_litp_commands_run_in_their_order(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(sample_pictures(3, 1, kind="object"), tmp_path / "photos")
    for extra in [*(tmp_path / "photos").glob("*.txt"), *(tmp_path / "photos").glob("*.json")]:
        extra.unlink()
    [shard] = write_shards(sample_pictures(4, 2, kind="object"), tmp_path / "laion")
    for number in range(1, 332):
        shard.with_name(f"{number:05d}.tar").hardlink_to(shard)
    write_tiny_clip(tmp_path / "clip")
    torch.save({"unet": {}, "modifier_token": {"<new9>": torch.ones(32)}}, tmp_path / "delta.bin")
    (tmp_path / "mine.yaml").write_text(MINE.replace("BASE", str(tiny_bases["sdxl"])), encoding="utf-8")
    for command in (c for c in commands(README) if c.startswith("litp")):
        capsys.readouterr()
        code = main(arguments_of(command, tiny_bases["sd1"])[1:])
        assert code == 0, f"{command}\n{capsys.readouterr().err}"
        for place in TABLE[command].leaves:
            assert (tmp_path / place).stat().st_size, f"{command} left no {place}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"]
    config = RunDirectory("runs", "mine").config.read_text()
    assert "batch_size: 1" in config and "gradient_checkpointing: true" in config, "later files win"


@pytest.mark.parametrize("command", [c for c in commands(README) if c.startswith("python")])
def test_python_commands_run(
    tiny_bases: dict[str, Path], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments_of(command, tiny_bases["sd1"])[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    parts = ("batch 1", "batch 4") if "loop" in command else ("scan", "stream", "index")
    assert report["commit"] and all(report[part]["ratio"] > 0 for part in parts)


def called_by(command: str, venv: Path) -> list[str]:
    """The last line of a target's recipe."""
    line = [*shlex.split(f"{command} {TABLE[command].more}"), f"VENV={venv}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip().splitlines()[-1])


def test_make_test_calls_pytest(tmp_path: Path) -> None:
    expected = [f"{tmp_path}/bin/python", "-m", "pytest", "-m", "not slow"]
    assert called_by("make test", tmp_path) == expected


def test_make_science_measures_and_then_writes_the_pages(tmp_path: Path) -> None:
    words = called_by("make science", tmp_path)
    assert words[-1] == "status))" and words[words.index("-m") + 1] == "lit_personalize.report.pages"
    assert science.main(["--budget", "0m", "--jobs", "1", "--out", str(tmp_path / "cells")]) == 0
    assert not list((tmp_path / "cells").iterdir()), "no time, no cell"


def test_make_quickstart_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = called_by("make quickstart", tmp_path / "venv")
    assert program == f"{tmp_path}/venv/bin/litp"
    folder = tmp_path / "quickstart"
    config = quickstart.prepare(folder, steps=2)  # which the command keeps, as after an interrupted start
    text = config.read_text(encoding="utf-8")
    fewer = re.sub(r"(sampling: .*steps:) \d+", r"\1 2", text)
    assert fewer != text
    config.write_text(fewer, encoding="utf-8")
    assert main([*arguments, "-o", str(folder)]) == 0
    assert "with the adapter" in capsys.readouterr().out
    assert main([*arguments, "-o", str(folder), "--json"]) == 0  # which trains nothing again
    report = json.loads(capsys.readouterr().out)
    assert set(report["figures"]) == {"untouched base", "with the adapter", "real pictures"}
    assert set(report["figures"]["with the adapter"]) == {"attributes", "all attributes", "background"}
    assert report["step"] == 2 and report["pictures"] == str(folder / "compare.png")
    for place in ("compare.png", "runs/subject/README.md", "runs/subject/exports/verify.json"):
        assert (folder / place).stat().st_size, place
