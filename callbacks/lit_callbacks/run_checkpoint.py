"""Publish checkpoints at optimizer-step boundaries: every so many steps, at the end, and where a signal asks for it."""

from __future__ import annotations

import errno
import logging
import math
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lit_callbacks.direct_checkpoint_io import DirectCheckpointIO
from lit_personalize import atomic, checkpoints, stop_signals
from lit_personalize.errors import UsageError
from lit_personalize.sharding import local

log = logging.getLogger(__name__)


class RunCheckpoint(Callback):
    """Keep the run resumable.

    A full disk costs a message and the next try comes `every` steps later; only at the end of training it is an
    error. State that is not finite is never published. Ctrl-C (once) and a cluster's notice (`stop_signals`), given to
    any rank, have all ranks save at the next step boundary and end.

    Args:
        folder: `checkpoints/` of the run.
        every: Optimizer steps between two checkpoints.
        keep_last: Newest checkpoints that stay.
        best_metric: Metric whose best checkpoint stays too, named by the file `best`; log it every `every` steps.
        mode: Whether the best is the lowest or the highest.
    """

    def __init__(
        self,
        folder: Path | str,
        every: int = 250,
        keep_last: int = 3,
        best_metric: str | None = None,
        mode: Literal["min", "max"] = "max",
    ):
        if every < 1 or keep_last < 1:
            raise UsageError(f"every and keep_last must be at least 1, not {every} and {keep_last}")
        if mode not in ("min", "max"):
            raise UsageError(f"mode must be min or max, not {mode!r}")
        self.folder = Path(folder)
        self.every = every
        self.keep_last = keep_last
        self.best_metric = best_metric
        self.mode = mode
        self.best: dict[str, Any] | None = None
        self.interrupted = False
        """Whether training was ended by a signal, after saving."""
        self.preempted = ""
        """The notice that did it; empty for Ctrl-C."""
        self.last_saved: int | None = None
        """Step of the newest checkpoint that this process published or resumed from."""
        self._boundary = 0
        self._give_back: Callable[[], None] = lambda: None
        self._closed: tuple[int, dict[str, Any]] | None = None  # a step that ended an epoch, and the loops' state

    # ---- hooks ------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Run after all other callbacks, so that their state is that of the finished step."""
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to train beside newer checkpoints, and listen for Ctrl-C."""
        self._boundary = trainer.global_step
        self.interrupted, self.preempted = False, ""
        if trainer.is_global_zero:
            checkpoints.clear_leftovers(self.folder)
        found = checkpoints.find_complete(self.folder)
        if found is not None and found.step > trainer.global_step:
            raise UsageError(
                f"{self.folder} holds a checkpoint of step {found.step}, but this training starts at step "
                f"{trainer.global_step}: resume from {found.path.name} or choose another run name"
            )
        self.last_saved = found.step if found is not None and found.step == trainer.global_step else None
        # After Lightning's own handler of TERM, which talks to other ranks in the midst of a step.
        stop_signals.noted.interrupt = False  # a Ctrl-C of an earlier training in this process; a notice still holds
        self._give_back = stop_signals.listen(signal.SIGINT, *stop_signals.NOTICES)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the optimizer has just stepped and a save is due or asked for."""
        if trainer.global_step == self._boundary:
            return  # gradients are still being accumulated
        self._boundary = step = trainer.global_step
        noted = stop_signals.noted
        stop = self._agree(trainer, noted.interrupt or noted.notice is not None)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer)
        if stop:
            if self._agree(trainer, noted.notice is not None):
                self.preempted = noted.notice.name if noted.notice is not None else "another rank's notice"
            self.interrupted = True
            noted.clear()
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the loops before the next epoch is prepared."""
        self._closed = trainer.global_step, deepcopy(trainer.fit_loop.state_dict())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step if it is not saved yet; here a full disk is an error."""
        self._give_back()
        if self.last_saved != trainer.global_step:
            self.save(trainer, final=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the loops as at the step boundary, also when the epoch has been closed since.

        Lightning gives a loader its position back only from a state taken inside an epoch. And after a resume at
        the end of an epoch it counts the next one as not begun: a state stored then would train one too many.
        """
        if self._closed is not None and self._closed[0] == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = loops = deepcopy(self._closed[1])
            for when in ("total", "current"):  # what Lightning has counted between the boundary and the hook
                loops["epoch_loop.batch_progress"][when]["completed"] -= 1
                epochs = loops["epoch_progress"][when]
                done = epochs["processed"] - 1
                epochs.update(ready=done + 1, started=done + 1, processed=done, completed=done)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; an exception inside a step leaves nothing that could be saved."""
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    # ---- saving -----------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer, final: bool = False) -> Path | None:
        """Publish the present state on all ranks together; None if that was not possible.

        Raises:
            PublishError: The disk is full and `final` is set.
        """
        step = trainer.global_step
        if step == self.last_saved:
            return checkpoints.directory(self.folder, step)
        if not self._agree(trainer, is_finite(trainer), unanimous=True):
            log.error("step %d: adapters or optimizer state are not finite, no checkpoint is written", step)
            return None
        best_before = self.best
        self._note_best(trainer)
        try:
            path = self._publish(trainer, step)
        except checkpoints.PublishError as error:
            self.best = best_before
            if final:
                raise
            log.error("%s; training goes on, next try in %d steps", error, self.every)
            return None
        self.last_saved = step
        if trainer.is_global_zero:
            if self.best is not None and self.best["step"] == step:
                text = f"{path.name} {self.best['metric']}={self.best['value']:.6g}\n"
                atomic.write_text(self.folder / "best", text)
            best = [self.best["step"]] if self.best else []
            checkpoints.prune(self.folder, self.keep_last, keep=[step, *best])  # newer ones may be damaged
        return path

    def _publish(self, trainer: pl.Trainer, step: int) -> Path:
        """Let rank 0 make the directory, all ranks fill it, and rank 0 publish it; errors reach every rank."""

        def on_rank_zero(action: Any) -> None:
            message = ""
            if trainer.is_global_zero:
                try:
                    action()
                except checkpoints.PublishError as error:
                    message = str(error)
            if message := trainer.strategy.broadcast(message):
                raise checkpoints.PublishError(message)

        on_rank_zero(lambda: checkpoints.stage(self.folder, step, needed_bytes=self._needed_bytes(trainer)))
        staged = checkpoints.staged(self.folder, step)
        failure: OSError | None = None
        try:
            trainer.save_checkpoint(staged / checkpoints.STATE)
        except (OSError, CheckpointException) as error:  # the latter on all ranks, of a disk that failed one of them
            failure = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the one that the error jumped over

        def seal() -> None:
            if failure is not None:
                checkpoints.discard(self.folder, step)
                raise checkpoints.unwritten(self.folder, step, failure) from failure
            checkpoints.seal(self.folder, step)

        on_rank_zero(seal)
        return checkpoints.directory(self.folder, step)

    def _needed_bytes(self, trainer: pl.Trainer) -> int:
        """Size of the newest checkpoint, or what adapters, two moments and an average will take."""
        if earlier := checkpoints.published(self.folder):
            return int(1.05 * checkpoints.size_of(earlier[-1][1]))
        return 4 * sum(p.nbytes for p in trainer.lightning_module.parameters() if p.requires_grad)

    def _note_best(self, trainer: pl.Trainer) -> None:
        """Remember this step if its metric is the best so far; done before saving, so that the state knows."""
        if self.best_metric is None or self.best_metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.best_metric])
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"step": trainer.global_step, "metric": self.best_metric, "value": value}

    @staticmethod
    def _agree(trainer: pl.Trainer, flag: bool, unanimous: bool = False) -> bool:
        """Whether any rank (or all of them) says so; one small all-reduce where there are several."""
        return flag if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(flag, all=unanimous)


def is_finite(trainer: pl.Trainer) -> bool:
    """Whether every trained parameter and every optimizer state of this rank is finite."""
    total = torch.zeros((), device=trainer.strategy.root_device)
    for tensor in _floating(trainer):
        total = total + (~torch.isfinite(local(tensor))).any().to(total)
    return float(total) == 0


def _floating(trainer: pl.Trainer) -> Iterator[Tensor]:
    for parameter in trainer.lightning_module.parameters():
        if parameter.requires_grad:
            yield parameter.detach()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.is_floating_point())
