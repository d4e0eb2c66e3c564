"""The command line: fast help without torch, exit codes, one clear message per mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_personalize.cli.main import VERBS, main

HEAVY = ("torch", "lightning", "diffusers", "transformers", "numpy", "PIL")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from lit_personalize.cli.main import main\n"
        "code = main(['--help']) if False else main([])\n"
        "print(time.perf_counter() - start, file=sys.stderr)\n"
        f"assert not [m for m in {HEAVY!r} if m in sys.modules], sys.modules.keys()\n"
        "sys.exit(code)"
    )
    tries = []
    for _ in range(3):
        started = time.perf_counter()
        done = _python(code)
        tries.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    assert min(tries) < 0.5, tries


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "fit"])
def test_help_of_every_verb_but_fit_imports_no_torch(verb: str) -> None:
    done = _python(
        "import sys\nfrom lit_personalize.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
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


def test_missing_files_give_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "no.safetensors")]) == 3
    assert main(["init", "--images", str(tmp_path / "no"), "--class-noun", "cat"]) == 3
    assert main(["runs", "show", str(tmp_path)]) == 3
    assert main(["export", str(tmp_path)]) == 3
    (tmp_path / "run.yaml").write_text("x")
    assert main(["init", "--images", str(tmp_path), "--class-noun", "cat", "-o", str(tmp_path / "run.yaml")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 5 and all(m.startswith("litp ") for m in messages)
