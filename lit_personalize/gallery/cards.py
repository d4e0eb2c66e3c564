"""What a gallery says of an adapter: read from a run, from a folder of adapter files, or from one file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.inspect import inspect_file
from lit_personalize.recipe_files import title_of
from lit_personalize.run_directory import RunDirectory
from lit_personalize.yaml_files import read_yaml

PEFT = "peft/*/adapter_model.safetensors"
FILES = ("*.safetensors", "textual_inversion/*.safetensors", PEFT, "adapter_config.json", "peft/*/adapter_config.json")


@dataclass
class Sample:
    """One picture."""

    path: Path
    prompt: str
    seed: int


@dataclass
class Card:
    """One adapter."""

    name: str
    source: Path
    """The run, folder or file that it was read from; never shown."""
    home: Path
    """The folder below which its files lie."""
    files: list[Path]
    method: str = ""
    base: str = ""
    base_path: str = ""
    """Where the base was when the run trained; never shown."""
    tokens: list[str] = field(default_factory=list)
    ranks: list[str] = field(default_factory=list)
    kinds: dict[Path, str] = field(default_factory=dict)
    """What each adapter file is, in the words of `litp inspect`."""
    step: int | None = None
    license: str = ""
    prompts: list[str] = field(default_factory=list)
    drawing: dict[str, Any] = field(default_factory=dict)
    """Steps and guidance of the run's own samples."""
    samples: list[Sample] = field(default_factory=list)
    checked: dict[str, float] = field(default_factory=dict)
    """File -> largest relative error after reloading through the stock client."""
    loading: str = ""
    """Python that loads the files."""

    @property
    def verified(self) -> bool:
        """Whether every adapter file was reloaded through the stock client."""
        adapters = [path for path in self.files if path.suffix == ".safetensors"]
        names = (path.relative_to(self.home) for path in adapters)
        return all(str(n) in self.checked or str(n.parent) in self.checked or n.name in self.checked for n in names)

    @property
    def rank(self) -> str:
        """`8`, or `4 to 16`."""
        numbers = sorted({int(rank) for rank in self.ranks})
        return "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def find_cards(places: Iterable[Path]) -> list[Card]:
    """One card for each run, adapter folder or adapter file that is named, or that lies in a named folder.

    Raises:
        DataError: A place does not exist or holds no adapter; a file is damaged.
    """
    cards: dict[Path, Card] = {}
    for place in places:
        if not place.exists():
            raise DataError(f"{place} does not exist; name runs, folders that hold runs, or adapter files")
        found = _adapters_at(place)
        if not found:
            raise DataError(f"{place} holds no finished run and no adapter file")
        cards |= {source.resolve(): card_of(source) for source in found}
    taken: dict[str, int] = {}
    for card in cards.values():
        taken[card.name] = taken.get(card.name, 0) + 1
        card.name += f" ({taken[card.name]})" if taken[card.name] > 1 else ""
    return list(cards.values())


def _adapters_at(place: Path) -> list[Path]:
    """The place itself if it is an adapter, else the runs and adapter folders in it."""
    if place.is_file() or _files_in(_home(place)):
        return [place]
    return [folder for folder in sorted(place.iterdir()) if folder.is_dir() and _files_in(_home(folder))]


def _home(place: Path) -> Path:
    """A run's exports; the folder itself; of a file its folder."""
    return place.parent if place.is_file() else place / "exports" if (place / "exports").is_dir() else place


def _files_in(home: Path) -> list[Path]:
    found = [path for pattern in FILES for path in sorted(home.glob(pattern))]
    return found if any(path.suffix == ".safetensors" for path in found) else []


