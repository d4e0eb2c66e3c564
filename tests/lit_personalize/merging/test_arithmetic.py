"""Every way to merge against its definition on dense fp64 matrices, and PEFT's own merges where PEFT has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.errors import DataError, UsageError
from lit_personalize.merging.arithmetic import MODES, MergeOptions, combine
from lit_personalize.merging.sources import BlockStrength, Source, tokens_of

SHAPES = {
    "unet.down_blocks.0.attn2.to_k": torch.Size([14, 20]),
    "unet.up_blocks.1.attn2.to_v": torch.Size([20, 9]),
    "unet.up_blocks.1.conv1": torch.Size([12, 5, 3, 3]),
}
LINEAR, TALL, CONV = SHAPES


def factors(shape: torch.Size, rank: int, alpha: float) -> LowRank:
    return LowRank(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def adapter(name: str, rank: int = 2, alpha: float = 3.0, strength: float = 1.0, **extra: Tensor) -> Source:
    weights = AdapterWeights({layer: factors(shape, rank, alpha) for layer, shape in SHAPES.items()}, dict(extra))
    return Source(name, weights, strength)


@pytest.fixture
def sources() -> list[Source]:
    """Three adapters of other ranks, scales and strengths; one has a dense change besides, one lacks a layer."""
    found = [adapter("a"), adapter("b", 3, 1.0, 0.7), adapter("c", 2, 2.0, -0.4)]
    found[1].weights.dense[LINEAR] = torch.randn(SHAPES[LINEAR])
    del found[2].weights.low_rank[TALL]
    return found


def exact(source: Source, layer: str) -> Tensor:
    """strength · ΔW by the plain definition."""
    total = torch.zeros(SHAPES[layer][0], SHAPES[layer][1:].numel(), dtype=torch.double)
    if layer in source.weights.low_rank:
        f = source.weights.low_rank[layer]
        total += f.alpha / f.rank * torch.einsum("or,ri->oi", f.up.flatten(1).double(), f.down.flatten(1).double())
    if layer in source.weights.dense:
        total += source.weights.dense[layer].double()
    return source.strength * total


def best(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best approximation of a rank and the share of energy it keeps, from a plain SVD."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank], float(s[:rank].square().sum() / s.square().sum())


def agree(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)  # files hold fp32


@pytest.mark.parametrize("mode", ["linear", "concat"])
def test_sums_are_exact(sources: list[Source], mode: str) -> None:
    merged = combine(mode, sources, SHAPES, MergeOptions())
    for layer in SHAPES:
        agree(merged.weights.delta(layer), sum(exact(s, layer) for s in sources))
    assert merged.energy.share == pytest.approx(1, abs=1e-12)
    if mode == "concat":
        assert merged.weights.low_rank[CONV].down.shape == (7, 5, 3, 3)
        assert merged.weights.low_rank[CONV].up.shape == (12, 7, 1, 1)
    wanted = sum(float(sum(exact(s, layer) for s in sources).square().sum()) for layer in SHAPES)
    assert merged.energy.exact == pytest.approx(wanted, rel=1e-9)


def test_a_sum_of_like_adapters_has_their_rank_and_opposite_ones_cancel() -> None:
    one = adapter("a")
    twice = combine("linear", [one, Source("same", one.weights, 0.5)], SHAPES, MergeOptions())
    assert {f.rank for f in twice.weights.low_rank.values()} == {2}
    agree(twice.weights.delta(CONV), 1.5 * exact(one, CONV))
    with pytest.raises(DataError, match="cancel"):
        combine("linear", [one, Source("opposite", one.weights, -1.0)], SHAPES, MergeOptions())


@pytest.mark.parametrize("mode", ["linear", "svd"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_smaller_rank_is_the_best_one_and_its_energy_is_told(sources: list[Source], mode: str, rank: int) -> None:
    merged = combine(mode, sources, SHAPES, MergeOptions(rank=rank))
    for layer in SHAPES:
        wanted, share = best(sum(exact(s, layer) for s in sources), rank)
        agree(merged.weights.delta(layer), wanted)
        assert merged.energy.layers[layer] == pytest.approx(share, rel=1e-9)
        assert merged.weights.low_rank[layer].rank == rank
    total = sum(float(sum(exact(s, layer) for s in sources).square().sum()) for layer in SHAPES)
    kept = sum(float(merged.weights.delta(layer).double().square().sum()) for layer in SHAPES)
    assert merged.energy.share == pytest.approx(kept / total, rel=1e-5)
    assert merged.energy.worst[1] == min(merged.energy.layers.values()) < 1


@pytest.mark.parametrize("mode", ["linear", "magmax"])
def test_energy_chooses_the_fewest_ranks(sources: list[Source], mode: str) -> None:
    merged = combine(mode, sources, SHAPES, MergeOptions(energy=0.8))
    whole = combine(mode, sources, SHAPES, MergeOptions(energy=1.0))
    for layer in SHAPES:
        rank, delta = merged.weights.low_rank[layer].rank, whole.weights.delta(layer).double()
        assert best(delta, rank)[1] >= 0.8 > (best(delta, rank - 1)[1] if rank > 1 else 0)


def test_svd_takes_the_largest_rank_and_truncates_one_adapter(sources: list[Source]) -> None:
    assert combine("svd", sources, SHAPES, MergeOptions()).weights.low_rank[CONV].rank == 3
    single = combine("svd", sources[:1], SHAPES, MergeOptions(rank=1))
    agree(single.weights.delta(LINEAR), best(exact(sources[0], LINEAR), 1)[0])


def trimmed(matrix: Tensor, density: float) -> Tensor:
    threshold = matrix.abs().flatten().sort(descending=True).values[int(density * matrix.numel()) - 1]
    return matrix * (matrix.abs() >= threshold)


def elected(tasks: list[Tensor], sign: str) -> Tensor:
    stacked = torch.stack(tasks)
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    winner = torch.where(votes >= 0, 1.0, -1.0)
    agreeing = stacked.sign() == winner
    return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_the_papers_algorithm_on_the_change(sources: list[Source], sign: str) -> None:
    merged = combine("ties", sources, SHAPES, MergeOptions(density=0.3, sign=sign, energy=1.0))
    for layer in SHAPES:
        tasks = [trimmed(exact(s, layer), 0.3) for s in sources if layer in s.weights.layers()]
        agree(merged.weights.delta(layer), elected(tasks, sign))


def test_pruned_results_are_cut_to_the_sum_of_ranks_and_say_what_that_keeps(sources: list[Source]) -> None:
    merged = combine("magnitude", sources, SHAPES, MergeOptions(density=0.5))
    wanted, share = best(sum(trimmed(exact(s, CONV), 0.5) for s in sources), 7)
    agree(merged.weights.delta(CONV), wanted)
    assert merged.energy.layers[CONV] == pytest.approx(share, rel=1e-9) and share < 1


def test_magmax_keeps_the_larger_change_of_every_element(sources: list[Source]) -> None:
    merged = combine("magmax", sources, SHAPES, MergeOptions(energy=1.0))
    for layer in SHAPES:
        tasks = torch.stack([exact(s, layer) for s in sources if layer in s.weights.layers()])
        agree(merged.weights.delta(layer), tasks.gather(0, tasks.abs().argmax(0, keepdim=True))[0])


def test_dare_keeps_a_share_rescaled_and_its_mean_is_the_sum(sources: list[Source]) -> None:
    pair = [adapter("a"), adapter("b")]
    found = []
    for seed in range(200):
        merged = combine("dare", pair, {LINEAR: SHAPES[LINEAR]}, MergeOptions(density=0.5, seed=seed, energy=1.0))
        found.append(merged.weights.delta(LINEAR))
    one, two = (exact(s, LINEAR) for s in pair)
    possible = torch.stack([torch.zeros_like(one), 2 * one, 2 * two, 2 * one + 2 * two])
    nearest = (possible - found[0]).abs().min(0)
    assert float(nearest.values.max()) < 1e-4  # each element is kept twice as large, or not
    assert set(nearest.indices.flatten().tolist()) == {0, 1, 2, 3}  # of each adapter by itself
    assert not torch.equal(found[0], found[1])
    noise = (4 * 0.25 * (one**2 + two**2)).sqrt() / 200**0.5
    assert float((torch.stack(found).double().mean(0) - one - two).abs().div(noise).max()) < 4.5
    again = combine("dare", pair, {LINEAR: SHAPES[LINEAR]}, MergeOptions(density=0.5, seed=0, energy=1.0))
    assert torch.equal(again.weights.delta(LINEAR), found[0])


def test_dare_with_election_merges_what_agrees() -> None:
    pair = [adapter("a"), adapter("b")]
    merged = combine("dare", pair, SHAPES, MergeOptions(density=0.5, elect=True, energy=1.0)).weights.delta(LINEAR)
    one, two = (2 * exact(s, LINEAR) for s in pair)
    possible = torch.stack([torch.zeros_like(one), one, two, (one + two) / 2])
    assert float((possible - merged).abs().min(0).values.max()) < 1e-4
    against = one.sign() != two.sign()
    assert float((merged - (one + two) / 2).abs()[against].min()) > 0  # opposite signs are never averaged


@pytest.mark.parametrize(
    ("mode", "theirs", "second"),
    [("ties", "ties", 1.0), ("magnitude", "magnitude_prune", -0.5), ("ties", "ties_svd", 1.0), ("svd", "svd", -0.5)],
)
def test_peft_merges_the_same(mode: str, theirs: str, second: float) -> None:
    """`LoraModel.add_weighted_adapter`: on factors; its `..._svd` on the change."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 14)), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    given = []
    for name in ("one", "two"):
        nn.init.normal_(layer.lora_B[name].weight)
        pair = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        given.append(Source(name, AdapterWeights({LINEAR: LowRank(*pair, 3.0)}), second if name == "two" else 1.0))
    density = None if mode == "svd" else 0.4
    model.add_weighted_adapter(["one", "two"], [1.0, second], "m", theirs, density=density, svd_rank=2)
    on = "factors" if theirs in ("ties", "magnitude_prune") else "change"
    options = MergeOptions(density=density, on=on, rank=None if on == "factors" else 2)
    ours = combine(mode, given, SHAPES, options)
    wanted = layer.scaling["m"] * (layer.lora_B["m"].weight @ layer.lora_A["m"].weight).detach().double()
    agree(ours.weights.delta(LINEAR), wanted)
    assert ours.weights.low_rank[LINEAR].rank == 2


