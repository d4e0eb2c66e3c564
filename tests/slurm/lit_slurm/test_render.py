"""Job scripts: what they ask for, what reaches the shell, and what is refused before anything is queued."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_personalize.cli.main import main
from lit_slurm.options import OptionError, Options, options_of
from lit_slurm.render import of_task, render

HEADER = """#!/usr/bin/env bash
#SBATCH --job-name=cat
#SBATCH --export=NONE
#SBATCH --open-mode=append
#SBATCH --output=logs/%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --partition=gpu
#SBATCH --time=8:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --mail-type=FAIL
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a script in bash with stand-ins for Slurm's programs: exit code, output, what they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    call = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" >> "$CALLS"\n'
    (programs / "srun").write_text(f'{call}env > "$CALLS.env"\nexit "${{CODE:-0}}"\n')
    (programs / "scontrol").write_text(f'{call}[ "$1" = show ] && echo node-7\nexit 0\n')
    (programs / "sleep").write_text("#!/bin/sh\n")
    (programs / "module").write_text(call)
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(text: str, **variables: str) -> dict[str, Any]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        known = {"PATH": path, "CALLS": str(calls), "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node-[7-8]"}
        done = subprocess.run(["bash", "-c", text], env=known | variables, capture_output=True, text=True, timeout=60)
        environment = dict(line.split("=", 1) for line in (tmp_path / "calls.env").read_text().splitlines())
        return {"code": done.returncode, "told": done.stdout + done.stderr, "calls": calls.read_text().splitlines(),
                "env": environment}  # fmt: skip

    return run


def test_what_it_asks_for() -> None:
    options = Options(
        partition="gpu", nodes=2, gpus=4, cpus=8, memory="64G", time="8:00:00", extra=["--mail-type=FAIL"]
    )
    text = render(options, "cat", ["-c", "run.yaml", "--name", "cat"], "logs")
    assert text.startswith(HEADER)
    assert "fit --trainer.num_nodes=2 --trainer.devices=4 -c run.yaml --name cat || status=$?" in text
    assert "--no-requeue" in render(Options(requeue=False), "cat", []) and "#SBATCH --gpus" not in render(
        Options(), "cat", []
    )


def test_arguments_and_variables_reach_the_program_as_they_are(ran: Callable[..., dict[str, Any]]) -> None:
    odd = ["--name", "cat", "--sampling.prompts", '["a $HOME `id` \'cat\'"]', "--x", ""]
    setup = {"modules": ["cuda/12"], "setup": ["export B=$((1+1))"]}
    options = Options(command="litp", environment={"A": "two words; $X"}, **setup)  # type: ignore[arg-type]
    found = ran(render(options, "cat", odd))
    assert found["code"] == 0, found["told"]
    assert found["calls"][:3] == ["module", "load", "cuda/12"]
    shape = ["--trainer.num_nodes=1", "--trainer.devices=1"]
    assert found["calls"][-len(odd) - 5 :] == ["--kill-on-bad-exit=1", "litp", "fit", *shape, *odd]
    env = found["env"]
    assert (env["A"], env["B"], env["MASTER_ADDR"], env["HF_HUB_OFFLINE"]) == ("two words; $X", "2", "node-7", "1")
    assert 1024 < int(env["MASTER_PORT"]) < 65536 and env["TRITON_CACHE_DIR"].endswith("/triton")


def test_an_index_for_every_task_of_an_array(ran: Callable[..., dict[str, Any]]) -> None:
    arguments = ["--name", "cat-{task}", "--seed", "{task}"]
    text = render(Options(array="0-7%2", command="litp"), "cat-{task}", arguments)
    assert "#SBATCH --array=0-7%2" in text and "%A_%a.log" in text and "--job-name=cat\n" in text
    found = ran(text, SLURM_ARRAY_JOB_ID="11", SLURM_ARRAY_TASK_ID="3", CODE="75")
    assert found["calls"][-7:] == ["--name", "cat-3", "--seed", "3", "scontrol", "requeue", "11_3"]
    files = ["-c", "a b/{task:03}.yaml", "-c", "{task}{task:02}"]
    found = ran(render(Options(array="9", command="litp"), "cat-{task:03}", files), SLURM_ARRAY_TASK_ID="9")
    assert found["calls"][-4:] == ["-c", "a b/009.yaml", "-c", "909"] and of_task("cat-{task:03}", 9) == "cat-009"
    with pytest.raises(OptionError, match="put {task} into the run's name, such as cat-{task}"):
        render(Options(array="0-7"), "cat", ["--name", "cat"])
    with pytest.raises(OptionError, match="give slurm.array"):
        render(Options(), "cat-{task}", arguments)


