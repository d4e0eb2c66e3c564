"""Options of every objective against hand formulas: min-SNR, noise offset, zero terminal SNR, ranges, optimizers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.configuration import parse
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import load_adapter
from lit_personalize.export.verify import verify
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.objectives.prior_preservation import PriorPreservation
from lit_personalize.sampling.schedulers import scheduler_of

MakeBatch = Callable[..., Batch]


def built(
    path: Path, kind: type[Denoising] = Denoising, lora: dict[str, Any] | None = None, **options: Any
) -> Denoising:
    objective = kind(str(path), [LoRA(**(lora or {"rank": 2}))], **options)
    objective.configure_model()
    return objective


def alphas(path: Path) -> list[float]:
    """ᾱ_t in double precision from a scheduler's configuration: Π (1 - β), √β linear in t."""
    told = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    count = told["num_train_timesteps"]
    low, high = told["beta_start"] ** 0.5, told["beta_end"] ** 0.5
    found, product = [], 1.0
    for t in range(count):
        product *= 1 - (low + (high - low) * t / (count - 1)) ** 2
        found.append(product)
    return found


# ---- min-SNR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
@pytest.mark.parametrize("roles", [[0, 1], [0, 0, 1, 1, 1]], ids=["pair", "several"])
def test_min_snr_weighs_every_sample_by_its_own_timestep(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, family: str, roles: list[int]
) -> None:
    """Σ_i w(t_i) l_i / n_i + λ Σ_p w(t_p) l_p / n_p; w = min(SNR, γ)/SNR of ε and min(SNR, γ)/(SNR + 1) of v."""
    objective = built(tiny_bases[family], PriorPreservation, prior_weight=0.7)
    batch = make_batch(objective.built, ["a cat", "a dog", "a toy", "a cat", "a dog"][: len(roles)], roles)
    plain = objective.loss(batch, 5).per_sample
    objective.snr_gamma = 5.0
    known = alphas(tiny_bases[family])
    expected = 0.0
    for loss, role, t in zip(plain.tolist(), roles, objective.draw_timesteps(batch, 5).tolist(), strict=True):
        snr = known[t] / (1 - known[t])
        weight = min(snr, 5.0) / (snr + 1 if family == "sd2-v" else snr)
        expected += (0.7 if role else 1.0) * weight * loss / roles.count(role)
    assert float(objective.loss(batch, 5).reduce().detach()) == pytest.approx(expected, rel=1e-4)


# ---- noise and time ----------------------------------------------------------------------------------


def test_noise_offset_is_one_draw_per_channel_in_noise_and_target(
    tiny_bases: dict[str, Path], make_batch: MakeBatch
) -> None:
    """ε + k·n with n constant over the picture, and that sum is what is to be predicted."""
    objective = built(tiny_bases["sd1"])
    base, batch = objective.built, make_batch(objective.built, ["a cat", "a dog"])
    z, t = objective.latents(batch, 2), objective.draw_timesteps(batch, 2)
    plain = objective.draw_noise(z, batch, 2)
    objective.noise_offset = 0.3
    noise = objective.draw_noise(z, batch, 2)
    shift = noise - plain
    n = shift[:, :, 0, 0] / 0.3
    torch.testing.assert_close(shift, 0.3 * n[:, :, None, None].expand_as(z), atol=1e-6, rtol=1e-4)
    assert len({round(v, 4) for v in n.flatten().tolist()}) == n.numel() and 0.3 < float(n.std()) < 2.0
    known = torch.tensor(alphas(tiny_bases["sd1"]))[t].reshape(-1, 1, 1, 1)
    z_t = known.sqrt() * z + (1 - known).sqrt() * noise
    prediction = base.predict(z_t, t, objective.conditioning(batch, 2), objective.trained)
    expected = (prediction - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(batch, 2).per_sample, expected, rtol=1e-4, atol=1e-6)


