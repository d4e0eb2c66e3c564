"""From YAML files and dotted overrides to one checked configuration.

LightningCLI's own parser and file shape (`model`, `data`, `trainer` with `class_path` and
`init_args`), plus the keys of a run. Later files win over earlier ones, the command line over files: mappings
are merged, lists are replaced. An unknown key or a wrong type is one clear `UsageError`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_personalize.adapters.concept_neurons import ConceptNeurons
from lit_personalize.adapters.full_weights import FullWeights
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.neuron_values import NeuronValues
from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.oft_magnitudes import OFTMagnitudes
from lit_personalize.adapters.subspace_lora import SubspaceLoRA
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.adapters.ziplora import ZipLoRA
from lit_personalize.class_paths import allow_only, refusal, refuse_commands, take_allowed
from lit_personalize.errors import UsageError
from lit_personalize.export.factorize import Truncation
from lit_personalize.list_replacement import entry_options, replace_lists, without_entries
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.objectives.merged_distillation import MergedDistillation
from lit_personalize.objectives.prior_preservation import PriorPreservation
from lit_personalize.recipe_files import method_of, recipe_path
from lit_personalize.yaml_files import read_yaml

OBJECTIVES: list[type] = [
    Denoising,
    MergedDistillation,
    PriorPreservation,
]
ADAPTERS: list[type] = [
    ConceptNeurons,
    FullWeights,
    KeyValueDelta,
    LoRA,
    NeuronValues,
    OFT,
    OFTMagnitudes,
    SubspaceLoRA,
    TokenEmbedding,
    ZipLoRA,
]
"""Imported here, so that a `class_path` may be their short names."""


@dataclass
class Sampling:
    """Pictures drawn while training."""

    prompts: list[str] = field(default_factory=list)
    """Rows of the sample grid; empty draws none."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    every: int = 250
    """Optimizer steps between two columns; step 0 is always drawn."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 6.0


@dataclass
class Checkpointing:
    """When the run is saved."""

    every: int = 250
    keep_last: int = 3
    best: bool = False
    """Measure fidelity against drift at every checkpoint; keep the best one and export it instead of the last."""
    clip: str = ""
    """Local CLIPModel directory that judges it; on tinyworld the embedded one by default."""
    drift_weight: float = 1.0


@dataclass
class Exporting:
    """What is written at the end."""

    formats: list[Literal["diffusers", "kohya", "peft", "delta", "neurons", "pipeline"]] = field(
        default_factory=lambda: ["diffusers", "kohya"]  # type: ignore[arg-type]
    )
    max_error: float = 1e-3
    """Largest relative error of dense changes written as LoRA; 0 keeps them exact."""
    max_rank: int | None = None
    """Bound on the rank of such a LoRA, which goes before the other rules; what it costs is declared in the file."""
    energy: float | None = None
    """Instead of max_error: share of every layer's squared singular values that is kept, such as 0.99."""
    nuclear: float | None = None
    """Instead of max_error: share of the sum of every layer's singular values; Custom Diffusion compresses to 0.6."""
    verify: bool = True
    """Reload every file through the stock client and compare."""
    license: str = ""
    """Licence named on the model card."""

    def __post_init__(self) -> None:
        Truncation(self.max_error, self.max_rank, self.energy, self.nuclear)  # refused before training, not after


CONFIG_HELP = "YAML file or recipe name; may be repeated: later ones win, mappings are merged, lists are replaced whole"