def test_orthogonal_leaves_earlier_inputs_alone(sources: list[Source]) -> None:
    merged = combine("orthogonal", sources, SHAPES, MergeOptions())
    for layer in (TALL, CONV):
        expected, seen = torch.zeros(()), torch.zeros(SHAPES[layer][1:].numel(), 0).double()
        for source in (s for s in sources if layer in s.weights.layers()):
            change = exact(source, layer)
            expected = expected + change - change @ seen @ seen.T
            seen = torch.linalg.svd(torch.cat([seen.T, change]))[2][: seen.shape[1] + source.rank(layer)].T
        delta = merged.weights.delta(layer).double()
        agree(delta, expected)
        alone = torch.linalg.svd(exact(sources[0], layer))[2][:2].T
        agree(delta @ alone, exact(sources[0], layer) @ alone)  # where the first adapter acts, it acts alone
    assert merged.left is not None and merged.left[0] == 1 and 0 < merged.left[1] < 1
    both = [adapter("a"), Source("same", adapter("x").weights)]
    both[1].weights = both[0].weights
    same = combine("orthogonal", both, SHAPES, MergeOptions())
    assert same.left == pytest.approx([1, 0], abs=1e-12)
    agree(same.weights.delta(CONV), exact(both[0], CONV))


def test_protecting_less_leaves_more_room() -> None:
    wide = [Source("full", AdapterWeights(dense={TALL: torch.randn(SHAPES[TALL])})), adapter("b")]
    full, less = (combine("orthogonal", wide, SHAPES, MergeOptions(protect=share)).left for share in (1.0, 0.5))
    assert full is not None and less is not None
    alone = wide[1].factors(TALL).measured().energy
    whole = sum(wide[1].factors(layer).measured().energy for layer in SHAPES)
    assert full[1] == pytest.approx(1 - alone / whole, rel=1e-6) and less[1] > full[1]


