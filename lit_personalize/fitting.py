"""`fit`: from a configuration to a run directory with checkpoints, samples and verified exports.

The same call again continues the run by its name, and rests where it has finished. Checkpoints, the
non-finite guard, progress and the manifest are always on; a user's `trainer.callbacks` are added to them.

Callbacks stand above this package. Here, where a run is composed, they are imported inside functions.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.strategies import Strategy

from lit_personalize import checkpoints, preflight, sharded_state, stop_signals, strategies
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.token_embedding import CLASS
from lit_personalize.backbones.base import Base
from lit_personalize.batch import Role
from lit_personalize.configuration import instantiate, parse, resolved_text
from lit_personalize.devices import device_of
from lit_personalize.errors import DataError, PreemptedError, UsageError
from lit_personalize.export.card import write_card
from lit_personalize.export.exporter import Exported, export
from lit_personalize.export.verify import verify
from lit_personalize.metrics.features import clip_directory
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.ranks import is_rank_zero
from lit_personalize.run_directory import RunDirectory
from lit_personalize.run_loggers import loggers_of
from lit_personalize.sampling.sampler import SamplingOptions, generate

log = logging.getLogger(__name__)


def fit(arguments: Sequence[str]) -> RunDirectory:
    """Train, export and verify; `arguments` are those of `litp fit`.

    Raises:
        UsageError: The configuration, or another owner of the run.
        DataError: An input.
        KeyboardInterrupt: After saving.
        PreemptedError: A cluster's notice, after saving.
    """
    parser, config = parse(arguments)
    run = RunDirectory(config.root, config.name).create()
    with run.lock() if is_rank_zero() else nullcontext():
        resolved = resolved_text(parser, config)
        if config.resume != "never" and (step := run.finished_at(resolved)) is not None:
            log.info("run %s has finished its %d steps; its exports are in %s", run.name, step, run.exports)
            return run
        built = instantiate(parser, config)
        preflight.refuse_formats(built.model.trained, config.export.formats)
        name_initial_words(built)
        finished = train(built, run, resolved)
        if is_rank_zero():
            if built.model.spread:  # what is left of it is this rank's share
                built.model = instantiate(parser, config).model
                name_initial_words(built)
            export_run(built, run)
            if finished:
                run.mark_finished(resolved)
    return run


def name_initial_words(built: Namespace) -> None:
    """Let tokens with `init: CLASS` begin at the class noun of the concept that they stand for.

    Raises:
        UsageError: No concept with a class noun has that token.
    """
    nouns = {c.token: c.class_noun for c in getattr(built.data, "concepts", ()) if c.token and c.class_noun}
    for adapter in built.model.trained:
        words = getattr(adapter, "init", None)
        if CLASS in (words if isinstance(words, list) else [words]):
            if adapter.token not in nouns:
                raise UsageError(
                    f"{adapter.name} has init: {CLASS}, but no concept with a class_noun has this token: set "
                    f"data.concepts[i].token to {adapter.token} and its class_noun, or name an initializer word"
                )
            noun = nouns[adapter.token]
            adapter.init = [noun if word == CLASS else word for word in words] if isinstance(words, list) else noun


def callbacks_of(built: Namespace, run: RunDirectory) -> list[pl.Callback]:
    """The callbacks that every run has, then the user's."""
    from lit_callbacks.adapter_ema import AdapterEma
    from lit_callbacks.non_finite_guard import NonFiniteGuard
    from lit_callbacks.progress import Progress
    from lit_callbacks.run_checkpoint import RunCheckpoint
    from lit_callbacks.sample_grid import SampleGrid
    from lit_callbacks.throughput import Throughput

    chosen: list[pl.Callback] = [NonFiniteGuard(), Throughput()]
    if built.trainer.enable_progress_bar is not False:
        chosen.append(Progress())
    if built.ema is not None:
        chosen.append(AdapterEma(decay=built.ema))
    sampling = built.sampling
    if sampling.prompts:
        chosen.append(
            SampleGrid(
                folder=run.samples, prompts=sampling.prompts, seeds=sampling.seeds, every=sampling.every,
                steps=sampling.steps, guidance=sampling.guidance,
            )
        )  # fmt: skip
    saved = built.checkpoint
    if saved.best:
        chosen.append(_fidelity_drift(built))
    chosen.append(
        RunCheckpoint(
            folder=run.checkpoints, every=saved.every, keep_last=saved.keep_last,
            best_metric="fidelity_against_drift" if saved.best else None,
        )
    )  # fmt: skip
    return [*chosen, *(built.trainer.callbacks or [])]


