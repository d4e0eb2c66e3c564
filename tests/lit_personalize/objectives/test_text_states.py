"""Text states from a store are those that the encoders give, and are not looked for under other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_datamodules.tensor_store import TensorStore
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.objectives.text_states import TextStates

CAPTIONS = ["a cat", "a dog on the beach", "a cat", ""]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_states_of_a_store_are_those_of_the_encoders(
    tiny_bases: dict[str, Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_bases[family]))
    ids = base.tokenize(CAPTIONS)
    plain, pooled = TextStates().of(base, ids)
    assert TextStates().keep(base, CAPTIONS, TensorStore(tmp_path)) == (1, 3)
    again = load_base(str(tiny_bases[family]))
    states = TextStates()
    assert states.keep(again, CAPTIONS, TensorStore(tmp_path)) == (4, 0)

    def touched(*_: object) -> None:
        raise AssertionError("the text encoders ran")

    monkeypatch.setattr(type(again), "encode_text", touched)
    found, found_pooled = states.of(again, ids)
    assert torch.equal(found, plain) and (pooled is None) == (found_pooled is None)
    assert pooled is None or (found_pooled is not None and torch.equal(found_pooled, pooled))


def test_other_weights_have_other_states(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(tiny_bases["sd1"]))
    assert TextStates().keep(base, CAPTIONS, TensorStore(tmp_path)) == (1, 3)
    other = load_base(str(tiny_bases["sd1"]))
    with torch.no_grad():
        next(other.text_encoders[0].parameters())[0, 0] += 1e-3
    assert TextStates().keep(other, CAPTIONS, TensorStore(tmp_path)) == (1, 3)


def test_what_trains_the_text_side_keeps_no_states(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    objective = Denoising(str(tiny_bases["sd1"]), [TokenEmbedding("<new1>", "cat"), LoRA(rank=2)])
    objective.configure_model()
    with pytest.raises(UsageError, match="an adapter trains the text side"):
        objective.keep_states(CAPTIONS, TensorStore(tmp_path))
