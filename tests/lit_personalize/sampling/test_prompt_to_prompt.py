"""Prompt-to-prompt: which tokens correspond, what the tap does to maps, and what comes of it in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_kernels.attention import AttentionProcessor
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError
from lit_personalize.sampling.heat_maps import HeatMaps, save_overlays
from lit_personalize.sampling.local_blend import LocalBlend
from lit_personalize.sampling.prompt_to_prompt import EditOptions, MapEdit, edit_latents, tapped
from lit_personalize.sampling.sampler import SamplingOptions, generate_latents, start_noise
from lit_personalize.sampling.words import Words, align, words_of

CAT, DOG = "a photo of a cat", "a photo of a dog"
OPTIONS = SamplingOptions(steps=3, guidance=3.0)
WHOLE = EditOptions(cross_share=1, self_share=1, self_side=16)


@pytest.fixture(scope="module")
def base(tiny_bases: dict[str, Path]) -> Base:
    return load_base(tiny_bases["sd1"])


def words(ids: list[int], spans: list[tuple[int, int]], size: int) -> Words:
    """A prompt with ids 2... per token, start 0, end 1 and padding 1."""
    return Words([f"w{n}" for n in range(len(spans))], spans, [0, *ids, *[1] * (size - 1 - len(ids))], 1 + len(ids))


def test_words_have_their_tokens(base: Base) -> None:
    found = words_of(base, "a photo of a qzx, beach")
    assert found.words == ["a", "photo", "of", "a", "qzx,", "beach"] and found.spans[0] == (1, 2)
    assert found.spans[4][1] - found.spans[4][0] == 4, "no word of the tokenizer: three letters and a comma"
    assert all(a[1] == b[0] for a, b in zip(found.spans, found.spans[1:], strict=False))
    assert found.end == found.spans[-1][1] and found.ids[found.end] == base.tokenizers[0].eos_token_id
    assert found.positions("A") == [1, 4] and found.positions("qzx") == [5, 6, 7, 8]
    with pytest.raises(UsageError, match="no word 'dog'; its words are a, photo"):
        found.positions("dog")
    with pytest.raises(UsageError, match="too long"):
        words_of(base, "cat " * 80)


def test_a_token_of_several_vectors_is_one_word(tiny_bases: dict[str, Path]) -> None:
    from lit_personalize.adapters.token_embedding import TokenEmbedding

    base = load_base(tiny_bases["sd1"])
    TokenEmbedding(token="<new1>", init="cat", vectors=3).attach(base)
    assert words_of(base, "a <new1> on").spans == [(1, 2), (2, 5), (5, 6)]


def test_replacement_moves_every_word_and_loses_no_attention() -> None:
    """A word of 2 tokens for one of 3, then a common word behind it, then less padding."""
    a, b = words([5, 6, 7], [(1, 3), (3, 4)], 8), words([8, 9, 10, 7], [(1, 4), (4, 5)], 8)
    found = align(a, b)
    expected = torch.zeros(8, 8)
    expected[0, 0] = expected[3, 4] = expected[4, 5] = expected[5, 6] = expected[6, 7] = expected[7, 7] = 1
    expected[1:3, 1:4] = 1 / 3
    torch.testing.assert_close(found.map, expected, rtol=0, atol=0)
    assert found.shared.eq(1).all()
    back = align(b, a)
    torch.testing.assert_close(back.map.sum(1), torch.ones(8))
    torch.testing.assert_close(back.map[7], torch.tensor([0, 0, 0, 0, 0, 0, 0.5, 0.5]))
    assert torch.equal(align(a, a).map, torch.eye(8))


def test_refinement_keeps_what_both_have() -> None:
    """ "x y z" and "x new y z": y, z and the end move by one, `new` has its own map."""
    a, b = words([5, 6, 7], [(1, 2), (2, 3), (3, 4)], 8), words([5, 9, 6, 7], [(1, 2), (2, 3), (3, 4), (4, 5)], 8)
    found = align(a, b)
    assert found.shared.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert [(int(w), int(n)) for w, n in found.map.nonzero()] == [
        (0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="as many words: 3 in 'w0 w1 w2', 4 in"):
        align(a, b, "replace")
    other = align(a, words([5, 8, 7], [(1, 2), (2, 3), (3, 4)], 8), "refine")
    assert other.shared.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def maps(rows: int, cells: int, tokens: int) -> Tensor:
    return torch.softmax(torch.randn(rows, 2, cells, tokens, dtype=torch.float64), -1)


def test_the_tap_replaces_maps_of_edits_alone(base: Base) -> None:
    size = base.tokenizers[0].model_max_length
    cross, own = AttentionProcessor("c", True), AttentionProcessor("s", False)
    editor = MapEdit(base, CAT, [DOG, CAT], EditOptions(cross_share=0.5, self_share=0.25), side=16)
    assert editor.limit == 16
    given, cells = maps(6, 16, size), maps(6, 16, 16)
    for number, (moves, keeps) in enumerate([(True, True), (True, False), (False, False), (False, False)]):
        editor.at(number, 4)
        for found, before, moved in ((editor(cross, given), given, moves), (editor(own, cells), cells, keeps)):
            if not moved:
                assert found is None
                continue
            assert found is not None and torch.equal(found[:4], before[:4]), "both branches' source and no-prompt rows"
            torch.testing.assert_close(found[4:], before[3:4].expand(2, -1, -1, -1), rtol=0, atol=0)


def test_the_tap_mixes_by_the_alignment_and_weighs(base: Base) -> None:
    """P' = (shared · P_source M + (1 - shared) P_edit) · factor, in fp64 by loops."""
    size = base.tokenizers[0].model_max_length
    edit = "a photo of a red cat"
    editor = MapEdit(base, CAT, [edit], EditOptions(weights={"red": 3.0, "a": 0.5}), side=16)
    editor.at(0, 4)
    given = maps(2, 4, size)
    found = editor(AttentionProcessor("c", True), given)
    alignment, target = align(words_of(base, CAT), words_of(base, edit)), words_of(base, edit)
    expected = given[1].clone()
    for n in range(size):
        if alignment.shared[n]:
            expected[..., n] = given[0][..., int(alignment.map[:, n].argmax())]
    for word, factor in (("red", 3.0), ("a", 0.5)):
        expected[..., target.positions(word)] *= factor
    assert found is not None
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("adapted", ["", "lora", "key_value"])
def test_an_edit_without_a_change_is_plain_sampling(tiny_bases: dict[str, Path], family: str, adapted: str) -> None:
    """With whatever adapters; and an edit with one is no such picture."""
    base = load_base(tiny_bases[family])
    adapters: list[Adapter] = {"": [], "lora": [LoRA(rank=2)], "key_value": [KeyValueDelta()]}[adapted]
    for adapter in adapters:
        adapter.attach(base)
        with torch.no_grad():
            for factor in adapter.factors.values():
                factor.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    start = start_noise(base, [4])
    drawn = edit_latents(base, CAT, [CAT, DOG], start, adapters, OPTIONS, WHOLE)
    plain = generate_latents(base, [CAT, DOG], [4, 4], adapters, OPTIONS)
    scale = plain.abs().max()
    assert (drawn[0] - plain[0]).abs().max() <= 1e-5 * scale and (drawn[1] - plain[0]).abs().max() <= 1e-5 * scale
    assert (drawn[2] - plain[1]).abs().max() > 1e-4 * scale and (drawn[2] - plain[0]).abs().max() > 1e-4 * scale
    none = edit_latents(base, CAT, [DOG], start, adapters, OPTIONS, EditOptions(cross_share=0, self_share=0))
    assert (none[1] - plain[1]).abs().max() <= 1e-5 * scale, "shares of 0 change nothing"
    if adapters:
        bare = edit_latents(base, CAT, [CAT], start, (), OPTIONS, WHOLE)
        assert (bare[0] - drawn[0]).abs().max() > 1e-3 * scale, "the adapter acts"
    assert all(p.tap is None and p.tap_limit is None for p in base.processors.values())


