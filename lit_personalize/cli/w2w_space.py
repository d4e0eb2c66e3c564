"""What the verbs of `litp w2w` share: a space, its base and corpus, and how results are written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_device, add_json

if TYPE_CHECKING:
    from torch import Tensor

    from lit_personalize.backbones.base import Base
    from lit_personalize.corpus.store import Corpus
    from lit_personalize.weights2weights.subspace import Subspace

POINT = "id of the space or of --corpus, file or folder of a LoRA, or `mean`"


def add_space(parser: argparse.ArgumentParser, corpus: str) -> None:
    """Add SPACE, --corpus (what for is `corpus`), the base's options and --json."""
    parser.add_argument("space", type=Path, metavar="SPACE", help="folder of litp w2w fit")
    parser.add_argument("--corpus", type=Path, help=corpus)
    parser.add_argument("--base", help="what the adapters were trained on; default: what space or corpus names")
    parser.add_argument("--base-config", help="configs and tokenizers of a single-file base")
    add_device(parser)
    parser.add_argument("--force", action="store_true", help="accept a base, or a file, with another fingerprint")
    add_json(parser)


def add_output(parser: argparse.ArgumentParser, out: str = "folder for LoRA files and w2w.json") -> None:
    """Add --out, --formats and --verify."""
    parser.add_argument("-o", "--out", type=Path, required=True, help=out)
    parser.add_argument("--formats", nargs="+", default=["diffusers"], help="diffusers kohya peft")
    parser.add_argument("--verify", choices=("all", "first", "none"), default="all",
                        help="which adapters to load into the stock client")  # fmt: skip


def add_directions(parser: argparse.ArgumentParser) -> None:
    """Add the options of `weights2weights.directions.find`."""
    parser.add_argument("--method", choices=("logistic", "least-squares"), default="logistic",
                        help="how directions are found; the paper's is least-squares")  # fmt: skip
    parser.add_argument("--components", type=int, help="in which they are found; default: 1000, or as many as there "
                        "are, or a quarter of the labelled adapters")  # fmt: skip
    parser.add_argument("--folds", type=int, default=5, help="of the accuracy on adapters held out")


@dataclass
class Opened:
    """What the options name."""

    space: Subspace
    base: Base
    corpus: Corpus | None
    options: argparse.Namespace

    def write(self, row: Tensor, folder: Path, told: dict[str, Any], first: bool = True) -> dict[str, Any]:
        """Write a row `[D]` into a folder; gives its record."""
        from lit_personalize.weights2weights.points import of_row, weights_of_row

        weights = weights_of_row(self.space, row)
        return self.write_weights(weights, of_row(self.space, "", row).coefficients, folder, told, first)

    def write_weights(
        self, weights: Any, coefficients: Tensor, folder: Path, told: dict[str, Any], first: bool = True
    ) -> dict[str, Any]:
        """Write an adapter into a folder; gives its record with the folder."""
        from lit_personalize.weights2weights import writing

        options = self.options
        check = options.verify == "all" or (options.verify == "first" and first)
        record = writing.write(weights, coefficients, folder, self.space, self.base, told, options.formats, check)
        return {"folder": str(folder), **record}

    def labels(self) -> dict[str, Tensor]:
        """Labels of the corpus by name, `[N]` in the order of the space's adapters; NaN where there is none.

        Raises:
            UsageError: No corpus is named.
            DataError: It lacks all adapters of the space, or has no label.
        """
        import torch

        from lit_personalize.errors import DataError, UsageError

        if self.corpus is None:
            raise UsageError("directions come from labels: name the corpus that has them with --corpus")
        places = {name: place for place, name in enumerate(self.corpus.ids)}
        numbers = [places.get(name, -1) for name in self.space.ids]
        if max(numbers, default=-1) < 0:
            raise DataError(f"{self.corpus.folder} has none of the space's adapters: name the corpus that it is of")
        chosen = torch.tensor(numbers)
        found = {}
        for name, values in self.corpus.labels().items():
            own = values.float()[chosen.clamp(min=0)]
            found[name] = torch.where(chosen < 0, float("nan"), own)
        if not found:
            raise DataError(f"{self.corpus.folder} has no labels: add some with litp bank pack --labels people.csv")
        return found


def open_space(options: argparse.Namespace) -> Opened:
    """Load the space, its base and, if named, its corpus.

    Raises:
        DataError: One is missing or damaged, or the base is another one.
        UsageError: No base is known.
    """
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.corpus.store import Corpus
    from lit_personalize.devices import device_of
    from lit_personalize.errors import UsageError
    from lit_personalize.weights2weights.subspace import Subspace
    from lit_personalize.weights2weights.writing import refuse_base

    space = Subspace.load(options.space)
    corpus = None if options.corpus is None else Corpus.open(options.corpus)
    source = options.base or space.details.get("base") or (corpus.manifest.get("base") if corpus else None)
    if not source:
        raise UsageError("name what the adapters were trained on: --base DIR")
    base = load_base(source, config=options.base_config, device=device_of(options.device))
    refuse_base(space, base, options.force)
    return Opened(space, base, corpus, options)


def direction_of(opened: Opened, labels: dict[str, Tensor], name: str) -> Any:
    """The direction of a label.

    Raises:
        UsageError: There is no such label.
    """
    import difflib

    from lit_personalize.errors import UsageError
    from lit_personalize.weights2weights.directions import find

    if name not in labels:
        close = difflib.get_close_matches(name, labels, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(list(labels)[:8])}"
        raise UsageError(f"the corpus has no label {name!r}{hint}")
    options = opened.options
    return find(opened.space.coefficients, labels[name], name, options.method, options.components, options.folds)
