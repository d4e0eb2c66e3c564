"""Adapters of strangers: no pickle runs, no malformed header is read, no name leads out of the folder."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lit_datamodules.errors import DataError as CacheError
from lit_datamodules.tensor_store import TensorStore
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.loading import read_file
from lit_personalize.export.pickled import read_pickle
from lit_personalize.run_directory import RunDirectory

Refused = Callable[..., str]
PICKLES = {"bare": hostile.bare_pickle, "archive": hostile.torch_archive, "array": hostile.object_array}


def test_the_payload_would_run() -> None:
    """Or all else here proves nothing."""
    for run in (lambda: torch.load(io.BytesIO(hostile.torch_archive()), weights_only=False),
                lambda: pickle.loads(hostile.bare_pickle()),
                lambda: np.load(io.BytesIO(hostile.object_array()), allow_pickle=True)):  # fmt: skip
        run()
        assert hostile.ran()
        Path(hostile.RAN).unlink()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt", ".pkl", ".safetensors"])
def test_a_malicious_pickle_as_an_adapter(kind: str, ending: str) -> None:
    file = Path(f"adapter{ending}")
    file.write_bytes(PICKLES[kind]())
    for read in (read_file, read_pickle):
        with pytest.raises(DataError, match=file.name):
            read(file)


def test_a_malicious_pickle_on_the_command_line(base: Path, refused: Refused) -> None:
    Path("adapter.bin").write_bytes(hostile.torch_archive())
    for verb in (["inspect", "adapter.bin"], ["sample", "a cat", "--base", str(base), "--adapter", "adapter.bin"]):
        refused(verb, 3, "adapter.bin is a pickle: loading one can run any code; `litp import` takes the weights out")
    given = ["import", "adapter.bin", "--base", str(base), "-o", "imported"]
    refused(given, 3, "adapter.bin", "so nothing of it was loaded; have its author save the tensors alone")
    assert not Path("imported").exists()


@pytest.mark.parametrize("wrong", hostile.SAFETENSORS)
def test_a_malformed_safetensors_file(wrong: str) -> None:
    file = Path("adapter.safetensors")
    file.write_bytes(hostile.SAFETENSORS[wrong])
    with pytest.raises(DataError, match=file.name):
        read_file(file)


def test_a_header_bomb_on_the_command_line(refused: Refused) -> None:
    Path("adapter.safetensors").write_bytes(hostile.SAFETENSORS["a header of 2^60 bytes"])
    refused(["inspect", "adapter.safetensors"], 3, "adapter.safetensors is not a whole safetensors file", "too large")


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


def test_a_run_name_that_escapes(refused: Refused) -> None:
    for name in ("/x", "..", "a/b", "a\\b", "a\0b"):
        with pytest.raises(UsageError, match="must be one directory name"):
            RunDirectory("runs", name)
    refused(["fit", "-c", "lora/tinyworld", "--name", "../x"], 2, "run name '../x' must be one directory name")


def test_a_peft_folder_with_a_pickle(refused: Refused) -> None:
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    Path("peft/adapter_model.bin").write_bytes(hostile.torch_archive())
    refused(["inspect", "peft"], 3, "peft")
