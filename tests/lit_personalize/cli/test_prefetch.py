"""`litp prefetch`: what a run opens is found, checked and copied; and then no network is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_personalize import model_files
from lit_personalize.backbones.tiny import write_tiny_clip
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError

RUNNER = Path(__file__).with_name("without_network.py")


def configuration(base: str, **data: Any) -> dict[str, Any]:
    return {
        "name": "cat",
        "model": {"class_path": "PriorPreservation", "init_args": {"base": base, "adapters": [{"class_path": "LoRA"}]}},
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {
                "concepts": [{"path": "photos", "class_noun": "cat"}], "resolution": 32,
                "regularization": [{"shards": "reg/00000.tar"}], **data,
            },
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
        "sampling": {"prompts": ["a cat"], "steps": 2, "seeds": [0]},
        "slurm": {"partition": "gpu"},
    }  # fmt: skip


@pytest.fixture
def run_yaml(workplace: Path, tiny_bases: dict[str, Path]) -> Path:
    path = workplace / "run.yaml"
    path.write_text(yaml.safe_dump(configuration(str(tiny_bases["sd1"]))))
    return path


def in_hub_cache(folder: Path, cache: Path, repository: str) -> Path:
    """A model as the hub's client keeps it: blobs, and a snapshot of links to them."""
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        blob = place / "blobs" / name.replace("/", "-")
        link = place / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    return place / "snapshots" / commit


