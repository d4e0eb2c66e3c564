"""Model directories, checkpoints and runs of strangers: no code of theirs is loaded, no file of ours is shown."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from PIL import Image

from lit_kernels import table_files
from lit_personalize import checkpoints
from lit_personalize.backbones.loading import load_base
from lit_personalize.backbones.tiny import write_tiny_clip
from lit_personalize.errors import DataError
from lit_personalize.gallery.cards import card_of
from lit_personalize.metrics.features import Clip, Dino

Refused = Callable[..., str]
CODE = f"open({hostile.RAN!r}, 'w').close()\n\nclass Evil:\n    pass\n"


@pytest.fixture
def copy(base: Path, workplace: Path) -> Path:
    return Path(shutil.copytree(base, workplace / "base"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("name", "kind"), [
    ("unet", ["evil", "Evil"]), ("_class_name", ["evil", "Evil"]), ("vae", ["os", "system"]),
    ("scheduler", ["diffusers", None]), ("text_encoder", ["transformers", "pipeline"]),
])  # fmt: skip
def test_a_base_with_code_of_its_own(copy: Path, name: str, kind: Any) -> None:
    (copy / "evil.py").write_text(CODE)
    (copy / "unet" / "evil.py").write_text(CODE)
    change(copy / "model_index.json", **{name: kind})
    with pytest.raises(DataError, match=str(copy)):
        load_base(copy)


def test_a_merged_pipeline_with_code_of_its_own(base: Path, copy: Path, refused: Refused) -> None:
    (copy / "evil.py").write_text(CODE)
    change(copy / "model_index.json", _class_name=["evil", "Evil"])
    given = ["verify", str(copy), "--base", str(base)]
    refused(given, 3, "has _class_name made by ['evil', 'Evil']", "no code of a directory's own")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_base_whose_weights_are_a_pickle(copy: Path, part: str) -> None:
    for file in (copy / part).glob("*.safetensors"):
        file.unlink()
    name = "diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"
    (copy / part / name).write_bytes(hostile.torch_archive())
    with pytest.raises(DataError, match=f"{part}/{name} is a pickle, which may run code, so it is not read"):
        load_base(copy)


def test_a_single_file_that_is_a_pickle(base: Path) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        Path(name).write_bytes(hostile.torch_archive())
        with pytest.raises(DataError, match=name):
            load_base(name, config=base)


def test_a_judge_that_is_a_pickle(workplace: Path) -> None:
    clip = workplace / "clip"
    write_tiny_clip(clip)
    for file in clip.glob("*.safetensors"):
        file.unlink()
    (clip / "pytorch_model.bin").write_bytes(hostile.torch_archive())
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle, which may run code, so it is not read"):
        Clip(clip)


def test_a_judge_with_code_of_its_own(workplace: Path) -> None:
    """A terminal is not asked, either."""
    folder = workplace / "vit"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE)
    code = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    with pytest.raises(DataError, match="cannot load AutoModel from .*vit"):
        Dino(folder)


def test_a_checkpoint_that_is_a_pickle() -> None:
    """Whole by its own hashes, which whoever made it has written."""
    data = hostile.torch_archive()
    folder = checkpoints.directory(Path("checkpoints"), 2)
    folder.mkdir(parents=True)
    (folder / checkpoints.STATE).write_bytes(data)
    files = {checkpoints.STATE: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / checkpoints.MARK).write_text(json.dumps({"format": checkpoints.FORMAT, "step": 2, "files": files}))
    found = checkpoints.find_complete(Path("checkpoints"))
    assert found is not None
    with pytest.raises(DataError, match=r"state\.ckpt .*, so nothing of it was loaded"):
        checkpoints.read_state(found.path)
    (folder / checkpoints.MARK).write_text("[" * 200_000)
    assert checkpoints.find_complete(Path("checkpoints")) is None


def test_a_table_of_kernels_that_is_none() -> None:
    for content in (b"[" * 200_000, hostile.bare_pickle(), b'{"format": 1, "entries": [{"path": "os.system"}]}'):
        Path("gpu.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"gpu\.json is no table of kernels"):
            table_files.read(Path("gpu.json"))


@pytest.mark.parametrize("name", ["../../../secret.png", "link.png", "/etc/passwd"])
def test_a_run_that_shows_files_of_ours(workplace: Path, name: str) -> None:
    """A gallery copies what a run's record names."""
    Image.new("RGB", (8, 8)).save("secret.png")
    run = workplace / "runs" / "theirs"
    samples = run / "samples" / "step-00000001"
    samples.mkdir(parents=True)
    (samples / "link.png").symlink_to(workplace / "secret.png")
    (run / "config.yaml").write_text("model: {class_path: x.Denoising, init_args: {base: tinyworld}}\n")
    record = {"step": 1, "seeds": [0], "prompts": ["a"], "pictures": [name]}
    (samples / "samples.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"the picture '{name}' lies outside"):
        card_of(run)


