"""Weights2Weights' own layout (Dravid et al., 2024): every adapter's numbers in one tensor.

    all_weights.pt         [n, D], fp32
    weight_dimensions.pt   PEFT key -> ([numel], shape), in the order of the columns
    adapter_config.json    rank and alpha, which are not among the numbers (theirs: 1 and 27)

These are files of `torch.save`, which hold tensors and plain containers alone: they are read so (`weights_only=True`),
and a written one loads so.
"""

from __future__ import annotations

import csv
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.backbones.base import Base
from lit_personalize.corpus.index import LABEL
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.sources import Found
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export import keys
from lit_personalize.export.files import peft_lora
from lit_personalize.export.loading import parse
from lit_personalize.export.pickled import read_pickle

WEIGHTS, DIMENSIONS, CONFIG, LABELS = "all_weights.pt", "weight_dimensions.pt", "adapter_config.json", "identity_df.csv"


def is_w2w(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def rows_in(folder: Path, base: Base, ids: Sequence[str], alpha: float | None) -> Iterator[Found]:
    """Every row as an adapter; from which seed they began the files do not say.

    Args:
        ids: Names of the rows, where there are as many; else they are numbered.
        alpha: Without an `adapter_config.json`.

    Raises:
        DataError: A file is missing, would run code, or does not fit the others or the base.
    """
    rows = read_pickle(folder / WEIGHTS, mapped=True)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise DataError(f"{folder / WEIGHTS} holds no tensor [n, D] of floating-point numbers")
    shapes = _shapes(folder / DIMENSIONS)
    width = sum(shape.numel() for shape in shapes.values())
    if width != rows.shape[1]:
        raise DataError(f"{folder / WEIGHTS} has rows of {rows.shape[1]} numbers, {DIMENSIONS} names {width}")
    settings = {"lora_adapter_metadata": json.dumps(_settings(folder / CONFIG, alpha))}
    places = torch.arange(width, dtype=torch.float32).split([shape.numel() for shape in shapes.values()])
    tensors = {key: part.view(shape) for (key, shape), part in zip(shapes.items(), places, strict=True)}
    weights = parse(tensors, settings, base, folder / DIMENSIONS)
    layout = Layout.of(weights)
    order = layout.flatten(weights).long()  # of the columns
    names = list(ids) if len(ids) == len(rows) else [f"{number:06d}" for number in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        yield Found(name, dict, partial(_read, layout, row, order))


def _read(layout: Layout, row: Tensor, order: Tensor) -> tuple[Layout, Tensor]:
    return layout, row.float()[order]


def _shapes(path: Path) -> dict[str, torch.Size]:
    """The shape of every factor, by PEFT key, in the order of the columns."""
    if not path.is_file():
        raise DataError(f"{path} is missing: without it nobody knows which number is whose")
    told = read_pickle(path)
    try:
        found = {str(key): torch.Size(shape) for key, (_, shape) in dict(told).items()}  # type: ignore[call-overload]
        sizes = [torch.Size(size).numel() for size, _ in dict(told).values()]  # type: ignore[call-overload]
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} holds no sizes and shapes by key ({error})") from error
    if sizes != [shape.numel() for shape in found.values()] or not found:
        raise DataError(f"{path} names sizes that are not those of its shapes")
    return found


def _settings(path: Path, alpha: float | None) -> dict[str, Any]:
    """Options of PEFT, with alpha as given."""
    told: dict[str, Any] = {}
    if path.is_file():
        try:
            told = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is no adapter configuration of PEFT: {error}") from error
    elif alpha is None:
        raise DataError(f"{path} is missing, and alpha is not among the numbers: give --alpha (Weights2Weights has 27)")
    if alpha is not None:
        told["lora_alpha"] = alpha
    return {f"unet.{key}": value for key, value in told.items()}


def write(corpus: Corpus, ids: Sequence[str], folder: Path) -> list[Path]:
    """Write adapters of a corpus in this layout, and its labels as `identity_df.csv`.

    The tensor is made in a file beside it, so that it may be larger than memory.

    Raises:
        UsageError: The folder holds such files already, or a layer is not the UNet's.
        DataError: The alphas differ, which the layout cannot say; or a row is damaged.
    """
    layout = corpus.layout
    if (folder / WEIGHTS).exists():
        raise UsageError(f"{folder} holds {WEIGHTS} already: name another folder")
    if others := [layer for layer in layout.layers if keys.split(layer)[0] != "unet"]:
        raise UsageError(f"the layout of Weights2Weights is the UNet's, and the adapters change {others[0]}")
    if len(set(layout.alphas.values())) > 1 or len(layout.ranks) > 1:
        raise DataError("the adapters' layers differ in rank or alpha, and Weights2Weights' layout has one of each")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".tmp-{os.getpid()}-rows"
    try:
        rows = torch.from_file(str(scratch), shared=True, size=len(ids) * layout.width).view(len(ids), layout.width)
        for place, name in enumerate(ids):
            rows[place] = corpus.row(name)
        _save(folder / WEIGHTS, rows)
    finally:
        scratch.unlink(missing_ok=True)
    shapes = {f"{keys.PEFT_ROOT}{keys.split(s.layer)[1]}.lora_{s.part}.weight": s for s in layout.slices}
    _save(folder / DIMENSIONS, OrderedDict((key, ([s.size], tuple(s.shape))) for key, s in shapes.items()))
    _, config = peft_lora(corpus.adapter(ids[0]).low_rank, "unet", {})
    atomic.write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    _write_labels(folder / LABELS, corpus, ids)
    return [folder / name for name in (WEIGHTS, DIMENSIONS, CONFIG, LABELS)]


def _save(path: Path, value: object) -> None:
    with atomic.replacing(path) as temporary:
        torch.save(value, temporary)


def _write_labels(path: Path, corpus: Corpus, ids: Sequence[str]) -> None:
    names = [name for name in corpus.index.column_names if name.startswith(LABEL)]
    lines = {line["id"]: line for line in corpus.index.select(["id", *names]).to_pylist()}
    text = StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", *(name.removeprefix(LABEL) for name in names)])
    table.writerows([name, *(lines[name][column] for column in names)] for name in ids)
    atomic.write_text(path, text.getvalue())
