"""Pictures over prompts, seeds, adapters and strengths, each as it is drawn alone.

Every group of adapters gets a base of its own, for a token that one of them brings changes how the others' prompts
are read: two runs that both learned `<new1>` stand side by side, and a cell is the picture of its group by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.export.loading import exports_of, load_adapter
from lit_personalize.sampling.mixing import Prompt
from lit_personalize.sampling.sampler import SamplingOptions, generate


@dataclass(frozen=True)
class Source:
    """An adapter as it is asked for: its name in pictures, and how a base gets it."""

    label: str
    attach: Callable[[Base], LoadedAdapter]


def source_of(entry: str, force: bool = False) -> Source:
    """Read `PLACE@STRENGTH,PART=STRENGTH,...`, a file, folder or run with its strengths; see `LoadedAdapter`.

    Raises:
        UsageError: What stands behind the @ are no strengths.
    """
    path, scale, blocks = split_strengths(entry)
    label = path.name.removesuffix(".safetensors") or str(path)
    given = [*([f"{scale:g}"] if scale != 1 else []), *(f"{part}={s:g}" for part, s in blocks.items())]
    label += f" @ {', '.join(given)}" if given else ""
    return Source(label, lambda base: load_adapter(exports_of(path), base, scale, force, blocks))


def split_strengths(entry: str) -> tuple[Path, float, dict[str, float]]:
    """Path, strength and strengths by block of `PATH@0.8,mid_block=0`; a path that exists may hold an @ itself.

    Raises:
        UsageError: What stands behind the @ are no strengths.
    """
    path, at, behind = entry.rpartition("@")
    if not at or Path(entry).exists():
        return Path(entry), 1.0, {}
    scale, blocks = 1.0, {}
    for number, item in enumerate(behind.split(",")):
        part, equals, value = item.rpartition("=")
        try:
            strength = float(value)
            if not math.isfinite(strength) or (not part.strip() if equals else number):
                raise ValueError(item)
        except ValueError as error:
            raise UsageError(
                f"{entry}: {item!r} behind the @ is no strength; write FILE@0.8, or FILE@0.8,mid_block=0"
            ) from error
        if equals:
            blocks[part.strip()] = strength
        else:
            scale = strength
    return Path(path), scale, blocks


@dataclass(frozen=True)
class Cells:
    """Pictures with their axes."""

    prompts: list[str]
    seeds: list[int]
    groups: list[str]
    """Names of adapters that are applied together."""
    strengths: list[float]
    """What the adapters' own strengths are multiplied by."""
    pictures: np.ndarray
    """uint8 `[prompts, seeds, groups, strengths, H, W, 3]`."""

    def axes(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Labels of rows and columns, each (outer, inner): prompts and seeds down, adapters and strengths across.

        Where there is one group at one strength, seeds go across.
        """
        seeds = [f"seed {seed}" for seed in self.seeds]
        if len(self.groups) * len(self.strengths) == 1:
            return [(prompt, "") for prompt in self.prompts], [(self.groups[0], seed) for seed in seeds]
        strengths = [f"strength {s:g}" for s in self.strengths] if self.strengths != [1.0] else [""]
        rows = [(prompt, seed) for prompt in self.prompts for seed in seeds]
        return rows, [(group, strength) for group in self.groups for strength in strengths]

    def table(self) -> np.ndarray:
        """The pictures by row and column of `axes`, uint8 `[rows, columns, H, W, 3]`."""
        rows, columns = self.axes()
        return self.pictures.reshape(len(rows), len(columns), *self.pictures.shape[-3:])


def draw_cells(
    load: Callable[[], Base],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    groups: Sequence[Sequence[Source]] = ((),),
    strengths: Sequence[float] = (1.0,),
    options: SamplingOptions | None = None,
    resolution: int | None = None,
) -> Cells:
    """Draw every prompt with every seed, every group of adapters and every strength.

    Args:
        load: Gives a fresh base; called once for each group.
        groups: Adapters that are applied together; an empty group is the untouched base.
        strengths: Multiply the adapters' own.

    Raises:
        DataError: An adapter file is missing, damaged, or made for another base.
        UsageError: An adapter changes no layer of a block that was named.
    """
    asked, numbers = [p for p in prompts for _ in seeds], list(seeds) * len(prompts)
    columns = []
    for group in groups:
        base = load()
        adapters = [source.attach(base) for source in group]
        own = [adapter.scale for adapter in adapters]
        for strength in strengths:
            for adapter, scale in zip(adapters, own, strict=True):
                adapter.scale = strength * scale
            columns.append(generate(base, asked, numbers, adapters, options, resolution))
        del base, adapters  # before the next one is loaded
    sides = columns[0].shape[1:]
    pictures = np.stack(columns, 1).reshape(len(prompts), len(seeds), len(groups), len(strengths), *sides)
    names = [" + ".join(source.label for source in group) for group in groups]
    return Cells([str(p) for p in prompts], list(seeds), names, list(strengths), pictures)
