"""Pictures with captions near the concept's class: from shards, from a folder, or drawn by the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_datamodules import manifest
from lit_datamodules.captions import read_caption
from lit_datamodules.concept_folder import FolderContents, record_of, sample_of
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.generated_sets import GeneratedSet, draw_set
from lit_datamodules.image_files import list_images, read_image
from lit_datamodules.manifest import Record
from lit_datamodules.order import PRIOR
from lit_datamodules.protocols import Generator
from lit_datamodules.shard_sets import ROLE, read_shards


@dataclass
class Regularization:
    """One regularization set. Give exactly one of `shards`, `folder` and `generate`.

    Args:
        shards: WebDataset tar files with `jpg|png|webp`, `txt` and optionally `json` per sample, such as
            `shards/{00000..00003}.tar`.
        folder: Pictures with sidecar `.txt` captions, or listed line by line in `images.txt` and `caption.txt`.
        generate: Number of pictures that the untouched base draws from `prompt`.
        prompt: Caption of generated pictures, and of those in a folder that have none.
        per_batch: Pictures per batch; None takes as many as there are instances.
        share: Of several sets, how much of the pictures of a batch are this one's, such as 2 beside another's 1; None
            takes that of the concept in the same place where there are as many, else 1.
        stream: Leave the pictures of shards where they are and read each when a step shows it: for sets that are
            larger than memory. Their headers are read at the start; damage further in is found when they are shown.
        cache: Folder in which generated sets are kept, for all runs.
        seed: First seed of generated pictures.
    """

    shards: str | None = None
    folder: str | None = None
    generate: int = 0
    prompt: str = ""
    per_batch: int | None = None
    share: float | None = None
    stream: bool = False
    cache: str = "regularization"
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(map(bool, (self.shards, self.folder, self.generate))) != 1 or self.generate < 0:
            raise DataOptionError("a regularization set has exactly one of shards, folder and generate")
        if self.generate and not self.prompt:
            raise DataOptionError("regularization.generate needs regularization.prompt, such as 'photo of a cat'")
        if self.stream and not self.shards:
            raise DataOptionError("regularization.stream reads pictures from shards; a folder is read at the start")
        if self.share is not None and self.share <= 0:
            raise DataOptionError(f"regularization.share must be above 0, not {self.share}")
        if self.per_batch is not None and self.per_batch < 1:
            raise DataOptionError(f"regularization.per_batch must be at least 1, not {self.per_batch}")

    def generated(self, identity: str) -> GeneratedSet:
        """What `generate` asks of a base of this identity."""
        return GeneratedSet(self.prompt, self.generate, self.seed, identity)


def read_set(
    index: int, options: Regularization, longest: int, generator: Generator | None, identity: str
) -> FolderContents:
    """Read (or draw, then read) one set; what cannot be used becomes a record with its reason.

    Args:
        index: Number of the set.
        longest: Shorter side in pixels above which pictures are shrunk to save memory.
        generator: Draws a set that is to be generated and is not there yet.
        identity: Of what draws: the base and every setting that decides its pictures.

    Raises:
        DataError: A folder or shard is missing or empty.
        DataOptionError: A set is to be generated and no base is bound.
    """
    if options.shards:
        return read_shards(index, options.shards, longest, options.stream)
    folder = Path(options.folder or draw_set(options.generated(identity), Path(options.cache), generator))
    return read_folder(index, folder, options.prompt, longest)


# ---- folders --------------------------------------------------------------------------------------------


def read_folder(index: int, folder: Path, prompt: str, longest: int) -> FolderContents:
    """Pictures of a folder with their captions, or with `prompt`."""
    contents = FolderContents()
    listed = folder / "images.txt"
    entries = _listed(folder) if listed.is_file() else [(path, _caption_of(path)) for path in list_images(folder)]
    sidecars: set[Path] = set()
    for path, source in entries:
        if isinstance(source, Path):
            sidecars.add(source)
        try:
            caption = read_caption(source) if isinstance(source, Path) else source or prompt
            if not caption:
                raise DataError(f"{path} has no caption {path.stem}.txt, and regularization.prompt is empty; give one")
            picture = read_image(path)
        except DataError as error:
            contents.records.append(Record(str(path), "skipped", str(error), ROLE))
            continue
        origin = source.name if isinstance(source, Path) else "caption.txt" if source else "prompt"
        record = record_of(picture, str(path), path.read_bytes(), ROLE, "", caption, origin)
        contents.records.append(record)
        contents.samples.append(sample_of(picture, record, (caption,), PRIOR, index, longest))
    lists = [p for p in (listed, folder / "caption.txt", folder / "urls.txt") if listed.is_file() and p.is_file()]
    for path in [*sorted(sidecars), *lists]:
        contents.records.append(Record(str(path), "used", "captions and lists", "caption"))
    contents.records += manifest.ignore_rest(folder, (record.path for record in contents.records))
    return contents


def _caption_of(path: Path) -> Path | str:
    sidecar = path.with_suffix(".txt")
    return sidecar if sidecar.is_file() else ""


def _listed(folder: Path) -> list[tuple[Path, Path | str]]:
    """Pairs of `images.txt` and `caption.txt`, which match line by line."""
    lines = []
    for name in ("images.txt", "caption.txt"):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder} has images.txt but no {name}; give one caption a line")
        try:
            lines.append([line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (offset {error.start}); save it as UTF-8") from error
    images, captions = lines
    if len(images) != len(captions):
        raise DataError(f"{folder}: images.txt has {len(images)} lines, caption.txt {len(captions)}; they must match")
    return [(_find(folder, line), caption) for line, caption in zip(images, captions, strict=True)]


def _find(folder: Path, line: str) -> Path:
    """A listed picture: beside the list, below it, or where the line says."""
    name = Path(line).name
    for candidate in (folder / line, folder / "images" / name, folder / name):
        if candidate.is_file():
            return candidate
    return Path(line)