def test_weights(base: Base) -> None:
    """1 is nothing, another factor is another picture; an unknown word is one sentence."""
    start = start_noise(base, [4])

    def drawn(weights: dict[str, float]) -> Tensor:
        return edit_latents(base, CAT, [CAT], start, (), OPTIONS, EditOptions(weights=weights))

    same, stronger = drawn({"cat": 1.0}), drawn({"cat": 3.0})
    assert torch.equal(same[0], same[1]) and torch.equal(stronger[0], same[0])
    assert (stronger[1] - stronger[0]).abs().max() > 1e-4
    with pytest.raises(UsageError, match="no word 'dog'"):
        drawn({"dog": 2.0})


def test_maps_of_an_edit_are_the_sources_in_their_share(base: Base) -> None:
    """All maps of all steps with a share of 1, equal to those of plain sampling with one of 0."""
    found = {}
    for share in (0.0, 1.0):
        seen: list[tuple[bool, Tensor]] = []

        def record(processor: AttentionProcessor, maps: Tensor, into: list[tuple[bool, Tensor]] = seen) -> None:
            into.append((processor.is_cross, maps[-2:].clone()))

        how = EditOptions(cross_share=share, self_share=share, self_side=16)
        with_edit = MapEdit(base, CAT, [DOG], how, 16)
        with_edit.at(0, 1)
        z, told = start_noise(base, [4, 4]), base.condition([CAT, DOG])
        with torch.no_grad(), tapped(base, with_edit, record, self_limit=with_edit.limit):
            base.predict_active(z, torch.tensor([500, 500]), told)
        found[share] = [(is_cross, float((pair[1] - pair[0]).abs().max())) for is_cross, pair in seen]
    assert {is_cross for is_cross, _ in found[1.0]} == {True, False}
    assert all(difference == 0 for _, difference in found[1.0])
    assert all(difference > 0 for is_cross, difference in found[0.0] if is_cross)


