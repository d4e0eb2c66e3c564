"""Streamed shards: the batches that memory would give, for any ranks and workers, with an exact cursor."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.manifest import sha256_of
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization
from lit_datamodules.shard_sets import read_shards
from lit_datamodules.shard_writer import MANIFEST, write_shards
from lit_datamodules.stored_picture import StoredPicture
from lit_datamodules.tar_index import index_tar
from lit_personalize.tinyworld.dataset import sample_pictures

Make = Callable[..., PersonalizationData]
COUNT = 23


@pytest.fixture
def make(base: Any, folder: Callable[..., Path], tmp_path: Path) -> Make:
    """A data module over five photos and 23 streamed regularization pictures in shards of five, as rank r of n."""
    photos, reg = folder(), tmp_path / "reg"
    rows = []
    for i, pixels in enumerate(sample_pictures(COUNT, 7).pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        about = json.dumps({"file_sha256": sha256_of(buffer.getvalue())}).encode()
        rows.append({"png": buffer.getvalue(), "txt": f"picture {i}".encode(), "json": about})
    write_shards(rows, reg, per_shard=5)
    (reg / MANIFEST).unlink()  # with it, damage would be found at once

    def build(
        rank: int = 0, ranks: int = 1, steps: int = 40, stream: bool = True, **options: Any
    ) -> PersonalizationData:
        sets = Regularization(shards=str(reg / "*.tar"), stream=stream, per_batch=2)
        concept = Concept(str(photos), "cat", "<new1>")
        data = PersonalizationData([concept], 32, sets, **{"batch_size": 1, **options})
        data.bind(base, base)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=ranks, max_steps=steps, accumulate_grad_batches=1
        )
        data.setup("fit")
        return data

    return build


def prior_ids(batch: dict[str, Any]) -> list[str]:
    return [name.rpartition(":")[2] for name, role in zip(batch["sample_id"], batch["role"], strict=True) if role]


def test_streamed_batches_are_those_from_memory(make: Make) -> None:
    streamed, held = make(), make(stream=False, cache_latents=False)
    assert all(isinstance(s.picture, StoredPicture) for s in streamed.samples if s.role)
    for step in range(3):
        ours, theirs = streamed.batch_of_step(step), held.batch_of_step(step)
        assert ours["sample_id"] == theirs["sample_id"] and ours["captions"] == theirs["captions"]
        assert torch.equal(ours["pixels"], theirs["pixels"])


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_ranks_share_the_shards_however_workers_start(make: Make, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, two workers each, and no RANK in the environment: an epoch has every picture once."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    seen: Counter[str] = Counter()
    batches = -(-COUNT // 4)
    for rank in (0, 1):
        data = make(rank, 2, num_workers=2, worker_start=start)
        single = make(rank, 2)
        for ours, alone in zip(data.train_dataloader(), islice(single.train_dataloader(), batches), strict=False):
            assert ours["sample_id"] == alone["sample_id"] and torch.equal(ours["pixels"], alone["pixels"])
            seen.update(prior_ids(ours))
        data.teardown()
    assert sum(seen.values()) == 4 * batches
    assert set(seen) == {e.key for i in range(5) for e in index_tar(_shard(make, i)).entries} and len(seen) == COUNT
    assert max(seen.values()) <= 2, "only the places left over begin the next epoch"


def _shard(make: Make, number: int) -> Path:
    return Path(make().regularization[0].shards.replace("*", f"{number:05d}"))  # type: ignore[union-attr]


@pytest.mark.parametrize(("ranks", "workers", "after"), [(1, 0, 2), (1, 2, 0), (2, 0, 0), (2, 2, 2)])
def test_a_resumed_stream_goes_on_at_the_very_next_sample(make: Make, ranks: int, workers: int, after: int) -> None:
    for rank in range(ranks):
        whole = [b["sample_id"] for b in make(rank, ranks, 12).train_dataloader()]
        first = make(rank, ranks, 12, num_workers=workers)
        begun = [b["sample_id"] for b in islice(first.train_dataloader(), 7)]
        state = first.state_dict()
        first.teardown()
        second = make(rank, ranks, 12, num_workers=after)
        second.load_state_dict(state)
        rest = [b["sample_id"] for b in second.train_dataloader()]
        second.teardown()
        assert begun + rest == whole


def test_another_number_of_ranks_is_refused_or_loses_and_doubles_nothing(make: Make) -> None:
    def states(data: list[PersonalizationData], batches: int) -> tuple[list[str], dict[str, Any]]:
        ids = [n for d in data for b in islice(d.train_dataloader(), batches) for n in prior_ids(b)]
        assert len({str(d.state_dict()) for d in data}) == 1, "the cursor is that of the training, not of a rank"
        return ids, data[0].state_dict()

    whole = [n for b in islice(make().train_dataloader(), 20) for n in prior_ids(b)]
    before, state = states([make(rank, 2) for rank in (0, 1)], 3)
    refused = make()
    refused.load_state_dict(state)
    with pytest.raises(DataOptionError, match=r"2 ranks, this is one on 1: .* data\.elastic"):
        refused.train_dataloader()
    for ranks, batches in ((1, 6), (3, 2)):
        later = [make(rank, ranks, elastic=True) for rank in range(ranks)]
        for data in later:
            data.load_state_dict(state)
        after, again = states(later, batches)
        assert Counter(before + after) == Counter(whole[:24]), "23 pictures and one of the next epoch"
        back = make(elastic=True)
        back.load_state_dict(again)
        assert [n for b in islice(back.train_dataloader(), 8) for n in prior_ids(b)] == whole[24:40]


def damage(path: Path, entry: int) -> str:
    """Overwrite the middle of a picture, whose header stays whole; returns the sample's key."""
    found = index_tar(path).entries[entry]
    member = found.members["png"]
    with path.open("r+b") as file:
        file.seek(member.offset + member.size // 2)
        file.write(b"damage")
    return found.key


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_that_shows_late_is_named_or_counted(make: Make, workers: int) -> None:
    key = damage(_shard(make, 1), 2)
    strict = make(num_workers=workers)
    with pytest.raises(DataError, match=f"00001.tar:{key}") as stop:
        list(strict.train_dataloader())
    assert "Traceback" not in str(stop.value)
    strict.teardown()
    tolerant = make(num_workers=workers, strict=False, max_skipped=1)
    ids = [b["sample_id"] for b in tolerant.train_dataloader()]
    tolerant.teardown()
    assert not any(key in name for batch in ids for name in batch) and all(len(batch) == 3 for batch in ids)
    [skipped] = [record for record in tolerant.records if record.fate == "skipped"]
    assert skipped.path.endswith(f"00001.tar:{key}") and "is damaged: its sha256" in skipped.reason
    resumed = make(strict=False, max_skipped=1)
    cursor = {"cursor": 9, "in_epoch": 9, "world_size": 1, "shown": [[9], 18]}
    resumed.load_state_dict({**tolerant.state_dict(), "cursor": cursor})
    assert [b["sample_id"] for b in resumed.train_dataloader()] == ids[9:]


def test_more_damage_than_is_allowed_and_nothing_left(make: Make) -> None:
    for number in range(5):
        for entry in range(len(index_tar(_shard(make, number)).entries)):
            damage(_shard(make, number), entry)
    with pytest.raises(DataError, match=r"3 inputs cannot be used, 2 may be skipped"):
        list(make(strict=False, max_skipped=2).train_dataloader())
    with pytest.raises(DataError, match="no picture of the set of .* can be read"):
        list(make(strict=False, max_skipped=99).train_dataloader())


def test_a_flipped_byte_of_a_jpeg_is_found_where_its_hash_is_stated(make: Make, tmp_path: Path) -> None:
    """JPEG decoders draw on through damage; sets that retrieval packed state the hash of every picture."""
    buffer = io.BytesIO()
    Image.fromarray(sample_pictures(1, 3).pixels[0]).save(buffer, "JPEG", quality=97)
    data = buffer.getvalue()
    flipped = data[:-300] + bytes([data[-300] ^ 8]) + data[-299:]
    for stated, found in ((data, True), (flipped, False)):
        about = json.dumps({"file_sha256": sha256_of(stated)}).encode()
        write_shards([{"jpg": flipped, "txt": b"a", "json": about}], tmp_path / "one")
        for stream in (False, True):
            contents = read_shards(0, str(tmp_path / "one/00000.tar"), 64, stream)
            reasons = [record.reason for record in contents.records if record.fate == "skipped"]
            if stream and found:
                with pytest.raises(DataError, match="000000000 is damaged: its sha256"):
                    _ = contents.samples[0].pixels
            else:
                assert [("its sha256" in reason) for reason in reasons] == [True] * found
                assert len(contents.samples) == (not found) and all(s.pixels.any() for s in contents.samples)


def test_what_cannot_be_streamed(make: Make) -> None:
    with pytest.raises(DataOptionError, match="keeps latents in memory"):
        make(cache_latents=True)
    assert make().cache is None and make(stream=False).cache is not None
    with pytest.raises(DataOptionError, match="stream reads pictures from shards"):
        Regularization(folder="reg", stream=True)
