"""Retrieval finds what an exhaustive comparison finds, whatever the tasks, and tells what it left out."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.retrieval.merge import Selection, perceptual_hash
from lit_datamodules.retrieval.parts import Part
from lit_datamodules.retrieval.plan import Filters, Plan, Query
from lit_datamodules.retrieval.retrieve import find_shards, merge_parts, part_path, parts_folder, scan
from lit_datamodules.retrieval.shard_captions import captioned_batches
from lit_datamodules.shard_writer import write_shards
from lit_datamodules.tar_index import index_tar, read_member

ALL = Selection(n=5, near_duplicates=0)
QUERIES = (Query("circle", text="a photo of a red circle"), Query("critter", text="a critter with wings"))


@pytest.fixture(scope="module")
def encoder() -> Any:
    from lit_personalize.metrics.caption_encoder import CaptionEncoder
    from lit_personalize.tinyworld.build import committed_weights

    return CaptionEncoder(committed_weights() / "clip")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety rendered pictures with their captions in six shards."""
    from lit_personalize.tinyworld.dataset import sample_pictures
    from lit_personalize.tinyworld.dataset import write_shards as write_rendered

    folder = tmp_path_factory.mktemp("corpus")
    write_rendered(sample_pictures(90, 4), folder, per_shard=15)
    return folder


def vectors(encoder: Any, plan: Plan) -> np.ndarray:
    return np.concatenate([encoder.texts([query.text]) for query in plan.queries])


def plan_of(encoder: Any, **options: Any) -> Plan:
    return Plan(**{"queries": QUERIES, "encoder": encoder.fingerprint, "keep": 20, "batch_size": 8, **options})


def retrieve(
    folder: Path,
    encoder: Any,
    plan: Plan,
    out: Path,
    selection: Selection = ALL,
    tasks: Sequence[tuple[int, int]] = ((0, 1),),
) -> dict[str, Any]:
    shards = find_shards([str(folder / "*.tar")])
    for task in tasks:
        scan(shards, plan, encoder, vectors(encoder, plan), out, task)
    return merge_parts(shards, plan, selection, out)


def contents(out: Path) -> list[tuple[str, dict[str, Any]]]:
    """Caption and json of every sample of a set."""
    found = []
    for path in sorted(out.glob("*.tar")):
        for entry in index_tar(path).entries:
            about = json.loads(read_member(path, entry.members["json"]))
            found.append((read_member(path, entry.members["txt"]).decode(), about))
    return found