def test_the_last_block_strength_that_fits_counts() -> None:
    source = adapter("a", strength=2.0)
    source.blocks = [BlockStrength.parse(t) for t in ("up_blocks=0.5", "up_blocks.1.conv*=0.25", "up_blocks.10=9")]
    assert [source.scale(layer) for layer in SHAPES] == [2.0, 1.0, 0.5]
    merged = combine("linear", [source, adapter("b", strength=0.0)], SHAPES, MergeOptions())
    agree(merged.weights.delta(CONV), 0.25 * exact(source, CONV))
    assert BlockStrength.parse("2:attn2=0") == BlockStrength("attn2", 0.0, 2)
    assert BlockStrength.parse("unet.mid_block=-1").adapter is None
    for text in ("up_blocks", "=1", "x=strong", "a:b=1"):
        with pytest.raises(UsageError, match="PATTERN=FACTOR"):
            BlockStrength.parse(text)


def test_tokens_come_along_and_may_not_collide() -> None:
    rows = [torch.ones(1, 4)]
    one, two = (Source(n, AdapterWeights(tokens={"<new1>": r})) for n, r in (("a", rows), ("b", [torch.zeros(1, 4)])))
    with pytest.raises(DataError, match="<new1> is in a and, with other rows, in b; rename one: --rename '2:<new1>="):
        tokens_of([one, two])
    two.weights.tokens = {"<new2>": two.weights.tokens["<new1>"]}
    assert list(tokens_of([one, two])) == ["<new1>", "<new2>"]
    two.weights.tokens = {"<new1>": [rows[0].clone()]}
    assert list(tokens_of([one, two])) == ["<new1>"]


