"""The data module: batches that the trainer accepts, files whose fate is known, inputs that are refused."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization
from lit_personalize.batch import Batch, Role

Write = Callable[..., Path]


def data_of(base: Any, *concepts: Concept, **options: Any) -> PersonalizationData:
    data = PersonalizationData(list(concepts), **{"resolution": 32, "batch_size": 2, **options})
    data.bind(base, base)
    return data


def ready(base: Any, *concepts: Concept, **options: Any) -> PersonalizationData:
    data = data_of(base, *concepts, **options)
    data.setup()
    return data


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, tuple):
            return all(equal(i, j) for i, j in zip(x, y, strict=True))
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


# ---- batches --------------------------------------------------------------------------------------------


def test_batch_of_the_custom_diffusion_recipe(base: Any, folder: Write, shards: Write) -> None:
    concepts = [Concept(str(folder("a")), "cat", "<new1>"), Concept(str(folder("b", 3, 9)), "toy", "<new2>")]
    sets = Regularization(shards=str(shards() / "{00000..00001}.tar"))
    options = {"augmentation": "custom_diffusion", "flip": True, "cache_latents": False}
    data = ready(base, *concepts, regularization=sets, batch_size=4, **options)
    prefixes = set()
    for step in range(12):
        batch = Batch.of(data.batch_of_step(step))
        assert batch.role.tolist() == [Role.INSTANCE] * 4 + [Role.PRIOR] * 4
        assert batch.position.tolist() == list(range(8))
        assert batch.concept is not None and batch.concept.tolist() == [0, 1, 0, 1, -1, -1, -1, -1]
        assert batch.pixels is not None and batch.pixels.shape == (8, 3, 32, 32) and batch.pixels.dtype == torch.float32
        assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
        assert batch.mask is not None and batch.mask.shape == (8, 1, 16, 16)
        assert (batch.mask[4:] == 1).all(), "regularization pictures are never augmented"
        assert batch.captions is not None and batch.input_ids is not None and batch.time_ids is None
        assert torch.equal(batch.input_ids[0], base.tokenize(batch.captions)[0])
        for n, caption in enumerate(batch.captions[:4]):
            noun, token = (("cat", "<new1>"), ("toy", "<new2>"))[n % 2]
            prefix, found, _ = caption.partition(f"photo of a {token} {noun}")
            assert found
            prefixes.add(prefix)
            assert bool((batch.mask[n] < 1).any()) == (prefix in ("a far away ", "very small "))
            assert bool((batch.pixels[n] == 0).all(0).float().mean() > 0.5) == bool((batch.mask[n] < 1).any())
        assert all("photo of a <" not in caption for caption in batch.captions[4:])
    assert len(prefixes) > 3


@pytest.mark.parametrize("prompt", ["style", "painting in the style of {token} {class}"])
def test_style_prompts_of_the_custom_diffusion_recipe(base: Any, folder: Write, shards: Write, prompt: str) -> None:
    """Every caption is about the style, shrunk and zoomed views included, and none has two articles."""
    style = Concept(str(folder()), "art", "<new1>", prompt=prompt)
    sets = Regularization(shards=str(shards() / "{00000..00001}.tar"))
    data = ready(base, style, regularization=sets, batch_size=4, augmentation="custom_diffusion")
    told = [caption for step in range(20) for caption in (Batch.of(data.batch_of_step(step)).captions or [])[:4]]
    assert all(caption.endswith("in the style of <new1> art") for caption in told)
    assert {"a far away ", "very small ", "zoomed in ", "close up "} <= {
        match[0] for caption in told if (match := re.match(r"a far away |very small |zoomed in |close up ", caption))
    }
    assert not any(caption.startswith(("a far away a ", "zoomed in the ", "close up a ")) for caption in told)
    assert set(told) <= set(data.captions) and (len(set(told)) > 5) == (prompt == "style"), "one sentence, five views"


def test_batch_is_a_function_of_seed_and_step(base: Any, folder: Write) -> None:
    concept = Concept(str(folder()), "cat", "<new1>", prompt="object")
    options = {"augmentation": "custom_diffusion", "flip": True, "crop": "random"}
    one, two = (ready(base, concept, **options) for _ in range(2))
    for step in (7, 0, 3):
        assert same(one.batch_of_step(step), two.batch_of_step(step))
    other = ready(base, concept, seed=1, **options)
    assert not same(one.batch_of_step(3), other.batch_of_step(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_batches_of_the_steps(base: Any, folder: Write, workers: int) -> None:
    concept = Concept(str(folder()), "cat", "<new1>", prompt="style")
    data = ready(base, concept, augmentation="custom_diffusion", flip=0.5, num_workers=workers)
    loader = data.train_dataloader()
    assert len(loader) == 3, "five pictures by twos"
    batches = list(loader)
    data.teardown()
    assert len(batches) == 3
    assert all(same(batch, data.batch_of_step(step)) for step, batch in enumerate(batches))


@pytest.mark.parametrize("name", ["object", "style"])
def test_templates_are_drawn_alike_from_any_cache(base: Any, folder: Write, tmp_path: Path, name: str) -> None:
    """A function of (seed, step, position): whether latents are cached, in memory or on disk, old or new."""
    concept = Concept(str(folder()), "cat", "<new1>", prompt=name)
    options: list[dict[str, Any]] = [{"cache_latents": False}, {}, *[{"cache_dir": str(tmp_path / "cache")}] * 2]
    ways = [ready(base, concept, flip=True, **option) for option in options]
    shown = [[Batch.of(data.batch_of_step(step)).captions or [] for step in range(40)] for data in ways]
    assert all(captions == shown[0] for captions in shown[1:])
    found = Counter(caption for captions in shown[0] for caption in captions)
    assert set(found) <= set(ways[0].captions) and len(found) > 12 and max(found.values()) < 16
    assert shown[0] != [Batch.of(ready(base, concept, seed=1).batch_of_step(s)).captions for s in range(40)]


def test_cached_latents_are_those_of_the_pixels(base: Any, folder: Write) -> None:
    concept = Concept(str(folder()), "cat", "<new1>")
    reg = Regularization(folder=str(folder("reg", 3, 8)), prompt="a cat")
    cached = ready(base, concept, regularization=reg, flip=True)
    plain = ready(base, concept, regularization=reg, flip=True, cache_latents=False)
    assert cached.cache is not None and len(cached.cache) == 5 * 2 + 3, "mirror images of the instances only"
    mirrored = 0
    for step in range(6):
        latents, pixels = Batch.of(cached.batch_of_step(step)), Batch.of(plain.batch_of_step(step))
        assert latents.pixels is None and latents.captions == pixels.captions and latents.sample_id == pixels.sample_id
        mean, std = base.encode_pixels(pixels.pixels)
        torch.testing.assert_close(latents.latent_mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(latents.latent_std, std, atol=1e-5, rtol=1e-4)
        mirrored += sum(shot.view.flip for _, shot, *_ in map(plain._draw_function(), plain.order.batch(step)))
    assert 0 < mirrored < 12


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"augmentation": "custom_diffusion"}, "augmentation"), ({"crop": "random"}, "random crops")],
)
def test_cache_is_refused_where_views_move(base: Any, folder: Write, options: dict[str, Any], reason: str) -> None:
    concept = Concept(str(folder()), "cat")
    with pytest.raises(DataOptionError, match=f"cache_latents is true, but {reason}"):
        data_of(base, concept, cache_latents=True, **options)
    assert ready(base, concept, cache_latents="auto", **options).cache is None


def test_posteriors_of_regularization_pictures_are_kept_where_instances_move(base: Any, folder: Write) -> None:
    concept = Concept(str(folder()), "cat", "<new1>")
    reg = Regularization(folder=str(folder("reg", 3, 8)), prompt="a cat")
    options = {"regularization": reg, "augmentation": "custom_diffusion"}
    cached, plain = ready(base, concept, **options), ready(base, concept, **options, cache_latents=False)
    assert cached.cache is not None and len(cached.cache) == 3
    for step in range(4):
        mixed, pixels = Batch.of(cached.batch_of_step(step)), Batch.of(plain.batch_of_step(step))
        assert mixed.pixels is not None and pixels.pixels is not None and mixed.sample_id == pixels.sample_id
        assert torch.equal(mixed.pixels, pixels.pixels[:2]) and mixed.latent_mean is not None
        mean, std = base.encode_pixels(pixels.pixels[2:])
        torch.testing.assert_close(mixed.latent_mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed.latent_std, std, atol=1e-5, rtol=1e-4)
    assert ready(base, concept, **options, crop="random").cache is None


def test_time_ids_tell_size_and_crop(folder: Write, tmp_path: Path) -> None:
    """A 200x100 picture (width x height), centre-cropped to 32: half a square is cut off at the left."""

    class Large:
        downscale, resolution, needs_time_ids = 2, 32, True

        def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, ...]:
            return (torch.zeros(len(captions), 4, dtype=torch.long),) * 2

    (tmp_path / "wide").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "wide/a.png")
    encoders: Any = Large()
    data = PersonalizationData([Concept(str(tmp_path / "wide"), "cat")], cache_latents=False)
    data.bind(encoders, encoders)
    data.setup()
    assert data.resolution == 32
    batch = Batch.of(data.batch_of_step(0))
    assert batch.time_ids is not None and batch.time_ids.tolist() == [[100, 200, 0, 16, 32, 32]]
    assert batch.input_ids is not None and len(batch.input_ids) == 2
    assert data.records[0].crop == (50, 0, 150, 100)


def test_alpha_can_mask_the_loss(base: Any, tmp_path: Path) -> None:
    layered = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    layered.paste((200, 0, 0, 255), (0, 0, 32, 64))
    layered.save(tmp_path / "a.png")
    batch = Batch.of(ready(base, Concept(str(tmp_path), "cat", alpha_mask=True), batch_size=1).batch_of_step(0))
    assert batch.mask is not None
    assert (batch.mask[0, 0, :, :7] == 1).all() and (batch.mask[0, 0, :, 9:] == 0).all()
    assert Batch.of(ready(base, Concept(str(tmp_path), "cat")).batch_of_step(0)).mask is None


def test_repeats_and_held_out(base: Any, folder: Write) -> None:
    concept = Concept(str(folder(count=6)), "cat", held_out=2, repeats=3)
    data = ready(base, concept, batch_size=2)
    trained = Counter(name for step in range(data.steps) for name in data.batch_of_step(step)["sample_id"])
    assert data.steps == 6 and set(trained.values()) == {3} and len(trained) == 4
    validation = [Batch.of(batch) for batch in data.val_dataloader()]
    names = {name for batch in validation for name in batch.sample_id}
    assert len(names) == 2 and not names & trained.keys()
    assert [p for batch in validation for p in batch.position.tolist()] == [0, 1]


# ---- the fate of every file -----------------------------------------------------------------------------


def test_manifest_has_each_file_once(base: Any, folder: Write, shards: Write, tmp_path: Path) -> None:
    photos, reg = folder("a", captions=True), folder("reg", 3, 4, captions=True)
    (photos / "00001.txt").unlink()
    (photos / "00002.png").write_bytes(b"broken")
    (photos / "notes.pdf").touch()
    (photos / "orphan.txt").write_text("nobody's caption")
    (photos / ".DS_Store").touch()
    (photos / "more").mkdir()
    sets = [Regularization(shards=str(shards() / "00000.tar")), Regularization(folder=str(reg))]
    data = ready(base, Concept(str(photos), "cat"), regularization=sets, strict=False)
    data.write_manifest(tmp_path / "run/manifest.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run/manifest.jsonl").read_text().splitlines()]
    fates = {line["path"]: line for line in lines}
    assert len(fates) == len(lines)
    files = {str(p) for p in [*photos.iterdir(), *reg.iterdir()]} | {str(tmp_path / "shards/00000.tar")}
    assert files <= fates.keys() and len(fates) == len(files) + 5
    assert {Path(p).name for p in files if fates[p]["fate"] == "ignored"} == {
        "notes.pdf",
        "orphan.txt",
        ".DS_Store",
        "more",
    }
    assert [Path(p).name for p in files if fates[p]["fate"] == "skipped"] == ["00002.png"]
    used = fates[str(photos / "00000.png")]
    assert used["caption"] == " ".join((photos / "00000.txt").read_text().split())
    assert (used["caption_source"], used["width"], used["crop"], used["sizes"]) == (
        "00000.txt",
        64,
        [0, 0, 64, 64],
        [[32, 32]],
    )
    assert re.fullmatch("[0-9a-f]{64}", used["sha256"])
    assert fates[str(photos / "00001.png")]["caption_source"] == "prompt"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["manifest.jsonl"]


def test_sheet_shows_every_kind_of_row(base: Any, folder: Write, tmp_path: Path) -> None:
    concept = Concept(str(folder(count=4)), "cat", "<new1>", held_out=1)
    reg = Regularization(folder=str(folder("reg", 3, 8)), prompt="a cat")
    plain = ready(base, concept)
    full = ready(base, concept, regularization=reg, augmentation="custom_diffusion", resolution=64)
    plain.write_sheet(tmp_path / "plain.png")
    full.write_sheet(tmp_path / "full.png")
    small, large = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "full"))
    assert small.width == large.width and large.height > small.height + 300
    pixels = np.asarray(large).astype(int)
    assert (np.abs(pixels - (128, 128, 128)).max(-1) <= 1).sum() > 0 or (pixels[..., 0] - pixels[..., 1] > 60).any()
    picture = np.asarray(Image.open(Path(concept.path) / Path(full.samples[0].name).name))
    tile = np.kron(picture, np.ones((2, 2, 1), dtype=np.uint8))
    assert full.records and tile.shape == (128, 128, 3)
    assert any(
        np.array_equal(
            np.unique(pixels[y : y + 160, 10:170].reshape(-1, 3), axis=0), np.unique(picture.reshape(-1, 3), axis=0)
        )
        for y in range(40, 90)
    ), "the first tile has the picture's own colours"


# ---- bad input ------------------------------------------------------------------------------------------


def test_missing_and_empty_folder(base: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="photos does not exist"):
        ready(base, Concept(str(tmp_path / "photos"), "cat"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="photos holds no jpg"):
        ready(base, Concept(str(tmp_path / "photos"), "cat"))


@pytest.fixture
def damaged(folder: Write) -> Path:
    """Five pictures of which two cannot be read."""
    path = folder()
    for name in ("00001.jpg", "00003.jpg"):
        Image.open((path / name).with_suffix(".png")).save(path / name, quality=95)
        (path / name).with_suffix(".png").unlink()
        (path / name).write_bytes((path / name).read_bytes()[:400])
    return path


def test_corrupt_pictures_end_a_strict_run_and_all_are_named(base: Any, damaged: Path, tmp_path: Path) -> None:
    data = data_of(base, Concept(str(damaged), "cat"))
    with pytest.raises(DataError, match="2 inputs cannot be used") as caught:
        data.setup()
    assert caught.value.exit_code == 3
    assert (
        "00001.jpg" in str(caught.value) and "00003.jpg" in str(caught.value) and "00000.png" not in str(caught.value)
    )
    data.write_manifest(tmp_path / "manifest.jsonl")
    assert '"skipped"' in (tmp_path / "manifest.jsonl").read_text(), (
        "the manifest is there for a run that did not start"
    )


def test_corrupt_pictures_are_counted_in_a_tolerant_run(base: Any, damaged: Path) -> None:
    data = ready(base, Concept(str(damaged), "cat"), strict=False, max_skipped=2)
    assert Counter(record.fate for record in data.records) == {"used": 3, "skipped": 2}
    assert all("jpg" not in name for step in range(5) for name in data.batch_of_step(step)["sample_id"])
    with pytest.raises(DataError, match="2 inputs cannot be used, 1 may be skipped"):
        ready(base, Concept(str(damaged), "cat"), strict=False, max_skipped=1)


def test_nothing_left_is_an_error_even_in_a_tolerant_run(base: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match="no picture of .* can be used"):
        ready(base, Concept(str(tmp_path), "cat"), strict=False)


def test_bad_sidecars(base: Any, folder: Write) -> None:
    path = folder(captions=True)
    (path / "00001.txt").write_bytes("a <new1> café".encode("latin-1"))
    (path / "00000.txt").write_text("a {token} on the beach")
    (path / "00002.txt").write_text("a cat without its name")
    for name in ("00003.txt", "00004.txt"):
        (path / name).unlink()
    with pytest.raises(DataError) as caught:
        ready(base, Concept(str(path), "cat", "<new1>"))
    message = str(caught.value)
    assert re.search(r"00001\.txt is not UTF-8 \(byte 0xe9 at offset 12\)", message)
    assert re.search(r"00002\.txt: token <new1> is not in the caption", message)
    assert "2 inputs" in message and "00000" not in message
    with pytest.raises(DataError, match=r"00003\.png has no caption 00003\.txt"):
        ready(base, Concept(str(path), "cat", "<new1>", captions="sidecar"))
    data = ready(base, Concept(str(path), "cat", "<new1>", captions="prompt"))
    assert {c for s in data.samples for c in s.captions} == {"photo of a <new1> cat"}


@pytest.mark.parametrize(
    ("concept", "options", "message"),
    [
        ({"prompt": "a photo of a cat"}, {}, "token <new1> is not in the caption"),
        ({"prompt": "objekt"}, {}, "no template set.*did you mean 'object'"),
        ({"held_out": 5}, {}, "held_out 5 of 5 leaves no picture"),
        ({"repeats": 0}, {}, "repeats must be at least 1"),
        ({"flip": 1.5}, {}, "flip is a share"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1"),
        ({}, {"resolution": 33}, "resolution 33 is no multiple of 2"),
        ({}, {"flip": -1}, "data.flip is a share"),
    ],
)
def test_wrong_options(
    base: Any, folder: Write, concept: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = str(folder())
    with pytest.raises(DataOptionError, match=message) as caught:
        ready(base, Concept(path, "cat", "<new1>", **concept), **options)
    assert caught.value.exit_code == 2


def test_no_concept_and_no_base(folder: Write) -> None:
    with pytest.raises(DataOptionError, match="concepts is empty"):
        PersonalizationData([])
    data = PersonalizationData([Concept(str(folder()), "cat")], resolution=32)
    data.setup()
    with pytest.raises(DataOptionError, match="call bind before"):
        data.batch_of_step(0)


def test_truncated_shard(base: Any, folder: Write, shards: Write) -> None:
    path = shards() / "00000.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[9].offset])  # three samples of jpg, txt and json
    concept, sets = Concept(str(folder()), "cat"), Regularization(shards=str(path.parent / "{00000..00001}.tar"))
    with pytest.raises(DataError, match=r"shard .*00000\.tar is cut off: its end marker is missing"):
        ready(base, concept, regularization=sets)
    data = ready(base, concept, regularization=sets, strict=False)
    assert sum(s.role == 1 for s in data.samples) == 3 + 3
    assert any(r.fate == "skipped" and r.path.endswith("00000.tar") for r in data.records)
