"""Shapes of views: near the pictures' own, one per step, none of which loses, doubles or favours a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_datamodules.buckets import Buckets, Shape, shapes_of
from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.order import INSTANCE, PRIOR, Bucket, Order
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization
from lit_datamodules.turns import fractions, turn_at, turns_before, whole_weights
from lit_personalize.batch import Batch

Make = Callable[..., PersonalizationData]
SIZES = [(64, 64), (96, 64), (64, 96), (60, 90), (40, 120), (48, 48)]
SMALL = Buckets(step=8)


def draw(folder: Path, sizes: list[Shape]) -> Path:
    """A picture of each height and width: its red grows from left to right, its green from top to bottom."""
    folder.mkdir()
    for number, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), 40 * number, dtype=np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def make(base: Any, tmp_path: Path) -> Make:
    photos, reg = draw(tmp_path / "photos", SIZES), draw(tmp_path / "reg", [(50, 80), (80, 50), (64, 64)])

    def build(concepts: list[Concept] | None = None, regularized: bool = True, **options: Any) -> PersonalizationData:
        sets = Regularization(folder=str(reg), prompt="a cat") if regularized else None
        options = {"resolution": 32, "batch_size": 2, "buckets": SMALL, "regularization": sets, **options}
        data = PersonalizationData(concepts or [Concept(str(photos), "cat", "<new1>")], **options)
        data.bind(base, base)
        data.setup("fit")
        return data

    return build


# ---- shapes ---------------------------------------------------------------------------------------------


def test_the_shapes_that_sdxl_was_trained_with_are_found() -> None:
    """Podell et al., 2023 (arXiv 2307.01952), appendix I; those nearest to common photographs."""
    asked = {(999, 999): (960, 960), (3000, 2000): (1216, 832), (2160, 3840): (768, 1344), (2400, 3000): (896, 1152)}
    assert {size: Buckets().shape(size, 1024) for size in asked} == asked


@pytest.mark.parametrize("buckets", [Buckets(), Buckets(step=32, max_side=640), Buckets(enlarge=True)])
def test_a_shape_is_as_near_and_as_large_as_it_can_be(buckets: Buckets) -> None:
    low, high = buckets.limits(512)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(256, 2000, (300, 2)).tolist():
        h, w = buckets.shape((height, width), 512)
        assert h % buckets.step == w % buckets.step == 0 and low <= min(h, w) and max(h, w) <= high
        assert h * w <= 512**2 and (buckets.enlarge or (h <= height and w <= width))
        room = 512**2 if buckets.enlarge else min(512**2, height * width)
        most = (high, high) if buckets.enlarge else (min(height, high), min(width, high))
        # No larger side fits beside the other one, and a step towards the picture's ratio would be no nearer.
        step = buckets.step
        assert (h + step) * w > room or h + step > most[0] or (w + step) * h > room or w + step > most[1]
        error = abs(math.log(h * width / (w * height)))
        for other in ((h + step, w - step), (h - step, w + step)):
            if low <= min(other) and other[0] <= most[0] and other[1] <= most[1] and other[0] * other[1] <= room:
                assert error <= abs(math.log(other[0] * width / (other[1] * height))) + 1e-9


def test_small_pictures_are_not_enlarged() -> None:
    assert Buckets().shape((500, 500), 512) == (448, 448) and Buckets(enlarge=True).shape((500, 500), 512) == (512, 512)
    assert Buckets().shape((100, 90), 512) == (256, 256), "but to the shortest side"


def test_every_picture_is_shown_at_the_smallest_resolution_and_large_ones_at_more() -> None:
    assert shapes_of((2000, 1500), [1024, 512], None) == ((512, 512), (1024, 1024))
    assert shapes_of((600, 600), [512, 1024], None) == shapes_of((40, 40), [512, 1024], None) == ((512, 512),)
    assert shapes_of((1500, 1000), [512, 768, 1024], Buckets()) == ((640, 384), (896, 640), (1216, 832))
    assert shapes_of((700, 500), [512, 768], Buckets()) == ((576, 448),)
    assert len(shapes_of((700, 500), [512, 768], Buckets(enlarge=True))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": Buckets(step=7)}, "data.buckets.step 7 is no multiple of 2"),
        ({"buckets": Buckets(step=32)}, "step 32 leaves one shape at data.resolution 32"),
        ({"buckets": Buckets(step=8, max_side=24)}, "sides from 16 to 24 pixels do not enclose data.resolution 32"),
        ({"buckets": None, "resolution": [32, 17]}, "data.resolution 17 is no multiple of 2"),
        ({"resolution": [0, 32]}, "must be a side in pixels, not 0"),
    ],
)
def test_options_that_cannot_be_met(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataOptionError, match=message):
        make(**options)


# ---- order ----------------------------------------------------------------------------------------------

POOLS = {(24, 40): ((0, 1, 2), (10,)), (32, 32): ((3,), ()), (40, 24): ((), (11, 12))}
ORDER = Order(
    3, tuple(Bucket(shape, pools) for shape, pools in POOLS.items()), ((20, 21, 22), (30, 31)), 2, per_batch=2
)


def test_a_step_has_one_shape_and_its_pictures_are_of_that_bucket() -> None:
    for step in range(60):
        batch = ORDER.batch(step)
        assert [slot.role for slot in batch] == [INSTANCE] * 2 + [PRIOR] * 2
        [shape] = {slot.shape for slot in batch}
        assert {slot.sample for slot in batch if slot.role == INSTANCE} <= {n for pool in POOLS[shape] for n in pool}


@pytest.mark.parametrize("mixing", ["interleaved", "joint"])
def test_no_picture_is_dropped_or_favoured_for_its_shape(mixing: Any) -> None:
    """Concept 0 has four pictures, concept 1 three; buckets hold one to four, batches take two."""
    order = Order(3, ORDER.buckets, ORDER.priors, 2, 2, mixing)
    counts = Counter(slot.sample for step in range(4200) for slot in order.batch(step))
    shares = {n: 1 / 7 if mixing == "joint" else 1 / 8 if n < 10 else 1 / 6 for n in (0, 1, 2, 3, 10, 11, 12)}
    for number, share in shares.items():
        assert abs(counts[number] - 8400 * share) <= 2, (number, counts)
    assert {counts[n] for n in (20, 21, 22)} == {1400} and {counts[n] for n in (30, 31)} == {2100}


def test_every_stretch_has_its_share_of_each_bucket() -> None:
    order = Order(0, (Bucket((32, 32), (tuple(range(9)),)), Bucket((24, 40), ((9,),))), (), batch_size=4)
    tall = [step for step in range(200) if order.batch(step)[0].shape == (24, 40)]
    assert len(tall) == 20 and set(np.diff(tall)) == {10}
    assert {slot.sample for slot in order.batch(tall[0])} == {9}, "a bucket smaller than a batch repeats its picture"


def test_ranks_share_a_step_and_another_number_of_them_goes_on_without_loss() -> None:
    for step in range(20):
        shared = [slot for rank in range(2) for slot in ORDER.batch(step, rank, 2)]
        assert len({slot.shape for slot in shared}) == 1 and sorted(s.position for s in shared) == list(range(8))
    one = Order(3, ORDER.buckets, ORDER.priors, 4, 4)
    seen = [slot for step in range(21) for slot in one.batch(step)]
    half = Order(3, ORDER.buckets, ORDER.priors, 2, 2, since=21, shown=one.shown_at(21, 1))
    seen += [slot for step in range(21, 50) for rank in range(2) for slot in half.batch(step, rank, 2)]
    whole = [slot for step in range(50) for slot in one.batch(step)]
    assert Counter((s.sample, s.role, s.shape) for s in seen) == Counter((s.sample, s.role, s.shape) for s in whole)


@pytest.mark.parametrize("shares", [(1, 1, 1), (2, 5), (9, 1), (0.1, 0.7, 0.2), (1, 0.001)])
def test_turns_are_evenly_spread(shares: tuple[float, ...]) -> None:
    """At every place a pool has had its share so far, but for less than one turn."""
    weights = whole_weights(fractions(shares))
    counts = [0] * len(shares)
    for visit in range(3 * sum(weights)):
        assert list(turns_before(weights, visit)) == counts
        pool, turn = turn_at(weights, visit)
        assert turn == counts[pool]
        counts[pool] += 1
        ideal = [(visit + 1) * share / sum(shares) for share in shares]
        assert np.abs(np.array(counts) - ideal).max() < 1, (visit, counts)


def test_shares_that_would_need_an_endless_period_are_rounded() -> None:
    weights = whole_weights([Fraction(1, 7), Fraction(1, 1013), Fraction(1, 1019), Fraction(1, 1_000_000_007)])
    assert 9_000 < sum(weights) < 10_100 and min(weights) == 1


def test_shares_decide_whose_turn_it_is() -> None:
    pools, shares = ((0, 1, 2), (3,)), fractions([2, 1])
    order = Order(0, (Bucket((32, 32), pools),), ((10,), (11,)), 3, 3, shares=shares, prior_shares=shares)
    for step in range(5):
        samples = [slot.sample for slot in order.batch(step)]
        assert sum(n < 3 for n in samples) == 2 and samples.count(10) == 2
        assert [n >= 3 for n in samples[:3]] == [n == 11 for n in samples[3:]], "pairs stay side by side"


# ---- batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "custom_diffusion", "custom_diffusion_port"])
def test_batches_have_the_shape_of_their_step(make: Make, augmentation: str) -> None:
    data = make(augmentation=augmentation, cache_latents=False, flip=True)
    seen: dict[Shape, set[str]] = {}
    for step in range(40):
        batch = Batch.of(data.batch_of_step(step))
        height, width = data.order.batch(step)[0].shape
        assert batch.pixels is not None and batch.pixels.shape == (4, 3, height, width)
        assert (batch.mask is None) == (augmentation == "none")
        assert batch.mask is None or batch.mask.shape == (4, 1, height // 2, width // 2)
        assert batch.sample_id is not None
        seen.setdefault((height, width), set()).update(Path(n).name for n in batch.sample_id[:2])
    expected: dict[Shape, set[str]] = {}
    for number, size in enumerate(SIZES):
        expected.setdefault(SMALL.shape(size, 32), set()).add(f"{number}.png")
    assert seen == expected and len(expected) >= 4


def test_the_crop_has_the_shape_of_its_bucket_and_sdxl_is_told_of_it(make: Make) -> None:
    """The ramps of a picture say where its crop was taken."""
    from lit_datamodules.training_view import decide, pixels_of

    data = make(regularized=False, cache_latents=False, crop="random")
    for step in range(12):
        for slot in data.order.batch(step):
            sample = data.samples[slot.sample]
            shot = decide(sample, slot, data.geometry)
            left, top, right, bottom = shot.box
            height, width = sample.original
            assert (bottom - top == height or right - left == width) and 0 <= left and right <= width
            assert abs((right - left) / (bottom - top) - slot.shape[1] / slot.shape[0]) < 0.05
            pixels = (pixels_of(sample, shot) + 1) * 127.5
            ends = pixels[0].min() / 255, pixels[0].max() / 255
            assert np.abs(np.array(ends) - (left / width, right / width)).max() < 0.06
            scale = slot.shape[0] / (bottom - top)
            assert shot.time_ids == (height, width, round(top * scale), round(left * slot.shape[1] / (right - left)),
                                     *slot.shape)  # fmt: skip


def test_kept_latents_are_those_of_the_views(make: Make, base: Any, tmp_path: Path) -> None:
    kept, plain = make(cache_dir=str(tmp_path / "cache")), make(cache_latents=False)
    assert kept.cache is not None and kept.cache.misses == len(SIZES) + 3 * len(kept.order.buckets)
    for step in range(12):
        ours, theirs = kept.batch_of_step(step), plain.batch_of_step(step)
        assert ours["sample_id"] == theirs["sample_id"] and "pixels" not in ours
        mean, _ = base.encode_pixels(theirs["pixels"])
        torch.testing.assert_close(ours["latent_mean"], mean.float(), atol=1e-4, rtol=1e-4)
    again = make(cache_dir=str(tmp_path / "cache"))
    assert again.cache is not None and again.cache.misses == 0


def test_resolutions_take_turns_and_the_manifest_says_which(make: Make) -> None:
    data = make(resolution=[16, 32], buckets=None, cache_latents=False, regularized=False)
    shapes = Counter(slot.shape for step in range(60) for slot in data.order.batch(step))
    assert shapes == {(16, 16): 60, (32, 32): 60}, "all pictures are large enough for both"
    assert {record.sizes for record in data.records} == {((16, 16), (32, 32))}
    assert data.steps == 6
    bucketed = make()
    own = {Path(r.path).name: r for r in bucketed.records if r.role == "concept"}
    assert own["1.png"].sizes == (SMALL.shape((96, 64), 32),) and own["1.png"].crop is not None
    assert {(r.sizes, r.crop) for r in bucketed.records if r.role == "regularization"} == {((), None)}


def test_held_out_pictures_come_in_batches_of_one_shape(make: Make, tmp_path: Path) -> None:
    data = make([Concept(str(tmp_path / "photos"), "cat", "<new1>", held_out=4)])
    loader = data.val_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) >= 2 and sum(len(b["captions"]) for b in batches) == 4
    assert [int(n) for b in batches for n in b["position"]] == [0, 1, 2, 3]


def test_a_resume_goes_on_at_the_next_picture(make: Make) -> None:
    whole = [b["sample_id"] for b in make().train_dataloader()]
    cut = make()
    loader = iter(cut.train_dataloader())
    before = [next(loader)["sample_id"] for _ in range(3)]
    state = cut.state_dict()
    rest = make()
    rest.load_state_dict(state)
    assert before + [b["sample_id"] for b in rest.train_dataloader()] == whole


def test_a_resume_with_other_shapes_is_warned_of_and_goes_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cut = make()
    loader = iter(cut.train_dataloader())
    for _ in range(3):
        next(loader)
    rest = make(buckets=None)
    rest.load_state_dict(cut.state_dict())
    assert "data.buckets was" in caplog.text
    batches = list(rest.train_dataloader())
    assert batches and all(b["latent_mean"].shape[2:] == (16, 16) for b in batches)


def test_the_sheet_shows_views_as_they_are(make: Make, tmp_path: Path) -> None:
    make(augmentation="custom_diffusion").write_sheet(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 500


# ---- masks ----------------------------------------------------------------------------------------------


def test_masks_from_files_go_the_way_of_the_pixels(make: Make, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number, (height, width) in enumerate(SIZES):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{number}.png")
    concept = Concept(str(tmp_path / "photos"), "cat", "<new1>", masks=str(tmp_path / "masks"))
    data = make([concept], flip=True, cache_latents=False)
    for step in range(20):
        batch, slots = data.batch_of_step(step), data.order.batch(step)
        assert batch["mask"][2:].min() == 1, "regularization pictures count whole"
        for mask, pixels in zip(batch["mask"][:2], batch["pixels"][:2], strict=True):
            bright = torch.nn.functional.avg_pool2d(pixels[:1], 2) < 0  # red grows from left to right
            assert (mask.round() == bright.float()).float().mean() > 0.9, slots[0].shape
    assert {Path(r.mask).name for r in data.records if r.role == "concept"} == {f"{n}.png" for n in range(len(SIZES))}
    state = data.state_dict()
    Image.fromarray(np.full(SIZES[0], 255, dtype=np.uint8)).save(tmp_path / "masks/0.png")
    with pytest.raises(DataError, match="mask of 0.png"):
        make([concept], cache_latents=False).load_state_dict(state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda masks: (masks / "3.png").unlink(), "3.png has no mask 3.png in"),
        (lambda masks: Image.new("L", (9, 9), 255).save(masks / "3.png"), r"differ in size \(9 x 9 pixels, 90 x 60\)"),
        (lambda masks: Image.new("L", (90, 60)).save(masks / "3.png"), "is all black: nothing of"),
        (lambda masks: Image.new("L", (90, 60), 255).save(masks / "3.webp"), "several masks"),
        (lambda masks: (masks / "3.png").write_bytes(b"no picture"), "3.png is no jpg, png or webp picture"),
    ],
)
def test_masks_that_cannot_be_used(make: Make, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    (tmp_path / "masks").mkdir()
    for number, (height, width) in enumerate(SIZES):
        Image.new("L", (width, height), 255).save(tmp_path / f"masks/{number}.png")
    spoil(tmp_path / "masks")
    concept = Concept(str(tmp_path / "photos"), "cat", "<new1>", masks=str(tmp_path / "masks"))
    with pytest.raises(DataError, match=message):
        make([concept])
    assert len(make([concept], strict=False).samples) == len(SIZES) - 1 + 3
    with pytest.raises(DataError, match="^image folder nowhere does not exist"):
        make([Concept(str(tmp_path / "photos"), "cat", masks="nowhere")])


def test_options_of_concepts_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(DataOptionError, match="by alpha_mask or by masks"):
        Concept("x", "cat", alpha_mask=True, masks="y")
    with pytest.raises(DataOptionError, match="share must be above 0, not 0"):
        Concept("x", "cat", share=0)
    with pytest.raises(DataOptionError, match="joint counts pictures"):
        PersonalizationData([Concept("x", "cat", share=2), Concept("y", "dog")], mixing="joint")
