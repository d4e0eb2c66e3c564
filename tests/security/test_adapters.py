"""Adapters of strangers: no pickle runs, no malformed header is read, no name leads out of the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import torch
from safetensors.torch import save_file

from lit_datamodules.errors import DataError as CacheError
from lit_datamodules.tensor_store import TensorStore
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError
from lit_personalize.export.loading import load_adapter, read_file

Refused = Callable[..., str]
PICKLES = {"bare": hostile.bare_pickle, "archive": hostile.torch_archive, "array": hostile.object_array}


def test_the_payload_would_run() -> None:
    """Or all else here proves nothing."""
    torch.load(__import__("io").BytesIO(hostile.torch_archive()), weights_only=False)
    assert hostile.ran()
    Path(hostile.RAN).unlink()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt", ".pkl", ".safetensors"])
def test_a_malicious_pickle_as_an_adapter(base: Path, refused: Refused, kind: str, ending: str) -> None:
    file = Path(f"adapter{ending}")
    file.write_bytes(PICKLES[kind]())
    for verb in (["inspect", str(file)], ["verify", str(file), "--base", str(base)]):
        refused(verb, 3, file.name)
    message = refused(["import", str(file), "--base", str(base), "-o", "imported"], 3, file.name)
    assert "nothing of it was loaded" in message or "neither" in message or "not a whole" in message
    assert not Path("imported").exists()
    with pytest.raises(DataError, match=file.name):
        load_adapter(file, load_base(base))


@pytest.mark.parametrize("wrong", hostile.SAFETENSORS)
def test_a_malformed_safetensors_file(refused: Refused, wrong: str) -> None:
    file = Path("adapter.safetensors")
    file.write_bytes(hostile.SAFETENSORS[wrong])
    with pytest.raises(DataError, match=file.name):
        read_file(file)
    refused(["inspect", str(file)], 3, file.name)


@pytest.mark.parametrize("wrong", hostile.SAFETENSORS)
def test_a_malformed_cache_file(workplace: Path, wrong: str) -> None:
    (workplace / "cache").mkdir()
    (workplace / "cache" / "0.safetensors").write_bytes(hostile.SAFETENSORS[wrong])
    with pytest.raises(CacheError, match=r"0\.safetensors is damaged .* remove it, it is filled again"):
        store = TensorStore(workplace / "cache")
        for key in store._place:
            store.get(key)


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"lora_adapter_metadata": "[" * 200_000}, "its adapter configuration is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "its adapter configuration is not JSON"),
    ],
)
def test_metadata_of_an_adapter_that_is_no_json(refused: Refused, metadata: dict[str, str], parts: str) -> None:
    save_file({"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.ones(2, 1)}, "a.safetensors",
              metadata)  # fmt: skip
    refused(["inspect", "a.safetensors"], 3, "a.safetensors", parts)


def test_an_embedding_for_a_text_encoder_that_no_base_has(base: Path, refused: Refused) -> None:
    save_file({"<a>": torch.ones(1, 32)}, "a.safetensors", {"litp.encoder": "99", "litp.token": "<a>"})
    refused(["verify", "a.safetensors", "--base", str(base)], 3, "a.safetensors", "'99', not 0 or 1")


def test_a_token_that_is_a_path_stays_in_the_folder(base: Path) -> None:
    for number in range(2):
        token = f"../../{number}"
        save_file({token: torch.ones(1, 32)}, f"{number}.safetensors", {"litp.token": token})
    given = ["import", "0.safetensors", "1.safetensors", "--base", str(base), "-o", "imported"]
    assert main(given) == 0
    assert sorted(p.name for p in Path("imported").glob("learned*")) == [
        "learned_embeds_0.safetensors", "learned_embeds_1.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", "a\\b"])
def test_a_run_name_that_escapes(base: Path, refused: Refused, name: str) -> None:
    given = ["fit", "-c", "lora/tinyworld", "--name", name, "--model.init_args.base", str(base)]
    refused(given, 2, f"run name {name!r} must be one directory name")


def test_a_peft_folder_with_a_pickle(base: Path, refused: Refused) -> None:
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    Path("peft/adapter_model.bin").write_bytes(hostile.torch_archive())
    refused(["verify", "peft", "--base", str(base)], 3, "peft")
    refused(["inspect", "peft"], 3, "peft")
