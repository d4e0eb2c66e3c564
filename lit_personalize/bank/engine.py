"""The bank: G adapters x b samples in one forward and backward pass over one frozen base.

A plain loop drives it, not Lightning's Trainer: a Trainer has one step count, one data loader, one optimizer and one
end, and a bank has as many as slots; manual optimization would leave it nothing to do but to move tensors. What trains
is the objective's own `loss`, the LightningModule that `litp fit` trains: summed over slots, averaged within a slot
only. Every draw is keyed by (adapter's seed, step, sample), so an adapter is the same whatever its slot or neighbours.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from lit_kernels.patching import Operator
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.token_embedding import CLASS, RANDOM, TokenEmbedding
from lit_personalize.bank import batches
from lit_personalize.bank.job import AdapterJob, FinishedAdapter
from lit_personalize.bank.optimizer import update
from lit_personalize.bank.slots import Rates, Slot
from lit_personalize.bank.stack import FactorStack
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError, UsageError
from lit_personalize.objectives.denoising import Denoising

log = logging.getLogger(__name__)
OPERATORS: tuple[Operator, ...] = ("short_key_attention", "bank_lora", "frozen_geglu")
"""Of `lit_kernels`, where the objective uses them; text K and V of all layers in one launch know one adapter only."""


class Bank:
    """Train adapters, many at a time, each as if it were alone.

    Args:
        objective: The recipe: base, adapters (LoRA on linear layers, TokenEmbedding), optimizer (AdamW), its schedule,
            loss. Its adapters stand for one adapter of the bank; its seed is not used.
        slots: Adapters that train at once, at most.
        clip: Largest norm of an adapter's gradient, as `trainer.gradient_clip_val`; None does not clip.
        init_seed: Of the initial LoRA factors, one for all adapters, so that their numbers can be compared; a LoRA
            that has an `init_seed` of its own keeps it, and then that is the bank's.
        patience: Steps in a row that may be left out, because loss or gradient was not finite, before an adapter fails.
        device: On which to train.

    Raises:
        UsageError: An adapter or an optimizer that a bank cannot train.
    """

    def __init__(
        self,
        objective: Denoising,
        slots: int = 8,
        clip: float | None = None,
        init_seed: int = 0,
        patience: int = 5,
        device: torch.device | str = "cpu",
    ):
        if slots < 1 or patience < 1:
            raise UsageError(f"a bank's slots and patience are at least 1, not {slots} and {patience}")
        self.objective = objective
        self.most = slots
        self.clip = clip
        self.patience = patience
        self.slots: list[Slot] = []
        """Adapters in training, in the order of the rows of `stack`."""
        self.steps = 0
        """Passes made."""
        self._shape: tuple[int, ...] | None = None
        self._restored: list[dict[str, Any]] = []
        words = _build(objective, init_seed)
        own = {adapter.init_seed for adapter in objective.trained if isinstance(adapter, LoRA)}
        if len(own) > 1:
            raise UsageError(f"the LoRAs of a bank begin at one init_seed, not at {sorted(map(str, own))}")
        self.init_seed = own.pop() if own else init_seed
        objective.to(device)
        objective.fuse_kernels(OPERATORS)
        base = objective.built
        for adapter in objective.trained:
            if why := adapter.why_not_in_a_bank():
                raise UsageError(f"{adapter.name} cannot be trained in a bank: {why}; litp fit trains it alone")
        self.stack = FactorStack.of(objective.trained, torch.promote_types(base.dtype, torch.float32))
        for adapter, init in words.items():
            adapter.init = init
        Rates(objective, self.stack.options)  # refuses what is not AdamW

    # ---- running ----------------------------------------------------------------------------------

    def run(
        self, jobs: Iterable[AdapterJob], after_step: Callable[[Bank], None] | None = None
    ) -> Iterator[FinishedAdapter]:
        """Train all jobs, and yield each adapter when it is finished, or failed; its slot goes to the next job.

        Jobs are taken as slots become free. Those that were in training when a restored state was taken must be among
        them, and go on. At the end, where there are fewer jobs than slots, the bank becomes smaller.

        Args:
            after_step: Called between steps, where the state is whole; may raise to stop.
        """
        queue = self._place_restored(iter(jobs))
        yield from self.fill(queue)
        while self.slots:
            failed = self.step()
            yield from self._leave(failed, queue)
            if after_step is not None:
                after_step(self)

    def step(self) -> dict[int, str]:
        """One step of every slot.

        Returns:
            Why slots failed, by their number; they are still in their places.
        """
        failed, drawn = {}, []
        for number, slot in enumerate(self.slots):
            try:
                drawn.append(self._draw(slot))
            except Exception as error:  # noqa: BLE001 - whatever data modules raise about inputs has an exit code
                failed[number] = _reason(error)
        if failed:  # damage that was found as a picture was shown: the others make this step without those
            return failed
        self._train(drawn)
        self.steps += 1
        reasons = ((number, slot.failure(self.patience)) for number, slot in enumerate(self.slots))
        return {number: reason for number, reason in reasons if reason}

    def _draw(self, slot: Slot) -> Batch:
        batch = Batch.of(slot.data.batch_of_step(slot.step))
        self._shape = self._shape or batches.shape_of(batch)
        batches.check(slot.job, batch, self._shape)
        return batch

    def _train(self, drawn: list[Batch]) -> None:
        objective, slots = self.objective, self.slots
        batch = batches.join([slot.job for slot in slots], [slot.step for slot in slots], drawn, objective.built)
        with torch.enable_grad(), self.stack.lent() as masters:
            loss = objective.loss(batch, 0)
            losses = (loss.weights * loss.per_sample).unflatten(0, (len(slots), -1)).sum(dim=1)
            for adapter in objective.trained:
                if (penalties := adapter.penalty()) is not None:
                    losses = losses + penalties
            grads = torch.autograd.grad(losses.sum(), masters, allow_unused=True)
        losses = losses.detach()
        clips = [slot.job.clip or self.clip or float("inf") for slot in slots]
        skipped = update(self.stack, slots, grads, losses, clips)
        told = torch.stack([losses.double(), skipped.double()]).tolist()
        for slot, value, left_out in zip(slots, *told, strict=True):
            slot.advance(value, bool(left_out))

    # ---- slots ------------------------------------------------------------------------------------

    def fill(self, queue: Iterator[AdapterJob]) -> Iterator[FinishedAdapter]:
        """Begin jobs behind the last slot until the bank is full; yields those whose data cannot be read."""
        while len(self.slots) < self.most:
            failures, slot = self._next(queue)
            yield from failures
            if slot is None:
                return
            self.stack.begin(len(self.slots), slot.job.seed, slot.job.class_noun)
            self.slots.append(slot)

    def _leave(self, failed: Mapping[int, str], queue: Iterator[AdapterJob]) -> Iterator[FinishedAdapter]:
        """Take out slots that are at their end, and give their places to the next jobs."""
        left = [number for number, slot in enumerate(self.slots) if slot.done or number in failed]
        finished, empty = [], []
        for number in left:
            slot = self.slots[number]
            reason = failed.get(number, "")
            weights = None if reason else self.stack.weights(number)
            finished.append(FinishedAdapter(slot.job, weights, slot.losses, slot.skipped, reason))
            failures, following = self._next(queue)
            finished += failures
            if following is None:
                empty.append(number)
                continue
            self.slots[number] = following
            self.stack.begin(number, following.job.seed, following.job.class_noun)
        if empty:
            kept = [number for number in range(len(self.slots)) if number not in empty]
            self.slots = [self.slots[number] for number in kept]
            self.stack.keep(kept)
        yield from finished

    def _next(self, queue: Iterator[AdapterJob]) -> tuple[list[FinishedAdapter], Slot | None]:
        """The next job whose data can be read, and those before it whose data cannot."""
        failures: list[FinishedAdapter] = []
        for job in queue:
            try:
                slot = self._open(job)
                self._draw(slot)
                for adapter in self.objective.trained:
                    adapter.begin(job.seed, job.class_noun)  # a noun that it cannot begin with is found out here
                return failures, slot
            except Exception as error:  # noqa: BLE001 - see step
                failures.append(FinishedAdapter(job, None, failure=_reason(error)))
        return failures, None

    def _open(self, job: AdapterJob) -> Slot:
        return Slot(job, job.load(), Rates(self.objective, self.stack.options, job.lr, job.weight_decay))

    # ---- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All slots: factors, moments, counters, schedules. Between steps it is whole."""
        objective = self.objective
        return {
            "base_fingerprint": objective.built.fingerprint, "init_seed": self.init_seed, "options": self.options(),
            "steps": self.steps, "stack": self.stack.state_dict(), "slots": [slot.state_dict() for slot in self.slots],
        }  # fmt: skip

    def options(self) -> dict[str, Any]:
        """What decides adapters besides jobs and data."""
        return {**self.objective.options(), "clip": self.clip, "patience": self.patience}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the next `run` must be given the jobs that were in training.

        Raises:
            DataError: It is of another base, other adapters or another initial seed.
        """
        if self.slots:
            raise UsageError("a bank that trains cannot take up a state: make a new one")
        fingerprint = self.objective.built.fingerprint
        if state["base_fingerprint"] != fingerprint:
            raise DataError(
                f"the bank's checkpoint was trained on base {state['base_fingerprint']}, this one is {fingerprint}"
            )
        for name, value in {"init_seed": self.init_seed, **self.options()}.items():
            kept = state["init_seed"] if name == "init_seed" else state["options"].get(name, value)
            if kept != value:
                raise DataError(f"the bank was begun with {name} {kept!r}, not {value!r}: use it, or another folder")
        self.stack.load_state_dict(state["stack"])
        self.steps = state["steps"]
        self._restored = list(state["slots"])

    def give_up(self, ids: Iterable[str]) -> None:
        """Leave adapters to others, between two steps: those in training, and those that a restored state has."""
        gone = set(ids)
        states = [state["id"] for state in self._restored] if self._restored else [slot.job.id for slot in self.slots]
        kept = [number for number, name in enumerate(states) if name not in gone]
        if len(kept) < len(states):
            self._restored = [self._restored[number] for number in kept if self._restored]
            self.slots = [self.slots[number] for number in kept if self.slots]
            self.stack.keep(kept)

    @property
    def awaited(self) -> list[str]:
        """Ids of the jobs that a restored state waits for."""
        return [state["id"] for state in self._restored]

    def _place_restored(self, jobs: Iterator[AdapterJob]) -> Iterator[AdapterJob]:
        """Give restored slots their jobs back; gives the other jobs, in their order."""
        wanted = {state["id"]: state for state in self._restored}
        found: dict[str, Slot] = {}
        passed = []
        while len(found) < len(wanted):
            job = next(jobs, None)
            if job is None:
                missing = sorted(set(wanted) - set(found))
                raise DataError(f"the bank's checkpoint trains {', '.join(missing[:3])}, which is not among the jobs")
            if job.id not in wanted:
                passed.append(job)
                continue
            found[job.id] = self._open(job)
            found[job.id].load_state_dict(wanted[job.id])
        self.slots += [found[state["id"]] for state in self._restored]
        self._restored = []
        return itertools.chain(passed, jobs)


def _build(objective: Denoising, init_seed: int) -> dict[TokenEmbedding, str | list[str]]:
    """Load the base and attach the adapters; gives the initial words of those that wait for a class noun."""
    words: dict[TokenEmbedding, str | list[str]] = {}
    for adapter in objective.trained:
        if isinstance(adapter, LoRA) and adapter.init_seed is None:
            adapter.init_seed = init_seed
        if isinstance(adapter, TokenEmbedding) and CLASS in adapter.words():
            words[adapter] = adapter.init
            adapter.init = adapter.words(RANDOM)  # until `begin`, which every slot calls
    objective.configure_model()
    return words


def _reason(error: Exception) -> str:
    """What to say of an error of an adapter's inputs; any other error is raised again."""
    if getattr(error, "exit_code", None) is None:
        raise error
    return str(error)