def _fidelity_drift(built: Namespace) -> pl.Callback:
    """The metric of `checkpoint.best`: the first concept's pictures against pictures of it and of its class.

    Raises:
        UsageError: The concept has no class noun, or no CLIP is at hand.
    """
    from lit_callbacks.fidelity_drift import FidelityDrift

    noun = built.data.concepts[0].class_noun
    if not noun:
        raise UsageError("checkpoint.best compares the concept with its class: give the concept a class_noun")
    saved, sampling = built.checkpoint, built.sampling
    shown = [s for s in built.data.samples if s.role == Role.INSTANCE and s.concept == 0]
    return FidelityDrift(
        references=[s.pixels for s in shown], prompts=[shown[0].captions[0]], class_prompts=[f"photo of a {noun}"],
        clip=clip_directory(saved.clip, built.model.base_name), every=saved.every, weight=saved.drift_weight,
        options=SamplingOptions(sampling.steps, sampling.guidance),
    )  # fmt: skip


def build_trainer(built: Namespace, run: RunDirectory, resumed_at: int = 0) -> pl.Trainer:
    """A Lightning trainer with the run's callbacks and loggers; other options are the user's."""
    options = dict(vars(built.trainer))
    options["callbacks"] = callbacks_of(built, run)
    if options.get("logger") is None:
        options["logger"] = loggers_of(run.path, resumed_at)
    if "SLURM_NTASKS" in os.environ and "RANK" not in os.environ and not options.get("plugins"):  # not torchrun's
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        # Preemption is handled by a flag at the step boundary, not inside a signal handler.
        options["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    return pl.Trainer(**options, default_root_dir=str(run.path), enable_checkpointing=False)


def training_device(built: Namespace) -> torch.device:
    """Where the trainer will put the model; for what comes before and after the training itself."""
    accelerator = built.trainer.accelerator
    return device_of(accelerator) if accelerator in ("auto", "gpu", "cuda") else torch.device("cpu")


def bind_data(built: Namespace) -> None:
    """Put the base where it will train, and give its encoders to the data module."""
    objective: Denoising = built.model
    data: Any = built.data
    objective.configure_model()
    objective.to(training_device(built))  # generating a set and caching latents take long on a CPU
    bind_encoders(data, objective.built, built.sampling)


def bind_encoders(data: Any, base: Base, sampling: Any) -> None:
    """Give a base's encoders, and its sampler with the steps and guidance of `sampling`, to a data module."""
    if hasattr(data, "bind"):
        how = SamplingOptions(sampling.steps, sampling.guidance)

        def draw(captions: Sequence[str], seeds: Sequence[int]) -> Any:
            return generate(base, list(captions), list(seeds), None, how, data.resolution)

        schedule = " zero terminal SNR" if base.zero_terminal_snr else ""
        data.bind(base, base, draw, f"{base.fingerprint} {base.dtype} {base.vae.dtype} {how}{schedule}")


def prepare_data(built: Namespace, run: RunDirectory) -> None:
    """Bind the base's encoders to the data module, read everything, write manifest and sheet."""
    bind_data(built)
    objective: Denoising = built.model
    data: Any = built.data
    try:
        data.prepare_data()
        data.setup("fit")
    finally:
        if hasattr(data, "write_manifest") and is_rank_zero():
            data.write_manifest(run.manifest)
    preflight.check(objective, data)
    if getattr(data, "text_store", None) is not None and not objective.trains_text:
        known, encoded = objective.keep_states(data.captions, data.text_store)
        log.info("text states of %d captions, %d of them were known", known + encoded, known)
    if hasattr(data, "write_sheet") and is_rank_zero():
        data.write_sheet(run.sheet)


def train(built: Namespace, run: RunDirectory, resolved: str) -> bool:
    """Fit from the newest complete checkpoint, or from the start.

    Args:
        resolved: The configuration; it becomes that of the run when all that could refuse it has passed.

    Returns:
        Whether the training is at its end, and not only out of the time that `trainer.max_time` gave it.
    """
    from lit_callbacks.other_ranks import OtherRanks
    from lit_callbacks.run_checkpoint import RunCheckpoint

    found = checkpoints.find_complete(run.checkpoints)
    _tell_what_was_found(run, found)
    refuse_resume(found, built, run)
    write = functools.partial(run.write_record, resolved, built.recipe)
    record = functools.cache(write if is_rank_zero() else lambda: None)
    steps = built.trainer.max_steps
    if found and 0 <= steps <= found.step:  # -1 is a run of epochs, which Lightning counts
        log.info("run %s has finished its %d steps", run.name, steps)
        built.model.configure_model()
        built.model.check_resumable(checkpoints.read_state(found.path))
        record()
        return True
    prepare_data(built, run)
    stop_signals.heed("stopped before the first step")
    if found:
        whole = f"{steps}" if steps >= 0 else f"{built.trainer.max_epochs} epochs"
        log.info("run %s: resumed at step %d of %s", run.name, found.step, whole)
    quiet_lightning()
    trainer = build_trainer(built, run, found.step if found else 0)
    if found:
        refuse_other_layout(found, built.model, trainer.strategy, trainer.world_size)
    averaged, best = built.ema is not None, built.checkpoint.best
    strategies.prepare(trainer.strategy, built.model, averaged, best, trainer.world_size)
    # Only here is the checkpoint read, and found to fit or not.
    others = OtherRanks()
    trainer.callbacks += [LambdaCallback(on_train_start=lambda *_: record()), others]  # type: ignore[attr-defined]
    keeper = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))  # type: ignore[attr-defined]
    known = list(getattr(built.data, "records", ()))
    start = str(found.state) if found else None
    try:
        trainer.fit(built.model, datamodule=built.data, ckpt_path=start, weights_only=True)
    except SystemExit as exit_:  # Lightning turns Ctrl-C into an exit of its own
        if keeper.preempted:
            if is_rank_zero():
                run.note_preemption(f"{keeper.preempted} step={keeper.last_saved}")
            raise PreemptedError(f"{keeper.preempted}: {_saved(keeper.last_saved)}") from exit_
        if keeper.interrupted:
            raise KeyboardInterrupt(_saved(keeper.last_saved)) from exit_
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{start} holds more than a run's state, and loading it could run code, so it was not loaded; remove that "
            "checkpoint, and the same command continues from the one before"
        ) from error
    except Exception as error:
        if others.lost:
            raise others.lost from error
        raise
    finally:
        # A picture turned out to be damaged as it was shown, here or on another rank.
        if is_rank_zero() and known != list(getattr(built.data, "records", ())):
            built.data.write_manifest(run.manifest)
    record()  # where no step was left to train
    return not (keeper.interrupted or _out_of_time(trainer))