def build_parser() -> LightningArgumentParser:
    """The parser of `litp fit`."""
    data_classes()  # imported, so that YAML may use their short names
    parser = LightningArgumentParser(prog="litp fit", exit_on_error=False, description="Train adapters on a base.")
    parser.add_argument("-c", "--config", action="config", help=CONFIG_HELP)
    parser.add_argument("--name", type=str, required=True, help="name of the run; its directory is <root>/<name>")
    parser.add_argument("--root", type=str, default="runs", help="folder of run directories")
    parser.add_argument("--resume", type=Literal["auto", "never", "must"], default="auto", help="continue a run")
    parser.add_argument("--recipe", type=str, default="", help="method's name on cards; default: that of -c RECIPE")
    parser.add_argument("--slurm", type=dict[str, Any] | None, default=None, help="for `litp slurm`; unread here")
    parser.add_argument("--ema", type=float | None, default=None, help="decay of the average of the adapters")
    parser.add_class_arguments(Sampling, "sampling")
    parser.add_class_arguments(Checkpointing, "checkpoint")
    parser.add_class_arguments(Exporting, "export")
    parser.add_lightning_class_args(Denoising, "model", subclass_mode=True)
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
    parser.add_class_arguments(
        pl.Trainer, "trainer", instantiate=False, fail_untyped=False, skip={"default_root_dir", "enable_checkpointing"}
    )
    parser.set_defaults(
        {
            "trainer.max_steps": 500,
            "trainer.logger": None,
            "trainer.log_every_n_steps": 10,
            "trainer.enable_model_summary": False,
        }
    )
    return parser


def data_classes() -> list[type]:
    """The data module of `lit_datamodules` and the classes of its options; nothing else here knows of that package."""
    from lit_datamodules.personalization import Concept, PersonalizationData, Regularization

    return [PersonalizationData, Concept, Regularization]


def parse(arguments: Sequence[str]) -> tuple[LightningArgumentParser, Namespace]:
    """Parse command-line arguments (with `-c` files) into a checked configuration.

    Raises:
        UsageError: An unknown key, a wrong type, a missing value, a class that is not allowed (see `class_paths`).
    """
    options, allowed = take_allowed(arguments)
    allow_only(allowed)
    parser = build_parser()
    try:
        given, entries = without_entries(_with_paths(options))
        config = parser.parse_args(replace_lists(given))
        if entries:
            whole = yaml.safe_load(parser.dump(config, skip_validation=True))
            config = parser.parse_args(replace_lists([*given, *entry_options(whole, entries)]))
        config.recipe = config.recipe or _method_of(given)
        refuse_commands(config.data, allowed)
        return parser, config
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(explain(str(error))) from error


def resolved_text(parser: LightningArgumentParser, config: Namespace) -> str:
    """The configuration as YAML that alone repeats the run.

    Without `recipe` and `slurm`: a name and a place change nothing, so a run stays finished whatever they are.
    """
    kept = config.clone()
    for key in ("recipe", "slurm"):
        kept.pop(key, None)
    return str(parser.dump(kept, skip_validation=True))


def instantiate(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    """Build objective, data module and callbacks.

    Raises:
        UsageError: A class refused its options. Errors that carry an exit code come through as they are.
    """
    try:
        return parser.instantiate(config)
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None:  # the parser wraps what a constructor raised
            if hasattr(cause, "exit_code"):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise UsageError(explain(str(error))) from error


@functools.cache
def _data_parser() -> LightningArgumentParser:
    data_classes()
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True)
    return parser


def data_of(config: Namespace, concepts: list[dict[str, Any]], seed: int) -> Any:
    """The data module of a configuration with other concepts and another seed.

    Raises:
        UsageError: A class refused its options.
    """
    given = config.data.clone().as_dict()
    given["init_args"] |= {"concepts": concepts, "seed": seed}
    parser = _data_parser()
    try:
        return instantiate(parser, parser.parse_object({"data": given})).data
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(explain(str(error))) from error


def _with_paths(arguments: Sequence[str]) -> list[str]:
    """Put the configuration files first, so that options win wherever they stand; recipe names become paths."""
    files: list[str] = []
    options: list[str] = []
    expect = False
    for argument in arguments:
        if expect:
            files.append(f"--config={_readable(recipe_path(argument))}")
            expect = False
        elif argument in ("-c", "--config"):
            expect = True
        elif argument.startswith(("--config=", "-c=")):
            files.append(f"--config={_readable(recipe_path(argument.partition('=')[2]))}")
        else:
            options.append(argument)
    return [*files, *options, *(["--config"] if expect else [])]


