"""`litp fit` as two processes: what each rank is shown, killed and continued, and with another number of ranks."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lit_datamodules.manifest import sha256_of
from lit_datamodules.personalization import Concept, PersonalizationData, Regularization
from lit_datamodules.shard_writer import MANIFEST
from lit_datamodules.shard_writer import write_shards as write_hashed_shards
from lit_datamodules.tar_index import index_tar
from lit_personalize import checkpoints
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import Pictures, sample_pictures, write_shards

ROOT = Path(__file__).parents[3]
HOLDERS = ["", "kernels", "datamodules", "callbacks", "slurm"]
PICTURES = 11
STEPS, SAVED, KILLED = 6, 3, 4
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WORKERS = ("--data.init_args.num_workers", "2")
BARE = ("--sampling.prompts", "[]", "--export.verify", "false")


def config(base: Path) -> dict[str, Any]:
    """Custom Diffusion on a folder and a streamed set, one of each per rank and step."""
    token = {"token": "<new1>", "init": "CLASS", "lr": 0.02}
    return {
        "model": {
            "class_path": "PriorPreservation",
            "init_args": {
                "base": str(base),
                "adapters": [{"class_path": "KeyValueDelta"}, {"class_path": "TokenEmbedding", "init_args": token}],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {
                "concepts": [{"path": "photos", "class_noun": "cat", "token": "<new1>"}],
                "regularization": {"shards": "stream/*.tar", "stream": True},
                "resolution": 32, "batch_size": 1, "augmentation": "custom_diffusion",
            },
        },
        "sampling": {"steps": 1, "prompts": ["a <new1> cat"], "seeds": [0]},
        "checkpoint": {"every": SAVED},
        "export": {"formats": ["diffusers"]},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1},
    }  # fmt: skip


def start(launcher: tuple[str, ...], *arguments: str) -> tuple[int, str, str]:
    """Run a command line in a session of its own, all of which ends with it; exit code, stdout, stderr."""
    own = [str(ROOT / holder) for holder in HOLDERS] + [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {"PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": "1", "LITP_ALLOW": "seen_samples"}
    given = [sys.executable, *launcher, "-m", "lit_personalize", "fit", "-c", "run.yaml", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(given, env=env, text=True, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            out, err = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def fit(launcher: tuple[str, ...], name: str, *more: str, kill_at: int = -1) -> tuple[int, str, str]:
    """Start, or go on with, the run of a name on two ranks."""
    seen = {"class_path": "seen_samples.SeenSamples", "init_args": {"folder": f"seen/{name}", "kill_at": kill_at}}
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.callbacks", json.dumps([seen]))
    return start(launcher, "--name", name, *ranks, *more)


def seen(name: str, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"seen/{name}/rank-{rank}.jsonl").read_text().splitlines()]


def of_role(lines: list[dict[str, Any]], role: int) -> list[str]:
    """Sample ids of one role in the order of their places, over all ranks."""
    places = [(x["step"], p, i) for x in lines for p, i, r in zip(x["position"], x["ids"], x["role"], strict=True)
              if r == role]  # fmt: skip
    return [name for _, _, name in sorted(places)]


def state(name: str, step: int = STEPS) -> dict[str, Any]:
    return checkpoints.read_state(checkpoints.directory(Path("runs", name, "checkpoints"), step))


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their place in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {n: t for key, item in items for n, t in tensors(item, f"{name}/{key}").items()}


def write_hashed(pictures: Pictures, folder: Path) -> Path:
    """One shard of PNG files whose json states their sha256, so that any flipped byte is found."""
    rows = []
    for pixels in pictures.pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        about = json.dumps({"file_sha256": sha256_of(buffer.getvalue())}).encode()
        rows.append({"png": buffer.getvalue(), "txt": b"a picture", "json": about})
    write_hashed_shards(rows, folder, per_shard=PICTURES)
    (folder / MANIFEST).unlink()  # with it, damage would be found before the first step
    return folder / "00000.tar"


@pytest.fixture
def place(tiny_bases: dict[str, Path], workplace: Path) -> Path:
    write_shards(sample_pictures(PICTURES, 3, kind="object"), workplace / "stream", per_shard=4)
    (workplace / "run.yaml").write_text(yaml.safe_dump(config(tiny_bases["sd1"])), encoding="utf-8")
    return workplace


@pytest.mark.timeout(900)
def test_two_ranks_killed_and_continued(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both launchers, with and without loader workers: the same samples, the same weights, one writer."""
    code, out, err = fit((), "whole", "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == STEPS, "one rank reports"
    run = place / "runs/whole"
    assert len((run / "command.txt").read_text().splitlines()) == 1 and (run / "exports/verify.json").is_file()
    assert [row.split(",")[-1] for row in (run / "metrics.csv").read_text().splitlines()[1:]] == list("012345")
    ranks = [seen("whole", 0), seen("whole", 1)]
    for both in zip(*ranks, strict=True):
        assert sorted(p for x in both for p in x["position"]) == [0, 1, 2, 3], "each position once"
        assert all(x["role"] == [0, 1] for x in both), "a pair stays on one rank"
        assert len({x["step"] for x in both}) == 1
    shown = of_role(ranks[0] + ranks[1], 1)
    assert len(shown) == 2 * STEPS and Counter(shown[:PICTURES]).most_common(1)[0][1] == 1, "an epoch has each once"

    code, _, err = fit(TORCHRUN, "broken", *WORKERS, *BARE, kill_at=KILLED)
    assert code not in (0, None) and (place / "seen/broken/killed").exists(), err
    assert checkpoints.find_complete(place / "runs/broken/checkpoints").step == SAVED  # type: ignore[union-attr]
    shutil.copytree("runs/broken", "runs/fewer")
    for rank in (0, 1):
        Path(f"seen/broken/rank-{rank}.jsonl").rename(f"seen/broken/first-{rank}.jsonl")
    code, _, err = fit(TORCHRUN, "broken", *WORKERS, *BARE, kill_at=KILLED)
    assert code == 0, err
    for rank in (0, 1):
        assert seen("broken", rank) == ranks[rank][SAVED:], "on at the very next sample"
        first = [json.loads(x) for x in Path(f"seen/broken/first-{rank}.jsonl").read_text().splitlines()]
        assert first == ranks[rank][: len(first)] and len(first) >= KILLED
    one, two = tensors(state("whole")), tensors(state("broken"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)

    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # `seen_samples`, in this process
    note = json.dumps([{"class_path": "seen_samples.SeenSamples", "init_args": {"folder": "seen/fewer"}}])
    alone = ["fit", "-c", "run.yaml", "--name", "fewer", "--trainer.devices", "1", "--trainer.callbacks", note,
             "--trainer.max_steps", str(SAVED + 5), "--allow", "seen_samples", *BARE]  # fmt: skip
    capsys.readouterr()
    assert main(alone) == 2
    refused = "the checkpoint is of a training on 2 ranks, this is one on 1"
    assert refused in (said := capsys.readouterr().err) and "data.elastic" in said
    assert main([*alone, "--data.init_args.elastic", "true"]) == 0
    before = [x for rank in ranks for x in rank if x["step"] < SAVED]
    whole = of_role(before, 1) + of_role(seen("fewer", 0), 1)
    assert sorted(whole) == sorted(set(shown[:PICTURES])), "6 places on two ranks, 5 on one: each picture once"


def test_an_error_of_one_rank_is_that_of_the_command(place: Path) -> None:
    """A streamed picture, which rank 1 is the first to be shown, turns out to be damaged."""
    shards = write_hashed(sample_pictures(PICTURES, 3, kind="object"), place / "stream")
    sets = Regularization(shards=str(shards), stream=True)
    data = PersonalizationData([Concept("photos", "cat", "<new1>")], 32, sets, augmentation="custom_diffusion")
    data.setup("fit")
    name = data.samples[data.order.batch(2, rank=1, world_size=2)[1].sample].name
    entry = next(e for e in index_tar(shards).entries if name.endswith(f":{e.key}"))
    with shards.open("r+b") as file:
        file.seek(entry.members["png"].offset + entry.members["png"].size // 2)
        file.write(b"damage")
    code, out, err = fit((), "damaged", "--data.init_args.regularization.shards", str(shards), *BARE)
    assert code == 3, err
    assert "litp fit: 1 input cannot be used" in err and entry.key in err and "is damaged: its sha256" in err
    assert "Traceback" not in err and not out