def _tell_what_was_found(run: RunDirectory, found: checkpoints.Found | None) -> None:
    """Say which checkpoints are passed over and why, and that the run begins anew where none is left."""
    skipped = found.skipped if found else checkpoints.damaged(run.checkpoints)
    for reason in skipped:
        log.warning("passed over a checkpoint: %s", reason)
    for step in checkpoints.unfinished(run.checkpoints):
        log.info("the save of step %d was ended before it was done", step)
    if skipped and found is None:
        log.warning("run %s: none of its checkpoints is whole; it starts at step 0", run.name)


def _saved(step: int | None) -> str:
    saved = "nothing is saved yet" if step is None else f"saved at step {step}"
    return f"{saved}; the same command continues"


def refuse_resume(found: checkpoints.Found | None, built: Namespace, run: RunDirectory) -> None:
    """Refuse to go on, or to begin, where `resume` says otherwise.

    Raises:
        UsageError: It does.
    """
    if found and built.resume == "never":
        raise UsageError(f"{run.path} already has a checkpoint of step {found.step}; use resume: auto or another name")
    if not found and built.resume == "must":
        raise UsageError(f"{run.path} has no complete checkpoint to resume from")


def refuse_other_strategy(found: checkpoints.Found, strategy: Strategy) -> str:
    """The kind of state that a checkpoint has, which the strategy reads.

    Raises:
        UsageError: It reads another kind.
    """
    written, read = sharded_state.kind(found.state), strategies.state_kind(strategy)
    if written != read:
        raise UsageError(
            f"checkpoint {found.path.name} has a {written} state, and {type(strategy).__name__} reads a {read} one: go "
            "on with the strategy that wrote it, or take a new run name"
        )
    return written