def test_outside_the_words_an_edit_is_its_source() -> None:
    """To the bit, and nowhere else; the mask is that of the maps of both words, averaged over the steps."""
    base = load_base("tinyworld")  # random weights attend alike everywhere
    source, edit = "a yellow circle on a purple background", "a yellow square on a purple background"
    start, free = start_noise(base, [4]), {"cross_share": 0.0, "self_share": 0.0}
    plain = edit_latents(base, source, [edit], start, (), OPTIONS, EditOptions(**free))  # type: ignore[arg-type]
    assert not (plain[0] == plain[1]).any(), "or nothing would follow from equality"
    recorder = HeatMaps(2)
    how = EditOptions(**free, blend=["circle", "square"])  # type: ignore[arg-type]
    drawn = edit_latents(base, source, [edit], start, (), OPTIONS, how, recorder=recorder)
    assert torch.equal(drawn[0], plain[0]), "the source is drawn as ever"
    size = drawn.shape[-2:]
    maps_ = torch.nn.functional.interpolate(recorder.average(), size, mode="bilinear", align_corners=False)
    acts = [maps_[row, words_of(base, prompt).positions(word)].sum(0) for row, prompt, word in
            ((0, source, "circle"), (1, edit, "square"))]  # fmt: skip
    mask = torch.stack([each > 0.3 * each.max() for each in acts]).any(0)
    assert mask.any() and not mask.all()
    blend = LocalBlend([words_of(base, source), words_of(base, edit)], ["circle", "square"])
    blend.maps = recorder
    assert torch.equal(blend.masks(tuple(size))[0, 0], mask)
    assert torch.equal((drawn[1] == drawn[0]).all(0), ~mask)