def test_timesteps_stay_in_their_range(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = built(tiny_bases["sd1"], timesteps=(990, 993))
    batch = make_batch(objective.built, ["a cat"] * 8)
    drawn = {t for step in range(10) for t in objective.draw_timesteps(batch, step).tolist()}
    assert drawn == {990, 991, 992}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (500, 100)}, "give .low, high. with low < high"),
        ({"timesteps": (-1, 100)}, "give .low, high. with low < high"),
        ({"timesteps": (0, 2000)}, "end at 2000, and the base's noise schedule at 1000"),
        ({"snr_gamma": 0.0}, "snr_gamma must be positive"),
        ({"caption_dropout": 10.0}, "a share between 0 and 1"),
        ({"zero_terminal_snr": True}, "predicts the noise.*v-prediction"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tiny_bases: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        built(tiny_bases["sd1"], **options)


# ---- zero terminal SNR -------------------------------------------------------------------------------


def test_the_last_step_is_noise_alone(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    """√ᾱ'_t = (√ᾱ_t - √ᾱ_T) √ᾱ_1 / (√ᾱ_1 - √ᾱ_T) (Lin et al., 2023, alg. 1); there v is -z."""
    objective = built(tiny_bases["sd2-v"], zero_terminal_snr=True, timesteps=(999, 1000), snr_gamma=5.0)
    schedule = objective.built.schedule
    roots = [a**0.5 for a in alphas(tiny_bases["sd2-v"])]
    expected = [((r - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for r in roots]
    torch.testing.assert_close(schedule.alphas_cumprod.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-3)
    assert float(schedule.alphas_cumprod[-1]) == 0
    z, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([999, 999])
    assert torch.equal(schedule.add_noise(z, noise, t), noise) and torch.equal(schedule.target(z, noise, t), -z)
    loss = objective.loss(make_batch(objective.built, ["a cat"]), 0)
    assert float(loss.reduce()) == 0, "SNR = 0 has min-SNR weight 0 of v"
    objective.snr_gamma = None
    assert float(objective.loss(make_batch(objective.built, ["a cat"]), 0).reduce()) > 0.1
    for name in ("ddim", "dpm", "euler"):
        scheduler = scheduler_of(objective.built, name, 4)
        assert int(scheduler.timesteps[0]) == 999, "samples begin where training ended"


def test_clients_are_told_of_zero_terminal_snr(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """In the metadata of files, and by the scheduler of a merged pipeline; both are verified in that schedule."""
    from safetensors import safe_open

    objective = built(tiny_bases["sd2-v"], zero_terminal_snr=True)
    base, (adapter,) = objective.built, objective.trained
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.add_(0.1)
    weights = adapter.export_weights()
    files = export(weights, tmp_path, base, "run", ["kohya", "pipeline"])
    verify(files, base, weights, "a cat")
    told = json.loads((tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert told["rescale_betas_zero_snr"] and told["timestep_spacing"] == "trailing"
    with safe_open(tmp_path / "run.kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_zero_terminal_snr"] == "True"
    fresh = load_base(tiny_bases["sd2-v"])
    verify(files[:1], fresh, prompt="a cat")  # as `litp verify` does
    assert not fresh.zero_terminal_snr
    load_adapter(tmp_path / "run.kohya.safetensors", fresh)
    assert fresh.zero_terminal_snr, "and so do our own samples"


# ---- held-out loss -----------------------------------------------------------------------------------


def test_held_out_loss_has_the_same_draws_at_every_step(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = built(tiny_bases["sd1"], noise_offset=0.1)
    batches = [make_batch(objective.built, ["a cat", "a dog"], seed=seed) for seed in (0, 1)]
    delivered: Any = [{k: v for k, v in vars(batch).items() if v is not None} for batch in batches]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[LightningEnvironment()],
    )  # fmt: skip
    found = []
    for draws in (0, 17):
        objective.draws = draws
        (figures,) = trainer.validate(objective, DataLoader(delivered, batch_size=None), verbose=False)
        found.append(figures["val_loss"])
        assert objective.draws == draws, "held-out samples use up no draw of the training"
    with torch.no_grad():
        expected = [float(objective.loss(batch, i).reduce()) for i, batch in enumerate(batches)]
    assert found[0] == found[1] == pytest.approx(sum(expected) / 2, rel=1e-6) and expected[0] != expected[1]


# ---- memory and optimizers ---------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{"rank": 2}, {"rank": 2, "use_dora": True}], ids=["lora", "dora"])
def test_checkpointed_activations_give_the_same_gradients(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, lora: dict[str, Any]
) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        objective = built(tiny_bases["sd1"], lora=lora, gradient_checkpointing=checkpointing)
        for step in range(2):  # two batches into one gradient
            objective.training_step(make_batch(objective.built, ["a cat"], seed=step), step).backward()
        return {n: p.grad for n, p in objective.trained[0].named_factors().items() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-4)


def _adafactor(name: str, groups: Any) -> torch.optim.Optimizer:
    if name == "torch":
        return torch.optim.Adafactor(groups, lr=1e-2)
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=None)  # it chooses its own rates


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_adafactor_trains_and_resumes(tiny_bases: dict[str, Path], make_batch: MakeBatch, name: str) -> None:
    objective = built(tiny_bases["sd1"], optimizer=functools.partial(_adafactor, name))
    optimizer = objective.configure_optimizers()
    before = objective.trained[0].snapshot()
    objective.training_step(make_batch(objective.built, ["a cat"]), 0).backward()
    optimizer.step()
    after = objective.trained[0].snapshot()
    assert all(not torch.equal(after[k], v) for k, v in before.items() if k.endswith(":B"))
    checkpoint: dict[str, Any] = {}
    objective.on_save_checkpoint(checkpoint)
    objective.check_resumable(checkpoint)


def test_a_ratio_needs_a_rate(tiny_bases: dict[str, Path]) -> None:
    adafactor = functools.partial(_adafactor, "transformers")
    with pytest.raises(UsageError, match="give the optimizer or the adapter a learning rate"):
        built(tiny_bases["sd1"], lora={"lr_ratio": 4.0}, optimizer=adafactor).configure_optimizers()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bitsandbytes.optim.AdamW8bit", "package bitsandbytes is not installed; pip install 'lit-personalize.bitsand"),
        ("prodigyopt.Prodigy", "package prodigyopt is not installed; pip install 'lit-personalize.prodigy"),
        ("no_such_package.Adam", "no_such_package.Adam is not among the classes .* add --allow no_such_package or"),
        ("torch.optim.AdamZ", "^model.optimizer: module 'torch.optim' has no attribute 'AdamZ'$"),
    ],
)
def test_a_missing_optimizer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    import sys

    for package in ("bitsandbytes", "prodigyopt"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=message):
        parse(["-c", "lora/tinyworld", "--name", "x", "--model.init_args.optimizer", f"{{class_path: {path}}}"])
