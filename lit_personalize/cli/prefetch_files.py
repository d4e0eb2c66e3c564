"""What the resolved configuration of a run opens, where it lies, and what of it is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError
from lit_personalize.model_files import HUB_ID, model_files, pipeline_files, snapshot
from lit_personalize.tensor_files import read_header

ADAPTER_FILES = {"ZipLoRA": ("content", "style")}
"""Adapters that are made from adapter files, and their options that name those."""
PACKAGED = "in the package"


@dataclass
class Needed:
    """One thing that a run opens.

    Args:
        what: For people.
        key: Of the configuration that names it; "" of what an option names.
        given: As it is named there.
        fix: How to get what is missing.
        files: What lies where now -> its place below `to`.
        value: What the key becomes in the copied folder, if it is copied.
        missing: Why it is not whole.
    """

    what: str
    key: str
    given: str
    fix: str = ""
    places: dict[Path, str] = field(default_factory=dict)
    value: str | None = None
    missing: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def files(self) -> list[Path]:
        return list(self.places)

    def take(self, files: Iterable[Path], start: Path, to: str) -> None:
        """Add files below `start`, whose places are the same below `to`, which the key becomes."""
        self.places |= {path: f"{to}/{path.relative_to(start).as_posix()}" for path in files}
        self.value = to


def collect(
    config: dict[str, Any], clip: str | None, dino: str | None, fetch: bool, cache: Path | None
) -> list[Needed]:
    """Everything that fit, sampling, evaluation and export open.

    Args:
        config: Resolved.
        clip, dino: For evaluation: directories, or ids of a hub.
        fetch: Ask hubs and URLs for what is not here.
        cache: Folder of the hub's client.
    """
    options: dict[str, Any] = config["model"].get("init_args") or {}
    base = str(options["base"])
    needs = [_base(base, options.get("base_config"), fetch, cache)]
    if options.get("base_config"):
        needs.append(_configs(str(options["base_config"]), fetch, cache))
    saved = config.get("checkpoint") or {}
    for what, key, given in (
        ("CLIP of checkpoint.best", "checkpoint.clip", saved.get("clip") if saved.get("best") else None),
        ("CLIP of litp evaluate", "", clip),
        ("ViT of litp evaluate", "", dino),
    ):
        if given:
            needs.append(_model(what, key, str(given), fetch, cache, text="CLIP" in what))
    if base == "tinyworld" and not clip:
        needs.append(_embedded("CLIP of the embedded base", "clip"))
    for i, adapter in enumerate(options.get("adapters") or []):
        for option in ADAPTER_FILES.get(str(adapter.get("class_path", "")).rpartition(".")[2], ()):
            key = f"model.init_args.adapters.{i}.init_args.{option}"
            needs.append(_adapter(f"adapter {i}: {option}", key, str((adapter.get("init_args") or {})[option])))
    data = config.get("data") or {}
    if str(data.get("class_path", "")).rpartition(".")[2] != "PersonalizationData":
        unknown = Needed("data", "data", str(data.get("class_path")), note="files of this class are not known")
        return [*needs, unknown]
    return [*needs, *_data(data.get("init_args") or {}, fetch)]


# ---- models ---------------------------------------------------------------------------------------------------------


def _local(need: Needed, pipeline: bool, fetch: bool, cache: Path | None) -> Path | None:
    """The directory or file that is meant; None, with the reason noted, where it is not here."""
    path = Path(need.given).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(need.given):
        need.missing, need.fix = [f"{path.absolute()} does not exist"], "copy it there, or name where it lies"
        return None
    need.fix = "litp prefetch --fetch, on a machine with network"
    try:
        path = snapshot(need.given, pipeline, fetch, cache)
    except DataError as error:
        need.missing = [str(error)]
        return None
    need.note = "from the hub's cache"
    return path


def _base(base: str, config: str | None, fetch: bool, cache: Path | None) -> Needed:
    if base == "tinyworld":
        return _embedded("base", "base")
    need = Needed("base", "model.init_args.base", base)
    path = _local(need, True, fetch, cache)
    if path is None:
        return need
    if path.is_file():
        need.fix = need.fix or "copy the file again"
        need.take([path], path.parent, "models/base")
        need.value = f"models/base/{path.name}"  # its name is part of the base's fingerprint
        if path.suffix != ".safetensors":
            need.missing.append(f"{path} is no .safetensors file; others may run code and are not read")
        else:
            need.missing += _damage(path)
        if not config:
            need.missing.append(f"{path.name} is a single file: name configs and tokenizers in base_config")
        return need
    files, need.missing = pipeline_files(path)
    need.fix = need.fix or "copy the complete diffusers directory again, or name a hub id and give --fetch"
    need.take(files, path, "models/base")
    return need


def _configs(given: str, fetch: bool, cache: Path | None) -> Needed:
    if given == "tinyworld":
        return _embedded("configs and tokenizers", "base")
    need = Needed("configs and tokenizers", "model.init_args.base_config", given)
    if path := _local(need, True, fetch, cache):
        files, need.missing = pipeline_files(path, weights=False)
        need.fix = need.fix or "copy the diffusers directory again; of its weights none is needed"
        need.take(files, path, "models/base_config")
    return need


def _model(what: str, key: str, given: str, fetch: bool, cache: Path | None, text: bool) -> Needed:
    need = Needed(what, key, given)
    if path := _local(need, False, fetch, cache):
        files, need.missing = model_files(path, text)
        need.fix = need.fix or "copy the transformers directory again, or name a hub id and give --fetch"
        name = Path(given).name
        need.take(files, path, f"models/{'clip' if text else 'vit'}-{name}")
    return need


def _embedded(what: str, part: str) -> Needed:
    from lit_personalize.backbones.loading import tinyworld_directory

    folder = tinyworld_directory().parent / part
    need = Needed(what, "", "tinyworld", fix="install the package again", note=PACKAGED)
    files, need.missing = pipeline_files(folder) if part == "base" else model_files(folder, True)
    need.places = {path: "" for path in files}
    return need


def _adapter(what: str, key: str, given: str) -> Needed:
    need = Needed(what, key, given, fix="train or copy it first, or name where it lies")
    place = Path(given)
    home = place / "exports" if (place / "exports").is_dir() else place
    files = [home] if home.is_file() else sorted(path for path in home.rglob("*") if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        need.missing = [f"{place} holds no adapter file"]
    for path in files:
        need.missing += _damage(path) if path.suffix == ".safetensors" else []
    to = f"adapters/{what.replace(': ', '-').replace(' ', '-')}"
    need.take(files, home.parent if home.is_file() else home, to)
    need.value = f"{to}/{home.name}" if home.is_file() else to
    return need


def _damage(path: Path) -> list[str]:
    try:
        read_header(path)
    except DataError as error:
        return [str(error)]
    return []


# ---- data -----------------------------------------------------------------------------------------------------------


def _data(data: dict[str, Any], fetch: bool) -> list[Needed]:
    needs = []
    for i, concept in enumerate(data.get("concepts") or []):
        key = f"data.init_args.concepts.{i}"
        needs.append(_folder(f"concept {i}", f"{key}.path", str(concept["path"]), f"data/concept-{i}"))
        if concept.get("masks"):
            needs.append(_folder(f"masks {i}", f"{key}.masks", str(concept["masks"]), f"data/masks-{i}"))
    sets = data.get("regularization") or []
    for i, one in enumerate(sets if isinstance(sets, list) else [sets]):
        key = f"data.init_args.regularization{f'.{i}' if isinstance(sets, list) else ''}"
        if one.get("shards"):
            needs.append(_shards(i, key, one, fetch))
        elif one.get("folder"):
            need = _folder(f"set {i}", f"{key}.folder", str(one["folder"]), f"data/set-{i}")
            needs.append(_with_list(need, Path(one["folder"])))
        else:
            given = str(one.get("cache") or "regularization")
            need = _folder(f"set {i}", f"{key}.cache", given, f"data/generated-{i}", optional=True)
            need.note = "drawn by the base when training begins, or now with --cache"
            needs.append(need)
    if cache := data.get("cache_dir"):
        need = _folder("latents and text states", "data.init_args.cache_dir", str(cache), "cache", optional=True)
        need.note = "what it lacks is encoded when training begins, or now with --cache"
        needs.append(need)
    return needs


def _folder(what: str, key: str, given: str, to: str, optional: bool = False) -> Needed:
    from lit_datamodules.errors import DataError as NoPictures
    from lit_datamodules.image_files import list_images

    need = Needed(what, key, given, fix="copy it there, or name where it lies")
    folder = Path(given)
    found = (path for path in folder.rglob("*") if path.is_file())
    files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not optional:
        try:
            list_images(folder)
        except NoPictures as error:
            need.missing = [str(error)]
    need.take(files, folder, to)
    return need


def _with_list(need: Needed, folder: Path) -> Needed:
    """A set whose pictures `images.txt` names: those that lie elsewhere would not be copied."""
    listed = folder / "images.txt"
    if listed.is_file():
        need.missing = []
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            name = line.strip()
            near = (folder / name, folder / "images" / Path(name).name, folder / Path(name).name)
            if name and not any(path.is_file() and path.is_relative_to(folder) for path in near):
                need.missing.append(f"{listed} names {name}, which is not in {folder}")
        need.fix = "copy these pictures into the folder; their names are looked for there first"
    return need


def _shards(number: int, key: str, one: dict[str, Any], fetch: bool) -> Needed:
    from lit_datamodules.errors import DataError as NotThere
    from lit_datamodules.shard_access import fetch_all
    from lit_datamodules.shard_paths import RemoteShard, shard_paths

    given, kept = str(one["shards"]), one.get("fetch_to")
    need = Needed(f"set {number}", f"{key}.shards", given, fix="copy them there, or name where they lie")
    try:
        shards = shard_paths(given, Path(kept) if kept else None)
    except NotThere as error:
        need.missing = [str(error)]
        return need
    failed = fetch_all(shards) if fetch else {}
    to = f"data/set-{number}"
    names: list[str] = []
    for shard in shards:
        if isinstance(shard, RemoteShard):
            need.key, need.value = f"{key}.fetch_to", to  # they are known by their URLs, wherever they lie
            if shard.path.is_file():
                files = [path for path in shard.path.parent.glob(f"{shard.path.name}*") if path.is_file()]
                need.places |= {p: f"{to}/{p.relative_to(shard.folder).as_posix()}" for p in files}
            else:
                need.missing.append(failed.get(shard.url) or f"{shard.url} is not in {shard.folder}")
                need.fix = "litp prefetch --fetch, on a machine with network"
        else:
            name = shard.name if shard.name not in names else f"{len(names)}-{shard.name}"
            names.append(name)
            need.places[shard] = f"{to}/{name}"
            if (index := shard.with_name("shards.json")).is_file():
                need.places.setdefault(index, f"{to}/shards.json")
    if names:
        need.value = f"{to}/{names[0]}" if len(names) == 1 else f"{to}/{{{','.join(names)}}}"
    return need