def test_masks_follow_the_words() -> None:
    """Two cells of four above 0.3 of the largest for the source's word, another for the edit's: their union."""
    prompts = [words([5, 6], [(1, 2), (2, 3)], 6), Words(["w0", "new"], [(1, 2), (2, 3)], [0, 5, 9, 1, 1, 1], 3)]
    maps_ = torch.full((2, 1, 4, 6), 0.1, dtype=torch.float64)
    maps_[0, 0, :, 2] = torch.tensor([0.9, 0.28, 0.26, 0.0])
    maps_[1, 0, :, 2] = torch.tensor([0.0, 0.0, 0.1, 0.8])
    z = torch.randn(2, 4, 2, 2)
    for named, expected in ((["w1", "new"], [1, 1, 0, 1]), (["w1"], [1, 1, 0, 0]), (["new"], [0, 0, 0, 1])):
        blend = LocalBlend(prompts, named)
        blend(AttentionProcessor("c", True), maps_)
        mask = torch.tensor(expected, dtype=torch.bool).reshape(2, 2)
        assert torch.equal(blend.masks((2, 2))[0, 0], mask)
        mixed = blend.blend(z)
        assert torch.equal(mixed[0], z[0]) and torch.equal(mixed[1], torch.where(mask, z[1], z[0]))
    with pytest.raises(UsageError, match="no prompt has the word 'other'"):
        LocalBlend(prompts, ["w1", "other"])
    with pytest.raises(UsageError, match="'w0 w1' has none of the words"):
        LocalBlend([prompts[0], prompts[1], prompts[0]], ["new"])


@pytest.mark.parametrize(("share", "name"), [({"cross_share": 1.5}, "cross"), ({"self_share": -1}, "self")])
def test_shares_are_parts_of_the_steps(share: dict[str, float], name: str) -> None:
    with pytest.raises(UsageError, match=f"the {name} share"):
        EditOptions(**share)  # type: ignore[arg-type]


def test_heat_maps_are_probabilities(base: Base) -> None:
    """Averages over heads, layers and steps: 1 over all tokens in every cell, each row its own prompt's."""
    recorder = HeatMaps(2)
    edit_latents(base, CAT, [DOG], start_noise(base, [4]), (), OPTIONS, recorder=recorder)
    sides = sorted(recorder.sums)
    layers = sum(p.is_cross for p in base.processors.values())
    assert len(sides) >= 1 and sum(recorder.counts.values()) == layers * OPTIONS.steps
    for side in (None, *sides):
        average = recorder.average(side)
        wide = side or max(sides)
        assert average.shape == (2, base.tokenizers[0].model_max_length, wide, wide)
        torch.testing.assert_close(average.sum(1), torch.ones(2, wide, wide))
    target = words_of(base, CAT)
    of_words = recorder.of_words(0, target)
    torch.testing.assert_close(of_words[4], recorder.average()[0, 5])
    with pytest.raises(UsageError, match="no cross-attention of 7 x 7 cells"):
        recorder.average(7)


def test_heat_maps_average_over_what_they_saw() -> None:
    """Two layers of one resolution and one of another, the unconditional half left out, cells in rows."""
    recorder, cross = HeatMaps(1), AttentionProcessor("c", True)
    first, second, small = maps(2, 16, 3), maps(2, 16, 3), maps(2, 4, 3)
    for given in (first, second, small):
        recorder(cross, given)
    recorder(AttentionProcessor("s", False), maps(2, 16, 16))
    expected = ((first[1] + second[1]) / 2).mean(0).T.reshape(3, 4, 4).float()
    torch.testing.assert_close(recorder.average(4)[0], expected)
    enlarged = torch.nn.functional.interpolate(
        small[1].mean(0).T.reshape(1, 3, 2, 2).float(), (4, 4), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(recorder.average()[0], (2 * expected + enlarged[0]) / 3)


def test_overlays_show_each_word_where_it_acts(tmp_path: Path) -> None:
    spot = torch.full((2, 4, 4), 0.1)
    spot[0, 0, 0], spot[1, 3, 3] = 0.9, 0.9
    save_overlays(tmp_path / "new/heat.png", np.zeros((16, 16, 3), np.uint8), ["left", "right"], spot, "title")
    pixels = np.asarray(Image.open(tmp_path / "new/heat.png").convert("RGB")).astype(float)
    assert pixels.shape[1] > 3 * pixels.shape[0] / 2
    bright = pixels.sum(-1)
    assert bright.std() > 20
