"""Losses: prior preservation's identities, masks, weights, draws, what checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError, UsageError
from lit_personalize.objectives.denoising import Denoising, masked_mean
from lit_personalize.objectives.prior_preservation import PriorPreservation
from lit_personalize.sampling.sampler import unconditional_of

MakeBatch = Callable[..., Batch]


def _built(kind: type[Denoising], path: Path, adapters: list[Adapter] | None = None, **options: object) -> Denoising:
    objective = kind(str(path), adapters or [LoRA(rank=2)], **options)  # type: ignore[arg-type]
    objective.configure_model()
    objective.configure_model()
    return objective


def _gradients(objective: Denoising, batch: Batch) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    for adapter in objective.trained:
        adapter.refresh(objective.built.dtype)
    objective.loss(batch, 0).reduce().backward()
    return {n: p.grad.clone() for a in objective.trained for n, p in a.named_factors().items() if p.grad is not None}


def _pair(objective: Denoising, make_batch: MakeBatch) -> Batch:
    captions = ["a photo of a cat", "a cat", "a photo of a dog", "a dog", "a dog"]
    return make_batch(objective.built, captions, [0, 0, 1, 1, 1])


def test_loss_is_linear_in_lambda(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    """L(λ) = L_instance + λ L_prior (Ruiz et al., eq. 2)."""
    objective = _built(PriorPreservation, tiny_bases["sd1"])
    batch = _pair(objective, make_batch)
    loss = objective.loss(batch, 0)
    for weight in (0.0, 0.5, 2.0):
        objective.prior_weight = weight  # type: ignore[assignment]
        expected = loss.per_sample[:2].mean() + weight * loss.per_sample[2:].mean()
        torch.testing.assert_close(objective.loss(batch, 0).reduce(), expected)
    assert set(loss.terms) == {"loss_instance", "loss_prior"}


def test_joint_gradient_is_the_sum_of_two_passes(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = _built(PriorPreservation, tiny_bases["sd1"], prior_weight=0.7)
    batch = _pair(objective, make_batch)
    joint = _gradients(objective, batch)
    per_sample = objective.loss(batch, 0).per_sample
    parameters = dict(objective.trained[0].named_factors())
    instance = torch.autograd.grad(per_sample[:2].mean(), list(parameters.values()), retain_graph=True)
    prior = torch.autograd.grad(per_sample[2:].mean(), list(parameters.values()))
    for name, a, b in zip(parameters, instance, prior, strict=True):
        torch.testing.assert_close(joint[name], a + 0.7 * b, atol=1e-7, rtol=1e-4)


def test_posteriors_may_stand_behind_pixels(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = _built(PriorPreservation, tiny_bases["sd1"])
    batch = _pair(objective, make_batch)
    assert batch.pixels is not None
    mean, std = objective.built.encode_pixels(batch.pixels[2:])
    mixed = replace(batch, pixels=batch.pixels[:2], latent_mean=mean, latent_std=std)
    torch.testing.assert_close(objective.loss(mixed, 3).per_sample, objective.loss(batch, 3).per_sample)


def test_samples_do_not_depend_on_their_neighbours(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = _built(Denoising, tiny_bases["sd1"])
    batch = make_batch(objective.built, ["a cat", "a dog", "a toy"])
    alone = Batch(
        role=batch.role[1:2], position=batch.position[1:2], sample_id=batch.sample_id[1:2],
        pixels=batch.pixels[1:2] if batch.pixels is not None else None,
        input_ids=tuple(i[1:2] for i in batch.input_ids or ()),
    )  # fmt: skip
    torch.testing.assert_close(
        objective.loss(alone, 4).per_sample, objective.loss(batch, 4).per_sample[1:2], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(objective.loss(alone, 5).per_sample, objective.loss(alone, 4).per_sample)


def test_masked_mean_is_the_mean_over_masked_cells_and_channels() -> None:
    error = torch.rand(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 1:3, 2:5] = 1
    mask[1] = 1
    expected = torch.stack([error[0, :, 1:3, 2:5].mean(), error[1].mean()])
    torch.testing.assert_close(masked_mean(error, mask), expected)
    torch.testing.assert_close(masked_mean(error, None), error.mean((1, 2, 3)))


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
def test_min_snr_weights_match_diffusers(tiny_bases: dict[str, Path], family: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    schedule = _built(Denoising, tiny_bases[family]).built.schedule
    t = torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler.from_pretrained(tiny_bases[family] / "scheduler"), t)
    torch.testing.assert_close(schedule.snr(t), snr, rtol=1e-4, atol=1e-6)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    expected = clipped / (snr + 1) if family == "sd2-v" else clipped / snr
    torch.testing.assert_close(schedule.min_snr_weight(t, 5.0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
def test_targets_match_diffusers(tiny_bases: dict[str, Path], family: str) -> None:
    from diffusers import DDPMScheduler

    schedule = _built(Denoising, tiny_bases[family]).built.schedule
    stock = DDPMScheduler.from_pretrained(tiny_bases[family] / "scheduler")
    z, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(z, noise, t), stock.add_noise(z, noise, t))
    expected = stock.get_velocity(z, noise, t) if family == "sd2-v" else noise
    torch.testing.assert_close(schedule.target(z, noise, t), expected)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2-v", "sdxl"])
def test_every_adapter_learns_on_every_family(tiny_bases: dict[str, Path], make_batch: MakeBatch, family: str) -> None:
    """With fixed draws a few steps lower the loss, and only adapters move."""
    adapters: list[Adapter] = [LoRA(rank=2, text_encoder=True), KeyValueDelta(), TokenEmbedding("<new1>", "cat")]
    objective = _built(PriorPreservation, tiny_bases[family], adapters, snr_gamma=5.0)
    batch = make_batch(objective.built, ["a photo of a <new1> cat", "a photo of a cat"], [0, 1])
    frozen = {k: v.clone() for k, v in objective.built.unet.state_dict().items()}
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.factors.values()], lr=1e-2)
    losses = []
    for _ in range(5):
        for adapter in adapters:
            adapter.refresh(objective.built.dtype)
        loss = objective.loss(batch, 0).reduce()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, frozen[k]) for k, v in objective.built.unet.state_dict().items())


def test_state_dict_holds_only_what_trains(tiny_bases: dict[str, Path]) -> None:
    objective = _built(Denoising, tiny_bases["sd1"], [LoRA(rank=1), TokenEmbedding("<new1>", "cat")])
    state = objective.state_dict()
    trained = sum(p.numel() for a in objective.trained for p in a.factors.values())
    assert sum(v.numel() for v in state.values()) == trained
    objective.load_state_dict(state)
    with pytest.raises(DataError, match="missing"):
        objective.load_state_dict(dict(list(state.items())[1:]))


def test_a_checkpoint_of_another_base_is_refused(tiny_bases: dict[str, Path]) -> None:
    checkpoint: dict[str, object] = {}
    _built(Denoising, tiny_bases["sd1"]).on_save_checkpoint(checkpoint)
    with pytest.raises(DataError, match="use the same base"):
        _built(Denoising, tiny_bases["sd2"]).on_load_checkpoint(checkpoint)
    with pytest.raises(UsageError, match="seed 0, not 1"):
        _built(Denoising, tiny_bases["sd1"], seed=1).on_load_checkpoint(checkpoint)


def test_caption_dropout_uses_the_empty_caption(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = _built(Denoising, tiny_bases["sd1"], caption_dropout=1.0)
    batch = make_batch(objective.built, ["a photo of a cat"])
    empty = objective.built.condition([""]).states
    torch.testing.assert_close(objective.conditioning(batch, 0).states, empty)


@pytest.mark.parametrize("trains_text", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_caption_of_sdxl_is_what_sampling_takes_for_none(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, zeros: bool, trains_text: bool
) -> None:
    adapters: list[Adapter] = [TokenEmbedding("<new1>", "cat")] if trains_text else [LoRA(rank=1)]
    objective = _built(Denoising, tiny_bases["sdxl"], adapters, caption_dropout=0.5)
    base = objective.built
    base.force_zeros_for_empty_prompt = zeros
    captions = [f"a photo of a {word}" for word in ("cat", "dog", "toy", "beach") * 2]
    told = objective.conditioning(make_batch(base, captions), 0)
    own = base.condition(captions)
    none = unconditional_of(base, "", own)
    assert bool(none.states.any()) != zeros and told.pooled is not None
    whose = [(torch.dist(told.states[i], c.states[i]) < 1e-4).item() for c in (own, none) for i in range(8)]
    kept, dropped = whose[:8], whose[8:]
    assert any(kept) and any(dropped) and kept == [not drop for drop in dropped]
    for i, drop in enumerate(dropped):
        expected = none if drop else own
        torch.testing.assert_close(told.states[i], expected.states[i])
        torch.testing.assert_close(told.pooled[i], expected.pooled[i])  # type: ignore[index]
    assert told.time_ids is not None and bool(told.time_ids.any())


def test_parameter_groups_carry_their_own_rates(tiny_bases: dict[str, Path]) -> None:
    adapters: list[Adapter] = [LoRA(rank=1), TokenEmbedding("<new1>", "cat", lr=0.5, weight_decay=0.0)]
    optimizer = _built(Denoising, tiny_bases["sd1"], adapters).configure_optimizers()
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("lora", 1e-3, 0.01),
        ("token:<new1>", 0.5, 0.0),
    ]
