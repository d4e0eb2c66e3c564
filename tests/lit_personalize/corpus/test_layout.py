"""Rows of numbers: nothing is lost, and the order is Weights2Weights'."""

import pytest
import torch

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError


def weights(rank: int = 2, alpha: float = 27.0, layers: tuple[str, ...] = ("unet.up.to_v", "unet.down.to_q")):
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws)

    return AdapterWeights(low_rank={n: LowRank(drawn(rank, 5), drawn(3, rank), alpha) for n in layers})


def test_an_adapter_comes_back_to_the_bit():
    own = weights()
    layout = Layout.of(own)
    back = layout.unflatten(layout.flatten(own))
    for layer, factors in own.low_rank.items():
        assert torch.equal(back.low_rank[layer].down, factors.down)
        assert torch.equal(back.low_rank[layer].up, factors.up)
        assert back.low_rank[layer].alpha == 27.0
    assert Layout.from_json(layout.to_json()) == layout


def test_the_order_is_that_of_sorted_peft_keys():
    layers = ("unet.up_blocks.1.attn1.to_out.0", "unet.up_blocks.1.attn1.to_q", "unet.mid_block.attn2.to_v")
    layout = Layout.of(weights(layers=layers))
    keys = [f"{s.layer}.lora_{s.part}.weight" for s in layout.slices]
    assert keys == sorted(keys)
    row = torch.arange(layout.width)
    assert torch.equal(torch.cat([view.flatten() for view in layout.views(row).values()]), row)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"rank": 1}, "rank"),
        ({"alpha": 1.0}, "alphas"),
        ({"layers": ("unet.up.to_v",)}, "changes 1 layers"),
    ],
)
def test_another_adapter_is_refused(other, why):
    with pytest.raises(DataError, match=why):
        Layout.of(weights()).flatten(weights(**other))


def test_what_is_no_lora_is_refused():
    with pytest.raises(DataError, match="tokens"):
        Layout.of(AdapterWeights(tokens={"<new1>": [torch.zeros(1, 4)]}))