def card_of(source: Path) -> Card:
    """Read one adapter's card.

    Raises:
        DataError: A file is missing, a pickle, damaged, or of a newer format; a run's record cannot be read.
    """
    home = _home(source)
    card = Card(
        source.name.removesuffix(".safetensors"), source, home, [source] if source.is_file() else _files_in(home)
    )
    for path in (path for path in card.files if path.suffix == ".safetensors"):
        found = inspect_file(path)
        card.kinds[path] = found["format"]
        card.tokens += [token for token in found["tokens"] if token not in card.tokens]
        card.ranks += [rank for rank in found["ranks"] if rank not in card.ranks]
        card.base = card.base or ("" if found["base"] == "unknown" else Path(found["base"]).name)
        card.method = card.method or title_of(_recipe_in(found["details"]))
    card.method = card.method or ", ".join(dict.fromkeys(card.kinds.values()))
    try:
        if not source.is_file():
            _read_verification(card)
        if (source / "config.yaml").is_file():
            _read_run(card, RunDirectory(source.parent, source.resolve().name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise DataError(f"the record of {source} cannot be read: {error!r}") from error
    return card


def _recipe_in(details: str) -> str:
    """The recipe that a file of ours says it came from; details are free text to other programs."""
    try:
        return str(json.loads(details).get("recipe", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _read_verification(card: Card) -> None:
    report = card.home / "verify.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8"))["files"]
        card.checked = {item["file"]: float(item["largest_error"]) for item in found}


def _read_run(card: Card, run: RunDirectory) -> None:
    """Method, base, prompts and newest samples from what the run recorded."""
    config: dict[str, Any] = read_yaml(card.source / "config.yaml")
    options: dict[str, Any] = config["model"]["init_args"]
    adapters = [_short(adapter["class_path"]) for adapter in options.get("adapters") or []]
    what_trained = f"{' + '.join(adapters)} by {_short(config['model']['class_path'])}"
    card.method = title_of(run.recipe) or what_trained
    card.base_path, card.base = str(options["base"]), Path(str(options["base"])).name
    for concept in ((config.get("data") or {}).get("init_args") or {}).get("concepts") or []:
        if concept.get("token") and concept["token"] not in card.tokens:
            card.tokens.append(concept["token"])
    sampling = config.get("sampling") or {}
    card.prompts = [str(prompt) for prompt in sampling.get("prompts") or []]
    card.drawing = {key: sampling[key] for key in ("steps", "guidance") if key in sampling}
    card.license = str((config.get("export") or {}).get("license") or "")
    if records := sorted((card.source / "samples").glob("step-*/samples.json")):
        record = json.loads(records[-1].read_text(encoding="utf-8"))
        card.step, seeds = int(record["step"]), record["seeds"]
        asked = [(prompt, seed) for prompt in record["prompts"] for seed in seeds]
        paths = [_within(records[-1].parent, name) for name in record["pictures"]]
        card.samples = [Sample(p, *a) for p, a in zip(paths, asked, strict=True) if p.is_file()]
    readme = card.source / "README.md"
    if readme.is_file():
        code = re.search(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
        card.loading = code[1].strip() if code else ""


def _within(folder: Path, name: str) -> Path:
    """A file of a folder: what a page shows and copies may not lie elsewhere, by its name or by a link.

    Raises:
        ValueError: It does.
    """
    path = folder / name
    if path.parent != folder or path.resolve().parent != folder.resolve():
        raise ValueError(f"the picture {name!r} lies outside {folder}")
    return path


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def prompts_for(card: Card, given: Sequence[str]) -> list[str]:
    """Prompts to draw anew: those given, with `{token}` filled in, else the run's own.

    Raises:
        DataError: There are none, or the adapter has no token to fill in.
    """
    prompts = list(given) or card.prompts
    if not prompts:
        raise DataError(f"{card.source} names no prompts of its own; give some with --prompts")
    if not card.tokens and any("{token}" in prompt for prompt in prompts):
        raise DataError(f"{card.source} names no token to write for {{token}}; give prompts without it")
    return [prompt.replace("{token}", " ".join(card.tokens)) for prompt in prompts]
