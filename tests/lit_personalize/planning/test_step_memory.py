"""What is planned for a step is what the CPU's allocator gives out in a real one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lit_personalize.adapters.full_weights import FullWeights
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.batch import Batch
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.objectives.prior_preservation import PriorPreservation
from lit_personalize.planning_memory import StepMemory, View, count_step, fake_objective, state_bytes

ADAPTERS: dict[str, Callable[[], list[Adapter]]] = {
    "lora": lambda: [LoRA(text_encoder=True)],
    "key_value": lambda: [KeyValueDelta(), TokenEmbedding("<new1>", "cat")],
    "full": lambda: [FullWeights()],
}


def objective_of(base: Path | str, adapters: str, **options: Any) -> Denoising:
    kind = PriorPreservation if adapters == "key_value" else Denoising
    return kind(str(base), ADAPTERS[adapters](), **options)


def view_of(adapters: str, side: int, batch: int) -> View:
    priors = batch if adapters == "key_value" else 0
    return View(batch, priors, (side, side), ["a photo of a <new1> cat"], 0)


def real_step(objective: Denoising, view: View) -> StepMemory:
    """The same step with values: bytes from the tensors that are there, and from the allocator's own notes."""
    objective.configure_model()
    base, count = objective.built, view.instances + view.priors
    side = view.shape[0] // base.downscale
    latents = torch.randn(count, base.latent_channels, side, side)
    batch = Batch(
        role=torch.tensor([0] * view.instances + [1] * view.priors), position=torch.arange(count),
        sample_id=["x"] * count, latent_mean=latents, latent_std=latents.abs(),
        input_ids=base.tokenize(view.captions * count),
        time_ids=torch.zeros(count, 6) if base.needs_time_ids else None,
    )  # fmt: skip
    found = StepMemory()
    for name, module in base.components().items():
        found.base[name] = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    factors = [p for adapter in objective.trained for p in adapter.factors.values()]
    found.trained = sum(p.nbytes for p in factors)
    optimizer = objective.build_optimizer()
    for _ in range(2):  # the second one has all states and all gradients
        gc.collect()  # what the first one left in cycles is not freed within the second
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            with record_function("the forward pass"):
                loss = objective.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found.optimizer = state_bytes(optimizer)
    events = watched.profiler.kineto_results.events()
    end = next(e.start_ns() + e.duration_ns() for e in events if e.name() == "the forward pass")
    now = highest = 0
    memory = [e for e in events if e.name() == "[memory]" and abs(e.nbytes()) != torch.get_rng_state().nbytes]
    for event in sorted(memory, key=lambda e: e.start_ns()):  # without the generator's states, one a checkpointed block
        now += event.nbytes()
        if event.start_ns() <= end:
            found.saved = now
        highest = max(highest, now)
    found.forward = highest + found.trained  # gradients were there before
    return found


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_bytes_are_those_of_a_real_step(
    tiny_bases: dict[str, Path], adapters: str, checkpointing: bool
) -> None:
    base = tiny_bases["sd1" if adapters == "lora" else "sdxl"]
    options = {"gradient_checkpointing": checkpointing, "dtype": "bfloat16" if adapters == "lora" else "float32"}
    compare(base, adapters, 32, 2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_bytes_on_tinyworld(adapters: str, checkpointing: bool) -> None:
    compare("tinyworld", adapters, 64, 2, gradient_checkpointing=checkpointing)


def compare(base: Path | str, adapters: str, side: int, batch: int, **options: Any) -> None:
    planned_of, view = objective_of(base, adapters, **options), view_of(adapters, side, batch)
    planned = count_step(planned_of, fake_objective(planned_of), view)
    real = real_step(objective_of(base, adapters, **options), view)
    assert planned.base == real.base
    assert planned.trained == real.trained > 0
    assert planned.optimizer == real.optimizer == pytest.approx(2 * real.trained, rel=0.01)
    assert planned.saved == pytest.approx(real.saved, rel=0.01)
    assert max(planned.forward, planned.backward) == pytest.approx(real.forward, rel=0.15)


def test_the_optimizer_is_the_configured_one(tiny_bases: dict[str, Path]) -> None:
    objective = objective_of(tiny_bases["sd1"], "full", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    assert count_step(objective, fake_objective(objective), view_of("full", 32, 1)).optimizer == 0