def _method_of(arguments: Sequence[str]) -> str:
    """The method of the last shipped recipe among `--config=PATH`."""
    files = [Path(a.partition("=")[2]) for a in arguments if a.startswith("--config=")]
    return next(filter(None, map(method_of, reversed(files))), "")


def _readable(path: Path) -> Path:
    """The path of a file that is YAML; the parser's own message would not name it."""
    read_yaml(path)
    return path


def known_keys() -> set[str]:
    """Every option name that a configuration may contain, for suggestions."""
    classes: list[Any] = [*OBJECTIVES, *ADAPTERS, pl.Trainer, Sampling, Checkpointing, Exporting, *data_classes()]
    found = {"name", "root", "resume", "recipe", "ema", "model", "data", "trainer", "sampling", "checkpoint", "export"}
    for kind in classes:
        found |= {p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "args", "kwargs")}
    return found


def known_classes() -> set[str]:
    """Short names that a `class_path` of ours may have."""
    return {kind.__name__ for kind in [*OBJECTIVES, *ADAPTERS, data_classes()[0]]}


UNKNOWN = (
    re.compile(r"[Kk]ey '?\"?([\w.]+)'?\"? is not expected"),
    re.compile(r"[Uu]nrecognized arguments: --([\w.]+)"),
    re.compile(r"Group '.*?' does not accept (?:nested )?key '([\w.]+)'"),
    re.compile(r"No action for key \"([\w.]+)\""),
    re.compile(r"does not accept nested key '([\w.]+)'"),
    re.compile(r"Option '([\w.]+)' is not accepted"),
)
KEY = re.compile(r'Parser key "([\w.]+)":')
EXPECTED = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])")
REQUIRED = re.compile(r"the following arguments are required: (.+)")
GIVEN = re.compile(r"(?:Got|Given) value: (.*)")
DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
MISSING = re.compile(r"(?:No module named '|import of )(\w+)")
NO_CALLABLE = re.compile(r"expects a function or a callable class: (.+?)\. Got value")
EXTRAS = {"bitsandbytes": "bitsandbytes", "prodigyopt": "prodigy"}
"""Optional packages by the extra of ours that installs them."""
NO_DEEPSPEED = "you must have DeepSpeed installed"
NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")


def explain(message: str) -> str:
    """One sentence for a parser's report: the key, what is wrong, and the nearest known key."""
    for pattern in UNKNOWN:
        if match := pattern.search(message):
            key = match[1]
            return f"unknown key {key!r}{suggestion(key, known_keys())}"
    if NO_DEEPSPEED in message:
        return "trainer.strategy: package deepspeed is not installed; pip install 'lit-personalize[cluster]'"
    keys = KEY.findall(message)
    key = ".".join(dict.fromkeys(keys))
    if match := DENIED.search(message):
        return refusal(match[1], key)
    if keys and (match := NO_CLASS.search(message)):
        return f"{key}: there is no class {match[1]!r}{suggestion(match[1], known_classes())}"
    if keys and (match := MISSING.search(message)):
        extra = EXTRAS.get(match[1])
        return f"{key}: package {match[1]} is not installed; pip install " + (
            f"'lit-personalize[{extra}]'" if extra else match[1]
        )
    if keys and (match := NO_CALLABLE.search(message)):
        return f"{key}: {match[1]}"
    if match := REQUIRED.search(message):
        return f"{key or 'the configuration'} lacks {match[1]}; give it a value"
    wanted = [part for kind, choices in EXPECTED.findall(message) for part in (kind or choices).split(", ")]
    given = GIVEN.search(message)  # the innermost, which is the value itself, comes first
    if (wanted := [part for part in dict.fromkeys(wanted) if part != "NoneType"]) and keys and given:
        *others, last = wanted
        return f"{key} must be {', '.join(others)}{' or ' if others else ''}{last}, not {given[1]}"
    noise = ("Expected a <class 'NoneType'>", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem")
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(dict.fromkeys(line for line in lines if not line.startswith(noise))) or message


def suggestion(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key.rpartition(".")[2], sorted(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
