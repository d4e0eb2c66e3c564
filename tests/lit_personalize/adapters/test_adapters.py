"""The adapter protocol on every family: identity at the start, exact switching, gradients, round trips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta, select_layers
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, stack, unstack
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError

MAKERS: dict[str, Callable[[], Adapter]] = {
    "lora": lambda: LoRA(rank=3, alpha=6.0, text_encoder=True),
    "key_value": lambda: KeyValueDelta(),
    "token": lambda: TokenEmbedding("<new1>", "cat", vectors=2),
}


def _ask(base: Base, adapters: list[Adapter] | None, caption: str = "a photo of a cat") -> torch.Tensor:
    z = torch.randn(1, base.latent_channels, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), base.only(adapters or []):
        return base.predict(z, torch.tensor([400]), base.condition([caption]), adapters)


def _perturb(adapter: Adapter, base: Base) -> None:
    with torch.no_grad():
        for parameter in adapter.named_factors().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapter.refresh(base.dtype)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_starts_as_the_base_and_switches_exactly(tiny_bases: dict[str, Path], family: str, kind: str) -> None:
    base = load_base(tiny_bases[family])
    before = _ask(base, None)
    adapter = MAKERS[kind]()
    adapter.attach(base)
    adapter.attach(base)  # a second call does nothing
    caption = "a photo of a <new1>" if kind == "token" else "a photo of a cat"
    start = _ask(base, [adapter], caption)
    if kind != "token":
        torch.testing.assert_close(start, before, rtol=0, atol=0)
    _perturb(adapter, base)
    changed = _ask(base, [adapter], caption)
    assert (changed - start).abs().max() > 1e-3
    torch.testing.assert_close(_ask(base, None, caption), start, rtol=0, atol=0)
    torch.testing.assert_close(_ask(base, [adapter], caption), changed, rtol=0, atol=0)
    torch.testing.assert_close(_ask(base, None), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lora", "key_value"])
def test_delta_is_what_the_layer_computes(tiny_bases: dict[str, Path], kind: str) -> None:
    base = load_base(tiny_bases["sd1"])
    adapter = MAKERS[kind]()
    adapter.attach(base)
    _perturb(adapter, base)
    layer = next(name for name in adapter.layers() if name.endswith("attn2.to_k"))
    module = base.unet.get_submodule(layer.removeprefix("unet."))
    x = torch.randn(2, 5, module.in_features)
    with torch.no_grad():
        with base.only([adapter]):
            on = module(x)
        with base.only([]):
            off = module(x)
        torch.testing.assert_close(on - off, x @ adapter.delta(layer).T, atol=1e-5, rtol=1e-4)


def test_a_second_lora_leaves_the_first_as_it_was(tiny_bases: dict[str, Path]) -> None:
    """On layers that both change, on others, and whether the first is on or off."""
    base = load_base(tiny_bases["sd1"])
    first, second = LoRA(rank=2, name="first"), LoRA(rank=3, name="second", targets=["to_k", "to_v"])
    first.attach(base)
    _perturb(first, base)
    alone = _ask(base, [first])
    second.attach(base)
    with torch.no_grad():
        torch.testing.assert_close(_ask(base, [first]), alone, rtol=0, atol=0)
        _perturb(second, base)
        layer = next(name for name in second.layers() if name.endswith("attn2.to_k"))
        module = base.unet.get_submodule(layer.removeprefix("unet."))
        x = torch.randn(2, 5, module.in_features)
        ys = []
        for active in ([], [first], [second], [first, second]):
            with base.only(active):
                ys.append(module(x))
        deltas = [x @ adapter.delta(layer).T for adapter in (first, second)]
        torch.testing.assert_close([y - ys[0] for y in ys[1:]], [*deltas, sum(deltas)], atol=1e-5, rtol=1e-4)
        first.set_active(False)
        LoRA(rank=1, name="third").attach(base)
        torch.testing.assert_close(module(x) - ys[0], deltas[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_snapshot_stack_and_export_round_trip(tiny_bases: dict[str, Path], kind: str) -> None:
    base = load_base(tiny_bases["sdxl"])
    adapter = MAKERS[kind]()
    adapter.attach(base)
    first = adapter.snapshot()
    _perturb(adapter, base)
    second = adapter.snapshot()
    assert any(not torch.equal(first[k], second[k]) for k in first)
    back = unstack(stack([first, second]))
    adapter.restore(back[0])
    assert all(torch.equal(v, first[k]) for k, v in adapter.snapshot().items())
    adapter.restore(back[1])
    weights = adapter.export_weights()
    for layer, low_rank in weights.low_rank.items():
        torch.testing.assert_close(low_rank.delta(), adapter.delta(layer).detach())
    for layer, dense in weights.dense.items():
        torch.testing.assert_close(dense, adapter.delta(layer).detach())
    if kind == "token":
        assert [r.shape for r in weights.tokens["<new1>"]] == [(2, 32), (2, 48)]
    with pytest.raises(ValueError, match="missing factors"):
        adapter.restore({})


def test_the_base_keeps_its_own_weights_and_keys(tiny_bases: dict[str, Path]) -> None:
    untouched = load_base(tiny_bases["sd1"]).unet.state_dict()
    base = load_base(tiny_bases["sd1"])
    adapter = KeyValueDelta()
    adapter.attach(base)
    _perturb(adapter, base)
    own = base.unet.state_dict()
    assert list(own) == list(untouched)
    assert all(torch.equal(own[k], v) for k, v in untouched.items())
    assert not any(p.requires_grad for p in base.parameters())


def test_token_rows_get_the_gradient_of_a_substituted_leaf(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    encoder = base.text_encoders[0]
    adapter = TokenEmbedding("<new1>", "cat")
    adapter.attach(base)
    (ids,) = base.tokenize(["a photo of a <new1> cat"])
    upstream = torch.randn(1, 77, 32)
    (base.encode_text([ids])[0] * upstream).sum().backward()
    (grad,) = (p.grad for p in adapter.named_factors().values())

    leaf = adapter.rows().detach().clone().requires_grad_()
    embedding = encoder.get_input_embeddings()
    known = ids.clamp(max=embedding.num_embeddings - 1)
    states = torch.where((ids >= embedding.num_embeddings)[..., None], leaf[0], embedding.weight[known])
    for adder in base.added_rows:
        adder.remove_hooks()
    handle = embedding.register_forward_hook(lambda *_: states)
    out = encoder(known).last_hidden_state
    handle.remove()
    (expected,) = torch.autograd.grad((out * upstream).sum(), leaf)
    assert grad is not None and grad.abs().max() > 0
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)


def test_several_vectors_expand_as_diffusers_does(tiny_bases: dict[str, Path]) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    base = load_base(tiny_bases["sd1"])
    TokenEmbedding("<new1>", "cat", vectors=3).attach(base)
    stock = TextualInversionLoaderMixin().maybe_convert_prompt("a photo of a <new1> cat", base.tokenizers[0])
    assert base.expand("a photo of a <new1> cat") == stock
    ids = base.tokenize(["a <new1>"])[0][0]
    first = base.added_rows[0].first_id
    assert [i for i in ids.tolist() if i >= first] == [first, first + 1, first + 2]


def test_sdxl_pools_at_the_end_token(tiny_bases: dict[str, Path]) -> None:
    """With an added token of a larger id the pooled state must still come from the end of the sentence."""
    base = load_base(tiny_bases["sdxl"])
    adapter = TokenEmbedding("<new1>", "cat")
    adapter.attach(base)
    encoder, ids = base.text_encoders[1], base.tokenize(["a photo of a <new1> cat"])[1]
    out = encoder(ids, output_hidden_states=True)
    end = ids[0].tolist().index(base.tokenizers[1].eos_token_id)
    expected = encoder.text_projection(out.last_hidden_state[:, end])
    torch.testing.assert_close(base.encode_text(base.tokenize(["a photo of a <new1> cat"]))[1], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenEmbedding("cat", "dog"), "already in the vocabulary"),
        (lambda: TokenEmbedding("<new1>", "catdog"), "choose a word that is one token"),
        (lambda: TokenEmbedding("two words", "cat"), "one word without spaces"),
        (lambda: LoRA(rank=0), "rank must be at least 1"),
        (lambda: LoRA(targets="everything"), "unknown LoRA targets"),
        (lambda: LoRA(targets=["no_such_layer"]), "matches no layer"),
    ],
)
def test_bad_options_are_refused(tiny_bases: dict[str, Path], make: Callable[[], Adapter], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make().attach(load_base(tiny_bases["sd1"]))


def test_lora_initialisation_is_a_function_of_the_seed_and_the_layer(tiny_bases: dict[str, Path]) -> None:
    def factors(seed: int, **options: object) -> dict[str, torch.Tensor]:
        adapter = LoRA(rank=4, **options)  # type: ignore[arg-type]
        adapter.attach(load_base(tiny_bases["sd1"]), seed)
        return adapter.snapshot()

    first, other = factors(0), factors(1)
    assert all(torch.equal(v, factors(0)[k]) for k, v in first.items())
    downs = [k for k in first if k.endswith(":A")]
    assert all(not torch.equal(first[k], other[k]) for k in downs)
    spread = torch.cat([first[k].flatten() for k in downs]).std()
    assert abs(float(spread) - 1 / 4) < 0.01  # N(0, 1/R²)
    kaiming = factors(0, init="kaiming")
    assert all(v.abs().max() <= v.shape[1] ** -0.5 for k, v in kaiming.items() if k.endswith(":A"))


def test_bf16_base_keeps_fp32_factors_and_casts_no_activation(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"], dtype="bfloat16")
    adapter = LoRA(rank=2)
    adapter.attach(base)
    _perturb(adapter, base)
    seen: list[torch.dtype] = []
    layer = next(iter(adapter._peft.values()))
    layer.lora_A["lora"].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    z = torch.randn(1, 4, 16, 16)
    base.predict(z, torch.tensor([10]), base.condition(["a cat"]), [adapter]).square().mean().backward()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter.named_factors().values())


@pytest.mark.parametrize(("family", "layers"), [("sd1", 3), ("sdxl", 5)])
def test_key_value_layers_are_found_also_behind_peft(tiny_bases: dict[str, Path], family: str, layers: int) -> None:
    base = load_base(tiny_bases[family])
    plain = list(select_layers(base.unet, "cross_kv"))
    LoRA(rank=1).attach(base)
    assert list(select_layers(base.unet, "cross_kv")) == plain
    assert len(plain) == 2 * sum(p.is_cross for p in base.processors.values()) >= 2 * layers