def prefetched(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["prefetch", *arguments, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_list_names_every_file(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = prefetched(capsys, "-c", "run.yaml")
    found = json.loads(Path("prefetch.json").read_text())
    assert report["missing"] == found["missing"] == [] and report["files"] == len(found["files"])
    kinds = {row["what"]: Path(row["path"]).name for row in found["files"]}
    assert set(kinds) == {"base", "concept 0", "set 0"} and kinds["set 0"] == "00000.tar"
    assert all(row["sha256"] and Path(row["path"]).stat().st_size == row["bytes"] for row in found["files"])
    assert main(["prefetch", "-c", "run.yaml"]) == 0 and "concept 0" in capsys.readouterr().out


def test_what_is_missing_is_told_with_how_to_get_it(
    run_yaml: Path, tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_bases["sdxl"], "base"))
    (base / "tokenizer_2/vocab.json").unlink()
    weights = base / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree("photos")
    whole = configuration("base", regularization=[{"shards": "reg/{00000..00001}.tar"}, {"folder": "gone"}])
    Path("run.yaml").write_text(yaml.safe_dump(whole))
    report = prefetched(capsys, "-c", "run.yaml", "--clip", "org/clip", "--to", "bundle", code=3)
    reasons = {(row["what"], row["reason"].rpartition("/")[2]) for row in report["missing"]}
    assert {what for what, _ in reasons} == {"base", "concept 0", "set 0", "set 1", "CLIP of litp evaluate"}
    told = "\n".join(f"{row['what']}: {row['reason']} - {row['fix']}" for row in report["missing"])
    assert "no tokenizer in tokenizer_2" in told and "cut short or damaged" in told
    assert "org/clip is not in the local cache of the hub - litp prefetch --fetch" in told
    assert not Path("bundle").exists(), "nothing is copied of what is not whole"
    assert main(["prefetch", "-c", "run.yaml", "--clip", "org/clip"]) == 3
    assert "how to get it" in capsys.readouterr().err
    assert json.loads(Path("prefetch.json").read_text())["missing"] == report["missing"] and len(report["missing"]) == 6


def test_models_of_a_hub_are_found_in_its_cache_and_fetched_only_when_asked(
    run_yaml: Path, tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache = tmp_path / "hub"
    kept = in_hub_cache(tiny_bases["sd1"], cache, "org/sd")
    run_yaml.write_text(yaml.safe_dump(configuration("org/sd")))
    report = prefetched(capsys, "-c", "run.yaml", "--hub-cache", str(cache), "--to", "bundle")
    copied = yaml.safe_load(Path(report["run"]).read_text())
    assert copied["model"]["init_args"]["base"] == "models/base"
    unet = Path("bundle/models/base/unet/diffusion_pytorch_model.safetensors")
    assert not unet.is_symlink() and unet.read_bytes() == (kept / "unet" / unet.name).read_bytes()
    with pytest.raises(DataError, match="org/other is not in the local cache of the hub"):
        model_files.snapshot("org/other", True, False, cache)
    with pytest.raises(DataError, match="org/other could not be fetched"):  # HF_HUB_OFFLINE is set in tests
        model_files.snapshot("org/other", True, True, cache)
    report = prefetched(capsys, "-c", "run.yaml", "--hub-cache", str(tmp_path / "empty"), "--fetch", code=3)
    assert "could not be fetched" in report["missing"][0]["reason"]


def test_patterns_leave_out_what_is_never_opened() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = """model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors tokenizer/merges.txt
        text_encoder_2/model.safetensors scheduler/scheduler_config.json vae/config.json""".split()
    others = """v1-5-pruned.safetensors unet/diffusion_pytorch_model.bin unet/model.onnx vae/x.fp16.safetensors
        safety_checker/model.safetensors unet/diffusion_pytorch_model.non_ema.safetensors""".split()
    kept = filter_repo_objects(
        [*wanted, *others], allow_patterns=model_files.PIPELINE_PATTERNS, ignore_patterns=model_files.VARIANTS
    )
    assert list(kept) == wanted


def test_a_copied_folder_is_checked_where_it_arrives(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefetched(capsys, "-c", "run.yaml", "--to", "bundle")
    before = {path: path.stat().st_mtime_ns for path in Path("bundle").rglob("*.safetensors")}
    prefetched(capsys, "-c", "run.yaml", "--to", "bundle")
    assert before == {path: path.stat().st_mtime_ns for path in Path("bundle").rglob("*.safetensors")}
    moved = Path("bundle").rename("elsewhere")
    assert prefetched(capsys, "--check", str(moved)) == {"folder": "elsewhere", "wrong": []}
    shard = moved / "data/set-0/00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    (moved / "run.yaml").write_text((moved / "run.yaml").read_text().replace("cat", "dog"))
    (moved / "models/base/model_index.json").unlink()
    wrong = prefetched(capsys, "--check", str(moved), code=3)["wrong"]
    assert [line.rpartition("/")[2].partition(" ")[0] for line in sorted(wrong)] == [
        "00000.tar", "model_index.json", "run.yaml",
    ]  # fmt: skip


def without_network(place: Path, *lines: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run lines in a process of its own, from an empty home; what it did and every try to reach the network."""
    home, notes = place / "home", place / "notes"
    home.mkdir()
    notes.write_text("")
    kept = ("PATH", "LANG", "OMP_NUM_THREADS", "TRITON_INTERPRET", "LD_LIBRARY_PATH")  # not HF_HUB_OFFLINE
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(RUNNER), str(notes), *lines]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=800)
    return done, notes.read_text()


@pytest.mark.timeout(900)  # a process that imports torch, and four verbs in it
def test_after_it_fit_sample_evaluate_and_export_need_no_network(
    run_yaml: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_clip(tmp_path / "clip")
    given = configuration("BASE", regularization=[{"generate": 2, "prompt": "a cat"}])
    given["model"]["init_args"]["base"] = yaml.safe_load(run_yaml.read_text())["model"]["init_args"]["base"]
    run_yaml.write_text(yaml.safe_dump(given))
    report = prefetched(capsys, "-c", "run.yaml", "--clip", "clip", "--to", "bundle", "--cache")
    assert report["cache"]["latents"]["encoded"] and report["cache"]["text states"] != {}
    place = tmp_path_factory.mktemp("node") / "bundle"
    shutil.move("bundle", place)
    for source in ("photos", "reg", "clip"):
        shutil.rmtree(source)
    drawn = sorted((place / "data/generated-0").rglob("*.png"))
    assert len(drawn) == 2
    done, tries = without_network(
        place,
        "litp fit -c run.yaml",
        "litp sample 'a cat' --base models/base --adapter runs/cat --steps 2",
        "litp evaluate --base models/base --adapter runs/cat --references data/concept-0 --clip models/clip-clip "
        "--prompts 'a cat' --seeds 0 1 --steps 2 -o runs/cat/evaluation.json",
        "litp export runs/cat --formats kohya peft",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not tries, tries
    for left in ("runs/cat/exports/verify.json", "samples/grid.png", "runs/cat/evaluation.json"):
        assert (place / left).stat().st_size
    assert sorted((place / "data/generated-0").rglob("*.png")) == drawn, "the base of the copy is the same base"
    config = yaml.safe_load((place / "run.yaml").read_text())
    assert config["slurm"] == {"partition": "gpu"}


@pytest.mark.parametrize(
    "program",
    [
        "import socket\\ntry: socket.create_connection(('192.0.2.1', 443), 1)\\nexcept OSError: pass",
        "import urllib.request\\ntry: urllib.request.urlopen('https://example.org')\\nexcept Exception: pass",
        "import huggingface_hub as h\\ntry: h.snapshot_download('org/sd')\\nexcept Exception: pass",
    ],
)
def test_a_try_to_reach_the_network_is_seen_also_where_it_is_caught(tmp_path: Path, program: str) -> None:
    program = program.replace("\\n", "\n")
    done, tries = without_network(tmp_path, f'python "{program}"')
    assert done.returncode == 0, done.stderr[-2000:]
    assert tries, "the test above would have passed"