@pytest.mark.parametrize(
    ("mode", "count", "options", "says"),
    [
        ("linear", 0, {}, "nothing to merge"),
        ("linear", 1, {}, "one adapter is nothing to merge"),
        ("linear", 2, {"rank": 0}, "rank must be at least 1, not 0"),
        ("linear", 2, {"energy": 0.0}, "energy must be a share"),
        ("svd", 2, {"rank": 1, "energy": 0.5}, "give one of them"),
        ("concat", 2, {"rank": 1}, "concat keeps every rank"),
        ("linear", 2, {"density": 0.5}, "density belongs to"),
        ("ties", 2, {"density": 0.0}, "density must be"),
        ("magmax", 2, {"on": "factors"}, "no form on factors"),
        ("ties", 2, {"sign": "loudest"}, "total or frequency"),
        ("orthogonal", 2, {"protect": 0.0}, "protect must be"),
        ("average", 2, {}, "unknown way to merge 'average'; use linear, concat"),
    ],
)
def test_what_cannot_be_is_one_sentence(mode: str, count: int, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        combine(mode, [adapter(str(i)) for i in range(count)], SHAPES, MergeOptions(**options))


def test_factors_of_other_ranks_or_none_have_no_common_elements(sources: list[Source]) -> None:
    with pytest.raises(UsageError, match="changes unet.down_blocks.0.attn2.to_k without factors"):
        combine("ties", sources[:2], SHAPES, MergeOptions(on="factors"))
    with pytest.raises(UsageError, match="has ranks 2, 3: .*--on change"):
        combine("ties", [adapter("a"), adapter("b", 3)], SHAPES, MergeOptions(on="factors"))


def test_every_mode_is_here() -> None:
    assert set(MODES) == {"linear", "concat", "svd", "ties", "dare", "magnitude", "orthogonal", "magmax"}
