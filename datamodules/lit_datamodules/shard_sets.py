"""A regularization set from WebDataset shards: read at the start, or left where it is and read as it is shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lit_datamodules.captions import decode_caption
from lit_datamodules.concept_folder import FolderContents, Sample, record_of, sample_of
from lit_datamodules.errors import DataError
from lit_datamodules.image_files import decode_image, size_of
from lit_datamodules.manifest import Record, sha256_of
from lit_datamodules.order import PRIOR
from lit_datamodules.shard_access import fetch_all, on_any_rank
from lit_datamodules.shard_paths import RemoteShard, Shard, shard_paths
from lit_datamodules.shard_writer import difference, stated
from lit_datamodules.stored_picture import StoredPicture
from lit_datamodules.tar_index import CAPTION_KEYS, IMAGE_KEYS, Entry, Member, index_tar

ROLE = "regularization"
FETCH_TO = "regularization.fetch_to"
MOST_FAULTS = 3
"""Of a shard that are told in full."""
HEAD = 1 << 15
"""Bytes in which the size of most pictures stands."""


def read_shards(
    index: int, pattern: str, longest: int, stream: bool = False, fetch_to: Path | None = None
) -> FolderContents:
    """Every sample of WebDataset shards, in their order; behind damage reading goes on.

    Shards that lie elsewhere are fetched to `fetch_to`, and known by their URLs all the same.
    """
    contents = FolderContents()
    shards = shard_paths(pattern, fetch_to, FETCH_TO)
    elsewhere = any(isinstance(shard, RemoteShard) for shard in shards)
    unfetched = on_any_rank(fetch_all(shards)) if elsewhere else {}
    for shard in shards:
        if str(shard) in unfetched:
            contents.records.append(Record(str(shard), "skipped", unfetched[str(shard)], ROLE))
        else:
            _read_shard(contents, index, shard, longest, stream)
    if not contents.samples and not any(record.fate == "skipped" for record in contents.records):
        raise DataError(f"regularization shards {pattern} hold no sample")
    return contents


def _read_shard(contents: FolderContents, index: int, shard: Shard, longest: int, stream: bool) -> None:
    path = shard if isinstance(shard, Path) else shard.path
    lies = str(shard) if isinstance(shard, Path) else f"{shard}, fetched to {path},"
    try:
        tar = index_tar(path)
        known = ((stated(path) or {}).get("sha256") or tar.identity) if stream else ""
        with path.open("rb") as file:
            for entry in tar.entries:
                _add_sample(contents, index, entry, f"{shard}:{entry.key}", path, file.fileno(), longest, known)
        wrong = [f"shard {lies} {fault.reason}{fault.key and f' ({fault.key})'}" for fault in tar.faults]
        wrong = [*wrong, *_differences(path, len(tar.entries), not stream)]
    except OSError as error:
        wrong = [f"cannot read shard {lies}: {error.strerror}"]
    if wrong:
        more = f"; and {len(wrong) - MOST_FAULTS} more faults" if len(wrong) > MOST_FAULTS else ""
        fix = "fetch or pack it again" if isinstance(shard, Path) else "remove that copy to fetch it again"
        told = f"{'; '.join(wrong[:MOST_FAULTS])}{more}; {fix}"
        contents.records.append(Record(str(shard), "skipped", told, ROLE))
    else:
        contents.records.append(Record(str(shard), "used", f"{len(tar.entries)} samples", ROLE))


def _differences(path: Path, count: int, hashed: bool) -> list[str]:
    """What contradicts the notes beside a shard, or an empty shard."""
    found = [] if count else [f"shard {path} holds no sample"]
    stats = path.with_name(f"{path.stem}_stats.json")
    if stats.is_file():
        try:
            expected = json.loads(stats.read_text(encoding="utf-8")).get("successes")
        except (ValueError, AttributeError, RecursionError):
            return [*found, f"{stats} is damaged"]
        if expected is not None and expected != count:
            found.append(f"shard {path} holds {count} samples, but {stats.name} counts {expected}")
    return [*found, *filter(None, [difference(path, hashed)])]


def _add_sample(
    contents: FolderContents, index: int, entry: Entry, name: str, shard: Path, fd: int, longest: int, stored: str
) -> None:
    """Read a sample; with the identity of its shard, `stored`, its picture stays there."""
    image, text = entry.first(IMAGE_KEYS), entry.first(CAPTION_KEYS)
    try:
        if image is None or text is None:
            lacking = "picture (jpg, png or webp)" if image is None else "caption (txt)"
            raise DataError(f"sample {name} has no {lacking}; pack the shard again")
        member = image[1]
        caption = decode_caption(os.pread(fd, text[1].size, text[1].offset), f"caption of sample {name}")
        stated_hash = _stated_hash(entry, fd)
        if stored:
            size, identity = _size_at(fd, member, name), f"{stored}:{member.offset}"
            picture = StoredPicture(shard, member, name, size, longest, identity, stated_hash)
            record = Record(name, "used", "", ROLE, "", size[1], size[0], caption=caption, caption_source=text[0])
            sample = Sample(picture, size, (caption,), name, PRIOR, index, record=record)
        else:
            data = os.pread(fd, member.size, member.offset)
            if stated_hash and sha256_of(data) != stated_hash:
                raise DataError(f"sample {name} is damaged: its sha256 is not the one that its json states")
            decoded = decode_image(data, f"sample {name}")
            record = record_of(decoded, name, data, ROLE, "", caption, text[0])
            sample = sample_of(decoded, record, (caption,), PRIOR, index, longest)
    except DataError as error:
        contents.records.append(Record(name, "skipped", str(error), ROLE))
        return
    contents.records.append(record)
    contents.samples.append(sample)


def _stated_hash(entry: Entry, fd: int) -> str:
    """The sha256 of the picture's bytes as packed; "" where the json does not state it.

    The field `sha256` of img2dataset is of the bytes before resizing, and says nothing of these.
    """
    member = entry.members.get("json")
    if member is None:
        return ""
    try:
        about = json.loads(os.pread(fd, member.size, member.offset))
    except (ValueError, RecursionError):  # a broken json holds nothing that training needs
        return ""
    return str(about.get("file_sha256", "")) if isinstance(about, dict) else ""


def _size_at(fd: int, member: Member, name: str) -> tuple[int, int]:
    """Height and width, from the picture's first bytes where they are enough."""
    try:
        return size_of(os.pread(fd, min(member.size, HEAD), member.offset), f"sample {name}")
    except DataError:
        return size_of(os.pread(fd, member.size, member.offset), f"sample {name}")
