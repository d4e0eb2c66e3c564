"""Adapters that lie in folders: those of `litp bank run`, PEFT folders, and single files of any client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import PICKLES
from lit_personalize.bank.export import RECORD, read_record
from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError
from lit_personalize.export.loading import LORA_FILES, exports_of, read_adapter, read_file


@dataclass
class Found:
    """An adapter that is not read yet."""

    id: str
    about: Callable[[], dict[str, Any]]
    """Gives `record`."""
    read: Callable[[], tuple[Layout, Tensor]]
    """Gives its row `[D]`, fp32, and how that lies."""

    @cached_property
    def record(self) -> dict[str, Any]:
        """What is known of it: seed, init_seed, loss, base_fingerprint, labels, ..."""
        return self.about()


def adapters_in(source: Path, base: Base) -> Iterator[Found]:
    """Every adapter of a folder, by name, or the one that is a file.

    Raises:
        DataError: The folder is not there, holds a pickle, or a damaged record or file.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of litp bank run, or of adapter files")
    folder, recipe = exports_of(source), _recipe_of(source)
    if folder.is_file() or _files_of(folder):
        yield _found(folder, source.name if folder.is_dir() else source.stem, base, recipe)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in PICKLES:
            raise DataError(f"{path} is a pickle: take its weights out with litp import, or move it away")
        if path.is_dir() and not _files_of(path):
            path = path / "unet"  # noqa: PLW2901 - as Weights2Weights lays out its PEFT folders
        if path.is_dir() and _files_of(path):
            yield _found(path, path.parent.name if path.name == "unet" else path.name, base, recipe)
        elif path.suffix == ".safetensors":
            yield _found(path, path.stem, base, recipe)


def _files_of(folder: Path) -> list[Path]:
    return [path for pattern in LORA_FILES for path in sorted(folder.glob(pattern))]


def _found(path: Path, name: str, base: Base, recipe: str) -> Found:
    own = path.is_dir() and (path / RECORD).is_file()
    file = path if path.is_file() else _files_of(path)[0]
    about = partial(_record_of, path, recipe) if own else partial(_record_in, file)
    return Found(name, about, partial(_read, path, name, base))


def _record_of(place: Path, recipe: str) -> dict[str, Any]:
    """What `litp bank run` noted of an adapter, whose files are those that it wrote."""
    record = {key: value for key, value in read_record(place).items() if key not in ("id", "files", "sha256")}
    if recipe:
        record["recipe"] = f"{record.get('recipe') or 'run'}@{recipe}"
    return record


def _record_in(path: Path) -> dict[str, Any]:
    """What a file's metadata say, which another program may have written."""
    _, metadata = read_file(path)
    try:
        details = json.loads(metadata.get("litp.details", "{}"))
    except (ValueError, RecursionError):
        details = {}
    kinds = {"seed": int, "init_seed": int, "steps": int, "recipe": str}
    record = {key: value for key, value in dict(details).items() if isinstance(value, kinds.get(key, ()))}
    if made_for := metadata.get("litp.base_fingerprint"):
        record["base_fingerprint"] = made_for
    return record


def _read(path: Path, name: str, base: Base) -> tuple[Layout, Tensor]:
    try:
        weights = read_adapter(path, base)
        layout = Layout.of(weights)
        return layout, layout.flatten(weights)
    except DataError as error:
        raise DataError(f"adapter {name!r}: {error}") from error


def _recipe_of(run: Path) -> str:
    """A hash of a run's configuration but for its name and place, or nothing."""
    path = run / "config.yaml"
    if not path.is_file():
        return ""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("name", "root")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]