def refuse_other_layout(found: checkpoints.Found, objective: Denoising, strategy: Strategy, ranks: int) -> None:
    """Refuse what the strategy cannot read, before it tries.

    Raises:
        UsageError: The checkpoint is of another kind of strategy, or DeepSpeed's of another number of ranks.
        DataError: It is a sharded one of other adapters or of another base.
    """
    if refuse_other_strategy(found, strategy) != "whole":
        state = sharded_state.read_state(found.state, device="meta")
        if (before := state.get("dp_world_size", ranks)) != ranks:
            raise UsageError(
                f"checkpoint {found.path.name} is in DeepSpeed's shares of {before} ranks, which {ranks} cannot read: "
                f"go on with {before}, or use ModelParallelStrategy (FSDP2), whose checkpoints any number can read"
            )
        objective.check_resumable(state)


def _out_of_time(trainer: pl.Trainer) -> bool:
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    return any(left is not None and left <= 0 for left in (timer.time_remaining() for timer in timers))


def quiet_lightning() -> None:
    """Leave out Lightning's notices that do not apply to a run with its own cursor and checkpoints."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available on your system but is not used.*")
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device` in `LightningModule`.*")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging.*")
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    saving = "lightning.pytorch.trainer.connectors.checkpoint_connector"  # names a default at every save
    chatty = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators")
    for name in (*chatty, "lightning.fabric.utilities.distributed", saving):
        logging.getLogger(name).setLevel(logging.WARNING)


def weights_of(objective: Denoising, state: dict[str, Any] | None = None) -> AdapterWeights:
    """What the adapters of an objective export, from a checkpoint's tensors if given."""
    if state is not None:
        objective.load_state_dict(state)
    merged = AdapterWeights()
    for adapter in objective.trained:
        merged = merged.merge(adapter.export_weights())
    return merged


def export_run(built: Namespace, run: RunDirectory, device: torch.device | None = None) -> list[Exported]:
    """Export the newest complete checkpoint, or the best, in the asked formats; verify each file; write the card.

    Args:
        device: On which verification draws; by default that of the training.
    """
    found = checkpoints.find_best(run.checkpoints) if built.checkpoint.best else None
    found = found or checkpoints.find_complete(run.checkpoints)
    if found is None:
        raise UsageError(f"{run.path} has no complete checkpoint to export")
    objective: Denoising = built.model
    preflight.refuse_formats(objective.trained, built.export.formats)
    objective.configure_model()
    weights = weights_of(objective, checkpoints.load_state(found.path, averaged=built.ema is not None))
    details = {"objective": type(objective).__name__, "steps": found.step, "run": run.name}
    if run.recipe:
        details["recipe"] = run.recipe
    if run.config.is_file():
        details["config_sha256"] = hashlib.sha256(run.config.read_bytes()).hexdigest()[:16]
    wanted = built.export
    files = export(
        weights, run.exports, objective.built, run.name, wanted.formats, details,
        wanted.max_error, wanted.max_rank, wanted.energy, wanted.nuclear,
    )  # fmt: skip
    report = None
    if built.export.verify:
        objective.to(training_device(built) if device is None else device)
        prompts = built.sampling.prompts or ["a photo"]
        report = verify(files, objective.built, weights, prompt=prompts[0])
        run.write_text("exports/verify.json", report.to_json())
    write_card(run, objective.built, weights, files, built.sampling.prompts, report, built.export.license)
    return files