def test_the_set_is_what_an_exhaustive_comparison_finds(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    captions, names = [], []
    for path in sorted(corpus.glob("*.tar")):
        for entry in index_tar(path).entries:
            captions.append(read_member(path, entry.members["txt"]).decode())
            names.append((path.name, entry.key))
    plan = plan_of(encoder)
    similarities = encoder.texts(captions) @ vectors(encoder, plan).T
    report = retrieve(corpus, encoder, plan, tmp_path)
    abouts = [about for _, about in contents(tmp_path)]
    for column, query in enumerate(QUERIES):
        expected = sorted(zip(-similarities[:, column], names, strict=True))[:5]
        sources = [about["source"] for about in abouts if query.name in about["concepts"]]
        assert [(source["shard"], source["key"]) for source in sources] == [name for _, name in expected]
        told = report["queries"][query.name]
        assert told["similarity"]["max"] == pytest.approx(-expected[0][0], abs=1e-6) and told["kept"] == 5
    assert report["scanned"] == {"shards": 6, "samples": 90, "captions": 90, "dropped": {}} and not report["faults"]
    for caption, about in contents(tmp_path):
        place = names.index((about["source"]["shard"], about["source"]["key"]))
        assert caption == captions[place] and about["kind"], "fields of the source stay"
        for name, value in about["similarity"].items():
            column = [query.name for query in QUERIES].index(name)
            assert value == pytest.approx(float(similarities[place, column]), abs=1e-6)


def test_the_result_does_not_depend_on_how_shards_were_split(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(encoder, batch_size=4)
    splits = {"one": [(0, 1)], "three": [(2, 3), (0, 3), (1, 3)], "six": [(i, 6) for i in (3, 1, 5, 0, 2, 4)]}
    for name, tasks in splits.items():
        retrieve(corpus, encoder, plan, tmp_path / name, tasks=tasks)
    for name in ("00000.tar", "shards.json", "retrieval.json"):
        assert len({(tmp_path / split / name).read_bytes() for split in splits}) == 1, name


def test_an_interrupted_scan_goes_on(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    plan, shards = plan_of(encoder), find_shards([str(corpus / "{00000..00005}.tar")])
    assert scan(shards, plan, encoder, vectors(encoder, plan), tmp_path, (1, 2)) == 3
    with pytest.raises(DataError, match=r"3 of 6 shards are not scanned yet: 00000\.tar"):
        merge_parts(shards, plan, ALL, tmp_path)
    assert scan(shards, plan, encoder, vectors(encoder, plan), tmp_path) == 3
    assert merge_parts(shards, plan, ALL, tmp_path)["pictures"] > 0
    part = part_path(parts_folder(tmp_path, plan), "00002.tar")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00002\.tar\.parquet is damaged .* remove it"):
        merge_parts(shards, plan, ALL, tmp_path)
    with pytest.raises(DataOptionError, match="task 2 of 2"):
        scan(shards, plan, encoder, vectors(encoder, plan), tmp_path, (2, 2))


def packed(folder: Path, rows: Sequence[tuple[np.ndarray, str, dict[str, Any]]], **damage: bytes) -> None:
    """One shard of pictures, captions and metadata; `damage` replaces the picture of a row."""
    samples = []
    for i, (pixels, caption, meta) in enumerate(rows):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        picture = damage.get(f"row{i}", buffer.getvalue())
        samples.append({"png": picture, "txt": caption.encode(), "json": json.dumps(meta).encode()})
    write_shards(samples, folder)


def pictures(count: int) -> np.ndarray:
    from lit_personalize.tinyworld.dataset import sample_pictures

    return sample_pictures(count, 9).pixels


def test_near_duplicates_and_damaged_pictures_make_room_for_others(encoder: Any, tmp_path: Path) -> None:
    first, second, third = pictures(3)
    smaller = np.asarray(Image.fromarray(first).resize((48, 48)).resize((64, 64)))
    captions = ["a photo of a red circle", "a red circle", "a photo of a circle in red", "a ring"]
    rows = [(p, c, {}) for p, c in zip((first, smaller, second, third), captions, strict=True)]
    packed(tmp_path / "in", rows, row2=b"no picture")
    plan = plan_of(encoder, queries=QUERIES[:1])
    report = retrieve(tmp_path / "in", encoder, plan, tmp_path / "out", Selection(n=2))
    assert report["queries"]["circle"]["rejected"] == {"near-duplicate": 1, "damaged picture": 1}
    assert [caption for caption, _ in contents(tmp_path / "out")] == [captions[0], captions[3]]
    report = retrieve(tmp_path / "in", encoder, plan, tmp_path / "out", Selection(n=2, near_duplicates=0))
    assert report["queries"]["circle"]["rejected"] == {} and report["pictures"] == 2


def test_hashes_survive_resizing_and_tell_pictures_apart() -> None:
    shown = pictures(12)
    hashes = [perceptual_hash(p) for p in shown]
    for pixels, own in zip(shown, hashes, strict=True):
        again = np.asarray(Image.fromarray(pixels).resize((200, 200), Image.Resampling.BICUBIC))
        assert (perceptual_hash(again) ^ own).bit_count() < 4
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert np.median(apart) > 20


def test_filters_drop_before_anything_is_embedded(encoder: Any, tmp_path: Path) -> None:
    shown = pictures(4)
    metas = [{"punsafe": 0.9}, {"punsafe": 0.1}, {}, {"punsafe": 0.2, "width": 64, "height": 64}]
    packed(tmp_path / "in", [(p, "a red circle", m) for p, m in zip(shown, metas, strict=True)])
    plan = plan_of(encoder, queries=QUERIES[:1], filters=Filters(max_punsafe=0.5, min_side=65))
    with pytest.raises(DataError, match="no picture passes"):
        retrieve(tmp_path / "in", encoder, plan, tmp_path / "out")  # 64 pixels: one says so, one shows it
    plan = plan_of(encoder, queries=QUERIES[:1], filters=Filters(max_punsafe=0.5, min_side=64))
    report = retrieve(tmp_path / "in", encoder, plan, tmp_path / "out")
    assert report["scanned"]["dropped"] == {"no punsafe field": 1, "punsafe above 0.5": 1}
    assert report["pictures"] == 2 and report["scanned"]["captions"] == 2


def test_thresholds_by_cosine_and_by_percentile(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(encoder, queries=QUERIES[:1], keep=100)
    whole = retrieve(corpus, encoder, plan, tmp_path, Selection(n=90, near_duplicates=0))
    assert whole["queries"]["circle"]["kept"] == 90
    values = sorted(about["similarity"]["circle"] for _, about in contents(tmp_path))
    report = retrieve(corpus, encoder, plan, tmp_path, Selection(n=90, min_similarity=values[80], near_duplicates=0))
    assert report["queries"]["circle"]["kept"] == 10
    report = retrieve(corpus, encoder, plan, tmp_path, Selection(n=90, percentile=90, near_duplicates=0))
    told = report["queries"]["circle"]
    assert 7 <= told["kept"] <= 9 and values[80] <= told["threshold"] <= values[83]
    with pytest.raises(DataError, match=f"most similar caption per query: circle: {values[-1]:.3f}"):
        retrieve(corpus, encoder, plan, tmp_path, Selection(min_similarity=0.9999))


def test_it_says_when_parts_left_out_what_might_pass(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    """Candidates above the least similar one of every full part are all known; below, some may be missing."""
    for keep, complete in ((2, False), (15, True)):
        plan = plan_of(encoder, queries=QUERIES[:1], keep=keep)
        report = retrieve(corpus, encoder, plan, tmp_path / str(keep), Selection(n=12, near_duplicates=0))
        assert report["queries"]["circle"]["complete"] is complete
    plan = plan_of(encoder, queries=QUERIES[:1], keep=2)
    report = retrieve(corpus, encoder, plan, tmp_path / "one", Selection(n=1, near_duplicates=0))
    assert report["queries"]["circle"]["complete"] is True


def test_damage_is_in_the_report_and_a_changed_shard_is_not_merged(encoder: Any, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in corpus.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:-20000])
    (folder / "00004.tar").write_bytes(b"<html>502 Bad Gateway</html>")
    plan = plan_of(encoder)
    report = retrieve(folder, encoder, plan, tmp_path / "out")
    assert any("00001.tar" in fault and "cut off" in fault for fault in report["faults"])
    assert any("00004.tar is a web page" in fault for fault in report["faults"])
    assert 60 < report["scanned"]["captions"] < 75
    (folder / "00001.tar").write_bytes(whole)
    with pytest.raises(DataError, match=r"00001\.tar changed since it was scanned; scan it again"):
        merge_parts(find_shards([str(folder / "*.tar")]), plan, ALL, tmp_path / "out")
    assert retrieve(folder, encoder, plan, tmp_path / "out")["scanned"]["captions"] == 75
    with pytest.raises(DataError, match=r"shards are missing: .*00006\.tar"):
        find_shards([str(folder / "{00005..00006}.tar")])
    with pytest.raises(DataError, match="no shard is called"):
        find_shards([str(folder / "*.zip")])


def test_captions_of_like_length_are_embedded_together(encoder: Any, tmp_path: Path) -> None:
    """A batch takes the time of its longest caption: long and short ones by turns would all take that of the long."""
    said = ["a star" if i % 2 else "a red circle on a blue background beside a star " * 2 for i in range(150)]
    write_shards(({"jpg": b"\xff\xd8", "txt": text.encode(), "json": b"{}"} for text in said), tmp_path, 150)
    batches = list(captioned_batches(tmp_path / "00000.tar", Part("s", 0), 4, encoder))
    rows = [row for group, _ in batches for row in group]
    assert sorted(row.entry.key for row in rows) == [e.key for e in index_tar(tmp_path / "00000.tar").entries]
    assert all(len(group) == len(tokens["input_ids"]) <= 4 for group, tokens in batches)
    longest = max(tokens["input_ids"].shape[1] for _, tokens in batches)
    padded = sum(tokens["input_ids"].numel() for _, tokens in batches)
    assert padded < 0.65 * 150 * longest, "half of the captions are short"
