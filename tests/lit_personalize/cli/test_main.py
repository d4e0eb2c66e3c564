"""The command line: fast help without torch, exit codes, one clear message per mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lit_personalize.cli import quickstart, world
from lit_personalize.cli.console import JSON_HELP
from lit_personalize.cli.main import VERBS, main

HEAVY = ("torch", "lightning", "diffusers", "transformers", "numpy", "PIL")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lit_personalize.cli.main import main\n"
        "try: code = main(['--help'])\n"
        "except SystemExit as stop: code = stop.code\n"
        f"assert not [m for m in {HEAVY!r} if m in sys.modules], sys.modules.keys()\n"
        "sys.exit(code)"
    )
    tries = []
    for _ in range(3):
        before = os.times()
        done = _python(code)
        after = os.times()
        # Of the processor: on a busy machine the clock measures other programs.
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        tries.append(spent)
        assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    assert min(tries) < 0.5, tries


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "fit"])
def test_help_of_every_verb_but_fit_imports_nothing_heavy(verb: str) -> None:
    done = _python(
        "import sys\nfrom lit_personalize.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        f"assert not [m for m in {HEAVY!r} if m in sys.modules], sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr
    assert f"litp {verb}" in done.stdout


def test_every_verb_has_a_module() -> None:
    folder = Path(main.__code__.co_filename).parent
    assert {f"{module}.py" for module, _ in VERBS.values()} <= {p.name for p in folder.glob("*.py")}


def test_an_unknown_verb_is_named_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sampel"]) == 2
    assert "did you mean 'sample'?" in capsys.readouterr().err


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] and (code == 0) == (not report["problems"])


REPORTS = [
    *([verb] for verb in VERBS if verb not in ("bank", "data", "merge", "profile", "runs", "w2w", "world")),
    *(["bank", what] for what in ("plan", "run", "status", "retry", "pack", "get")),
    *(["data", what] for what in ("check", "sheet")),
    *(["merge", what] for what in ("closed-form", "interpolate", "linear", "ziplora", "blora", "extract")),
    *(["profile", what] for what in ("compile", "kernels", "step")),
    *(["runs", what] for what in ("ls", "show", "compare")),
    ["sweep", "status"],
    *(["w2w", what] for what in ("sample", "edit", "invert", "merge", "explore")),
    *(["world", what] for what in ("render", "build", "card")),
]


@pytest.mark.parametrize("verb", REPORTS, ids=" ".join)
def test_every_verb_documents_json(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main([*verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--json" in text and JSON_HELP in text


def test_the_world_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["world", "render", "--count", "3", "--kind", "object", "--json", "-o"]
    assert main([*given, str(tmp_path / "pictures")]) == 0
    assert json.loads(capsys.readouterr().out) == {"pictures": 3, "written": [str(tmp_path / "pictures")]}
    assert main([*given, str(tmp_path / "shards"), "--shards"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == [str(tmp_path / "shards/00000.tar")]


def test_missing_files_give_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "no.safetensors")]) == 3
    assert main(["init", "--images", str(tmp_path / "no"), "--class-noun", "cat"]) == 3
    assert main(["runs", "show", str(tmp_path)]) == 3
    assert main(["export", str(tmp_path)]) == 3
    (tmp_path / "run.yaml").write_text("x")
    assert main(["init", "--images", str(tmp_path), "--class-noun", "cat", "-o", str(tmp_path / "run.yaml")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 5 and all(m.startswith("litp ") for m in messages)


def test_building_the_world_needs_no_folder() -> None:
    options = world.build_parser().parse_args(["build", "--budget", "150m"])
    assert options.output == Path("world") and options.budget == "150m"


def test_quickstart_says_that_its_steps_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quickstart.prepare(tmp_path, 7)
    assert "max_steps: 7" in config.read_text()
    quickstart.prepare(tmp_path)
    assert capsys.readouterr().err == ""
    quickstart.prepare(tmp_path, 9)
    message = capsys.readouterr().err
    assert f"--steps 9 is not used, since {config} exists" in message and message.count("\n") == 1
    assert "max_steps: 7" in config.read_text()
