"""A corpus on disk: thousands of adapters of one layout as rows, in shards, with a parquet index and a manifest.

    corpus.json              layout, base, initial seed, dtype: written once
    index.parquet            one line per row (`lit_personalize.corpus.index`)
    shard-00000.safetensors  rows [n, D] (`lit_personalize.corpus.shards`)

Rows are only ever added. A shard is written first, then the index that names it takes its place: whoever is killed
leaves the corpus as it was, or as it should be. One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.corpus import index as index_files
from lit_personalize.corpus.index import COLUMNS, INDEX, LABEL
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.shards import (
    DTYPES,
    Shard,
    decode,
    encode,
    pieces,
    row_checksums,
    shard_name,
    spread,
    write_shard,
)
from lit_personalize.errors import DataError, RunLockedError, UsageError

MANIFEST = "corpus.json"
FORMAT = 1
ADVISED = 64
"""Rows that the disk is asked for at once."""
log = logging.getLogger(__name__)


class Corpus:
    """Adapters as rows; make one with `create`, read one with `open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], index: pa.Table):
        self.folder, self.manifest = folder, manifest
        self.layout = Layout.from_json(manifest["layout"])
        self.base_fingerprint: str = manifest["base_fingerprint"]
        self.init_seed: int | None = manifest["init_seed"]
        """From which every adapter's A began; None where that is not known."""
        self.dtype: str = manifest["dtype"]
        self.shard_rows: int = manifest["shard_rows"]
        self._sizes = [s.size for s in self.layout.slices]
        self._writing = False
        self._set_index(index)

    @classmethod
    def create(
        cls,
        folder: Path,
        layout: Layout,
        *,
        base_fingerprint: str,
        init_seed: int | None,
        dtype: str = "float16",
        recipe: str = "",
        shard_rows: int = 512,
        base: str = "",
    ) -> Corpus:
        """Make an empty corpus in a folder that holds none.

        Args:
            init_seed: From which A of all adapters began. None: not known, or not one (the gauge is unknown).
            base: Where the base is found.

        Raises:
            UsageError: There is one, or the dtype is unknown.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is none of a corpus: use {', '.join(DTYPES)}")
        if shard_rows < 1:
            raise UsageError(f"shards of {shard_rows} rows hold nothing: use 512 or so")
        manifest = {
            "format": FORMAT, "width": layout.width, "dtype": dtype, "shard_rows": shard_rows,
            "gauge": "unknown" if init_seed is None else "known", "init_seed": init_seed,
            "base_fingerprint": base_fingerprint, "base": base, "recipe": recipe, "layout": layout.to_json(),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with _owned(folder):
            if (folder / MANIFEST).exists():
                raise UsageError(f"{folder} holds a corpus already: add to it, or name another folder")
            index_files.write_index(folder / INDEX, index_files.empty_index())
            atomic.write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Read manifest and index.

        Raises:
            DataError: There is no corpus, or a damaged one, or one of a later format.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder} holds no corpus ({MANIFEST}): make one with litp bank pack")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = manifest["format"]
            if found == FORMAT:
                return cls(folder, manifest, index_files.read_index(folder / INDEX))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error!r}): restore it, or pack the adapters again") from error
        raise DataError(f"{path} has format {found}, this program reads {FORMAT}: upgrade it")

    # ---- what it is -------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """D."""
        return self.layout.width

    @property
    def gauge(self) -> str:
        """ "known" where all adapters began from one A, so that their numbers can be compared; else "unknown"."""
        return "unknown" if self.init_seed is None else "known"

    @property
    def fingerprint(self) -> str:
        """Of all numbers, of what they mean, and of whose they are."""
        told = {name: self.manifest[name] for name in ("layout", "dtype", "base_fingerprint", "init_seed")}
        rows = [self.ids, self.index["checksum"].to_pylist()]
        return hashlib.sha256(json.dumps([told, rows], sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids)}

    def labels(self) -> dict[str, Tensor]:
        """Labels that are numbers or yes/no (1/0), each `[n]`, fp32, NaN where an adapter has none."""
        found = {}
        for name in self.index.column_names:
            column = self.index[name]
            if name.startswith(LABEL) and not pa.types.is_string(column.type):
                values = [float("nan") if value is None else float(value) for value in column.to_pylist()]
                found[name.removeprefix(LABEL)] = torch.tensor(values, dtype=torch.float32)
        return found

    def label_counts(self) -> dict[str, int]:
        """How many adapters have each label."""
        names = [name for name in self.index.column_names if name.startswith(LABEL)]
        return {name.removeprefix(LABEL): len(self) - self.index[name].null_count for name in names}

    # ---- reading ----------------------------------------------------------------------------------

    def blocks(self, rows: int, out: Tensor | None = None) -> Iterator[Tensor]:
        """All rows in order, at most `rows` at a time, fp32 `[<=rows, D]`; out of core.

        Args:
            out: Memory for the blocks, `[rows, D]`, each of which then lives until the next one; else each has its own.
        """
        for first in range(0, len(self), rows):
            last = min(first + rows, len(self))
            block = torch.empty(last - first, self.width) if out is None else out[: last - first]
            done = 0
            for number, begin, end in pieces(self._starts, first, last):
                shard = self._shard(number)
                shard.read(begin, block[done : done + end - begin])
                done += end - begin
                shard.forget()
            yield block

    def gather(self, indices: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Rows by their number, in the order asked for, fp32 `[n, D]`.

        Args:
            out: Memory for them, of that shape, which may be used again.

        Raises:
            IndexError: There are not that many.
        """
        places = []
        for number in map(int, indices):
            if not -len(self) <= number < len(self):
                raise IndexError(f"row {number} of a corpus of {len(self)}")
            number %= len(self)
            shard = bisect_right(self._starts, number) - 1
            places.append((shard, number - self._starts[shard]))
        order = sorted(range(len(places)), key=places.__getitem__)  # as they lie on the disk
        found = torch.empty(len(places), self.width) if out is None else out
        for first in range(0, len(order), ADVISED):
            group = order[first : first + ADVISED]
            for place in group:
                self._shard(places[place][0]).expect(places[place][1])
            for place in group:
                shard, row = places[place]
                self._shard(shard).read(row, found[place : place + 1])
        for shard in {shard for shard, _ in places}:
            self._shard(shard).forget()
        return found

    def row(self, id: str) -> Tensor:  # noqa: A002 - the word of the index
        """The row of an adapter, fp32 `[D]`; its bytes are compared with their checksum.

        Raises:
            DataError: There is no such adapter, or it is damaged.
        """
        number = self._place(id)
        shard = bisect_right(self._starts, number) - 1
        place = number - self._starts[shard]
        if damage := self._damaged_rows(shard, [place]):
            raise DataError(f"{damage[0]}: restore the file")
        return self.gather([number])[0]

    def adapter(self, id: str) -> AdapterWeights:  # noqa: A002
        """An adapter as it was packed, but for rounding."""
        return self.layout.unflatten(self.row(id))

    def line(self, id: str) -> dict[str, Any]:  # noqa: A002
        """What the index says of an adapter.

        Raises:
            DataError: There is no such adapter.
        """
        found: dict[str, Any] = self.index.slice(self._place(id), 1).to_pylist()[0]
        return found

    def _place(self, id: str) -> int:  # noqa: A002
        if id not in self._places:
            raise DataError(f"{self.folder} has no adapter {id!r}: its ids stand in {INDEX}")
        return self._places[id]

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            told = self._files[number]
            self._open[number] = Shard(self.folder / told["file"], told["rows"], self.width, self.dtype, self._sizes)
        return self._open[number]

    def verify(self) -> list[str]:
        """Read everything; a sentence for each damaged shard, and for each row of it that is."""
        damage = []
        for number, told in enumerate(self._files):
            path = self.folder / told["file"]
            try:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == told["sha256"]:
                        continue
                found = self._damaged_rows(number, range(told["rows"]))
                damage += found or [f"{path} is damaged, its rows are not"]
            except FileNotFoundError:
                damage.append(f"{path} is missing, with rows {self._starts[number]} to {self._starts[number + 1] - 1}")
            except DataError as error:
                damage.append(str(error))
        return damage

    def _damaged_rows(self, number: int, rows: Sequence[int]) -> list[str]:
        shard, first = self._shard(number), self._starts[number]
        wanted = self.index["checksum"].slice(first, shard.rows).to_pylist()
        wrong = [row for row in rows if row_checksums(shard.stored[row : row + 1], shard.scales) != [wanted[row]]]
        if len(wrong) == shard.rows > 1:
            return [f"{shard.path}: all its rows are damaged, {first} to {first + shard.rows - 1} of the corpus"]
        return [f"{shard.path}: row {row}, adapter {self.ids[first + row]!r}, is damaged" for row in wrong]

    # ---- writing ----------------------------------------------------------------------------------

    def append(self, rows: Tensor, records: Sequence[Mapping[str, Any]]) -> None:
        """Add rows `[n, D]`, and for each a record: id, seed, loss, steps, recipe, labels {name: value}, ...

        All of them are in the corpus when this returns. Other keys of a record are kept as details.

        Raises:
            DataError: An id is there already, or twice; a row has another width or is not finite.
            RunLockedError: Another process is writing.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or len(rows) != len(records):
            raise DataError(f"rows {tuple(rows.shape)} with {len(records)} records: a corpus of D = {self.width}")
        with self.writing():
            for first in range(0, len(rows), self.shard_rows):
                last = first + self.shard_rows
                self._append_shard(rows[first:last].detach().float().cpu(), records[first:last])

    def _append_shard(self, rows: Tensor, records: Sequence[Mapping[str, Any]]) -> None:
        names = [str(record["id"]) for record in records]
        if twice := [name for name in names if name in self._places or names.count(name) > 1]:
            raise DataError(f"adapter {twice[0]!r} is in the corpus already, and a row is written once")
        if wrong := [name for name, row in zip(names, rows, strict=True) if not torch.isfinite(row).all()]:
            raise DataError(f"adapter {wrong[0]!r} holds NaN or infinite values: leave it out, or train it again")
        number = len(self._files)
        tensors = encode(rows, self._sizes, self.dtype)
        back = torch.empty_like(rows)
        decode(tensors["rows"], spread(tensors["scales"], self._sizes) if "scales" in tensors else None, back)
        errors = self._errors(back, rows)
        sums = row_checksums(tensors["rows"], tensors.get("scales"))
        lines = [
            {**_record(record, self), "shard": number, "row": place, "checksum": sums[place], "error": errors[place]}
            for place, record in enumerate(records)
        ]
        path = self.folder / shard_name(number)
        digest = write_shard(path, tensors, {"litp.corpus": str(FORMAT)})
        told = {"file": path.name, "rows": len(rows), "sha256": digest, "error": max(errors)}
        index = index_files.extended(self.index, lines, told)
        index_files.write_index(self.folder / INDEX, index)
        self._set_index(index)

    def _errors(self, found: Tensor, rows: Tensor) -> list[float]:
        """By row the largest relative error of a factor."""
        parts = zip((found - rows).split(self._sizes, dim=1), rows.split(self._sizes, dim=1), strict=True)
        shares = [change.norm(dim=1) / own.norm(dim=1).clamp(min=1e-30) for change, own in parts]
        errors: list[float] = torch.stack(shares).amax(dim=0).tolist()
        return errors

    def set_labels(self, labels: Mapping[str, Mapping[str, Any]]) -> None:
        """Set labels by id; those that are not named stay."""
        with self.writing():
            index = index_files.relabelled(self.index, labels)
            index_files.write_index(self.folder / INDEX, index)
            self._set_index(index)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one who writes, and see what others wrote before.

        Raises:
            RunLockedError: Another process is writing.
        """
        if self._writing:
            yield
            return
        with _owned(self.folder):
            self._set_index(index_files.read_index(self.folder / INDEX))
            self._clear()
            self._writing = True
            try:
                yield
            finally:
                self._writing = False

    def _clear(self) -> None:
        """Remove what a killed writer left: files that the index does not name."""
        named = {shard["file"] for shard in self._files}
        for path in [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(".tmp-*")]:
            if path.name not in named:
                path.unlink()

    def _set_index(self, index: pa.Table) -> None:
        self.index = index
        self.ids: list[str] = index["id"].to_pylist()
        self._files = index_files.shards_of(index)
        self._starts = [0, *accumulate(shard["rows"] for shard in self._files)]
        self._open: dict[int, Shard] = {}
        self.__dict__.pop("_places", None)


def _record(record: Mapping[str, Any], corpus: Corpus) -> dict[str, Any]:
    """A record with the columns of the index; what has none goes to `details`."""
    own = {"init_seed": corpus.init_seed, "base_fingerprint": corpus.base_fingerprint, **record}
    line = {name: own.pop(name, None) for name in COLUMNS if name != "details"}
    labels = own.pop("labels", None) or {}
    return {**line, "labels": labels, "details": json.dumps(own, default=str) if own else None}


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock of a corpus, until the end of the block or of this process, however it ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
            raise RunLockedError(f"{owner} adds to the corpus {folder}: wait for it, or end it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            log.warning("%s is on a file system without locks: let only one process add to it", folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
