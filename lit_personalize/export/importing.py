"""Take an adapter of another program, which may be a pickle, into files of our own, verified."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import PICKLES
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.custom_diffusion_files import is_custom_diffusion, largest_change, parse_custom_diffusion
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import check_tensors, parse, read_adapter, read_file
from lit_personalize.export.pickled import is_pickle, read_pickle
from lit_personalize.export.verify import verify


@dataclass
class ImportReport:
    """What was found in foreign files and what was made of it."""

    output: str
    layers: dict[str, int]
    """Changed layers by component."""
    other_parameters: int
    """Changed biases, norms and embeddings."""
    tokens: list[str]
    largest_change: float
    """Largest ‖ΔW‖ / ‖W0‖ of a layer."""
    files: list[str]
    largest_error: float
    """Of a layer, in what was written."""


def import_files(
    paths: Sequence[str | Path],
    base: Base,
    output: str | Path,
    tokens: Sequence[str] = (),
    formats: Sequence[str] = (),
) -> ImportReport:
    """Write one adapter that lies in `paths` into a new folder, and verify what was written.

    Args:
        tokens: New names for its tokens, in the files' order.
        formats: As of `export`; by default the exact changes: `delta` for whole matrices, `diffusers` for factors.

    Raises:
        DataError: A file is missing, damaged, wants to run code, or does not fit the base.
        UsageError: The output is not empty, or the names are not as many as the tokens.
        VerificationError: A written file does not give back what was read.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"output {folder} exists and is not an empty folder; name a new one")
    weights = AdapterWeights()
    for path in map(Path, paths):
        found = read_foreign(path, base)
        try:
            weights = weights.merge(found)
        except UsageError as error:
            raise DataError(f"{path}: {error}; import it by itself") from error
    _check_widths(weights, base)
    if tokens and len(tokens) != len(weights.tokens):
        known = ", ".join(weights.tokens) or "(none)"
        raise UsageError(f"{len(tokens)} names for the tokens {known}; give one for each")
    weights.tokens = dict(zip(tokens or weights.tokens, weights.tokens.values(), strict=True))
    if not formats:
        formats = ["delta" if weights.dense or weights.parameters else "diffusers"]
        if formats == ["delta"]:  # which holds no factors
            weights.dense |= {layer: weights.delta(layer) for layer in weights.low_rank}
            weights.low_rank = {}
    sources = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in map(Path, paths)}
    files = export(weights, folder, base, folder.resolve().name or "adapter", formats, {"imported": sources})
    report = verify(files, base, weights, "a photo of " + (" and ".join(weights.tokens) or "something"))
    return ImportReport(
        str(folder), dict(Counter(layer.partition(".")[0] for layer in weights.layers())), len(weights.parameters),
        list(weights.tokens), largest_change(weights, base), [str(item.path) for item in files],
        max((f.largest_error for f in report.files), default=0.0),
    )  # fmt: skip


def read_foreign(path: Path, base: Base) -> AdapterWeights:
    """Read one file of another program: Custom Diffusion's in any of its layouts, else what `litp sample` reads.

    Raises:
        DataError: See `import_files`.
    """
    if not path.is_file():
        raise DataError(f"adapter file {path} does not exist")
    if path.suffix.lower() in PICKLES or is_pickle(path):
        content = read_pickle(path)
    else:
        content, _ = read_file(path)
        if not is_custom_diffusion(content):
            return read_adapter(path, base)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{path} holds no weights by name")
    if is_custom_diffusion(content):
        return parse_custom_diffusion(content, base, path)
    return parse(_tensors(content, path), {}, base, path)


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    if others := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise DataError(f"{path}: {others[0]!r} is no tensor; this is no adapter file that is known")
    check_tensors(content, path)
    return {name: tensor.detach() for name, tensor in content.items()}



def _check_widths(weights: AdapterWeights, base: Base) -> None:
    widths = [added.width for added in base.added_rows]
    for token, rows in weights.tokens.items():
        if [tuple(row.shape[1:]) for row in rows] != [(width,) for width in widths]:
            shapes = ", ".join(str(tuple(row.shape)) for row in rows)
            raise DataError(f"token {token} has rows {shapes}, the text encoders of {base.source} take widths {widths}")