@pytest.mark.parametrize(
    ("code", "restart", "again"),
    [(0, "", False), (2, "", False), (3, "", False), (4, "", False), (75, "", True), (137, "1", True), (1, "2", False)],
)
def test_queued_again_unless_another_try_would_say_the_same(
    ran: Callable[..., dict[str, Any]], code: int, restart: str, again: bool
) -> None:
    text = render(Options(restarts=2), "cat", ["--name", "cat"])
    found = ran(text, CODE=str(code), **({"SLURM_RESTART_COUNT": restart} if restart else {}))
    assert found["code"] == code
    assert (found["calls"][-3:] == ["scontrol", "requeue", "12"]) == again


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"gpu": 2}, "slurm.gpu is no option; did you mean 'gpus'"),
        ({"time": 28800}, "slurm.time must be text, not 28800: quote it"),
        ({"time": "soon"}, "slurm.time must look like"),
        ({"nodes": "2"}, "slurm.nodes must be a whole number"),
        ({"nodes": True}, "slurm.nodes must be a whole number"),
        ({"nodes": 0}, "slurm.nodes must be at least 1"),
        ({"signal": "KILL"}, "slurm.signal must be USR2, USR1 or TERM"),
        ({"array": "a-b"}, "slurm.array must look like"),
        ({"environment": {"A-B": "1"}}, "is no name of a variable"),
        ({"partition": "a\nb"}, "slurm.partition must be on one line"),
        ({"modules": "cuda"}, "slurm.modules must be a list"),
        (["gpus"], "slurm: must be a mapping"),
    ],
)
def test_says_what_is_wrong(section: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options_of(section)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/litp/slurm").mkdir(parents=True)
    profile = {"partition": "gpu", "gpus": 8, "environment": {"A": "1", "B": "1"}}
    (tmp_path / "config/litp/slurm/big.yaml").write_text(yaml.safe_dump(profile))
    (tmp_path / "run.yaml").write_text('name: cat\nslurm: {gpus: 4, time: "1:00:00", environment: {B: "2"}}\n')
    return tmp_path


def test_the_section_wins_over_the_profile_and_the_command_line_over_both(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--profile", "big", "-c", "lora/tinyworld", "-c", "run.yaml", "--trainer.max_steps", "9"]
    assert main(["slurm", "render", *given, "--slurm.time", "2:00:00", "--slurm.nodes=3"]) == 0
    text = capsys.readouterr().out
    for line in ("--partition=gpu", "--gpus-per-node=4", "--time=2:00:00", "--nodes=3"):
        assert f"#SBATCH {line}\n" in text
    assert "export A=1\nexport B=2\n" in text
    ending = f"-c lora/tinyworld -c {place}/run.yaml --trainer.max_steps 9 --name cat --root {place}/runs || status=$?"
    assert ending in text
    assert not (place / "runs").exists(), "render writes nothing"
    assert main(["slurm", "render", "--json", "-c", "run.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["script"].startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["render", "-c", "lora/tinyworld"], "the run needs a name"),
        (["render", "-c", "gone.yaml"], "no configuration file or recipe 'gone.yaml'"),
        (["render", "-c", "run.yaml", "--profile", "small"], "there is no profile .*small.yaml; profiles in .*: big"),
        (["render", "-c"], "-c needs a value"),
        (["render", "-c", "list.yaml"], "list.yaml must hold options"),
        (["render", "-c", "run.yaml", "--slurm.environment", "{A: ["], "--slurm.environment: .* is not YAML"),
        (["draw"], "there are render, submit and status"),
        (["status"], "no job was submitted for runs in runs"),
    ],
)
def test_one_message_for_what_is_missing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (place / "list.yaml").write_text("- 1\n")
    assert main(["slurm", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_queued_job_is_told_where_it_could_not_be_noted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Submitting again would start a second one. And a torn record is told by its line."""
    sbatch = place / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 42\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    record = place / "runs/slurm/cat/jobs.jsonl"
    record.mkdir(parents=True)  # cannot be opened for writing
    assert main(["slurm", "submit", "-c", "run.yaml"]) == 1
    assert "job 42 is queued, but not noted in" in capsys.readouterr().err
    record.rmdir()
    assert main(["slurm", "submit", "--json", "-c", "run.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["job"] == "42"
    with record.open("a") as file:
        file.write('{"job": "4')
    assert main(["slurm", "status"]) == 1
    assert re.search("line 2 of .*jobs.jsonl is no job: remove the line", capsys.readouterr().err)


def test_without_slurm_it_says_where_to_go(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert main(["slurm", "submit", "-c", "run.yaml"]) == 1
    assert "there is no sbatch here: run this on a login node, or `litp slurm render`" in capsys.readouterr().err


def test_a_login_node_needs_no_torch(place: Path) -> None:
    program = (
        "import sys, json; from lit_personalize.cli.main import main; main(['slurm', 'render', '-c', 'run.yaml']);"
        "print(json.dumps([name for name in ('torch', 'numpy') if name in sys.modules]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=100)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
