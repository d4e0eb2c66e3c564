"""Latents on disk: shared where all that decides them is equal, new where a pixel, a size or a weight is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization
from lit_datamodules.stored_picture import StoredPicture
from lit_datamodules.tar_index import index_tar

Make = Callable[..., PersonalizationData]


@pytest.fixture
def make(base: Any, folder: Callable[..., Path], shards: Callable[..., Path], tmp_path: Path) -> Make:
    photos, reg = folder(count=3), shards(4)

    def build(encoder: Any = base, stream: bool = False, **options: Any) -> PersonalizationData:
        sets = Regularization(shards=str(reg / "00000.tar"), stream=stream)
        concept = Concept(str(photos), "cat", "<new1>")
        data = PersonalizationData(
            [concept], **{"resolution": 32, "regularization": sets, "cache_dir": str(tmp_path / "cache"), **options}
        )
        data.bind(base, encoder)
        data.setup("fit")
        return data

    return build


def counts(data: PersonalizationData) -> tuple[int, int]:
    assert data.cache is not None
    return data.cache.hits, data.cache.misses


def test_an_unchanged_set_is_found_whole(make: Make, tmp_path: Path) -> None:
    first = make()
    assert counts(first) == (0, 7)
    again = make()
    assert counts(again) == (7, 0)
    plain = make(cache_dir=None)
    for step in range(3):
        ours, theirs, memory = (data.batch_of_step(step) for data in (first, again, plain))
        for name in ("latent_mean", "latent_std"):
            assert torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], memory[name])


def test_a_pixel_a_size_a_crop_or_mirroring_is_a_miss(make: Make, tmp_path: Path) -> None:
    make()
    path = tmp_path / "photos/00001.png"
    pixels = np.array(Image.open(path))
    pixels[5, 7, 0] ^= 1
    Image.fromarray(pixels).save(path)
    assert counts(make()) == (6, 1)
    assert counts(make(resolution=64)) == (0, 7)
    assert counts(make(flip=True)) == (7, 3), "three photos are mirrored, and regularization pictures are not"
    assert counts(make(crop="squash")) == (7, 0), "of square pictures squashing shows the same"


class Another:
    """The base's encoder with one weight or the precision changed."""

    def __init__(self, base: Any, identity: str):
        self._base, self.vae_identity = base, identity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def test_another_vae_is_a_miss_and_its_weights_name_it(make: Make, base: Any, tmp_path: Path) -> None:
    from lit_personalize.backbones.fingerprint import weights_identity
    from lit_personalize.backbones.loading import load_base

    make()
    assert counts(make(Another(base, "other weights"))) == (0, 7)
    own = load_base(base.source)
    assert own.vae_identity == base.vae_identity
    with torch.no_grad():
        own.vae.decoder.conv_in.bias[0] += 1e-3
    assert weights_identity(own.vae) != base.vae_identity
    assert weights_identity(own.vae.half()) != weights_identity(own.vae.float())


def test_streamed_latents_stay_on_disk_and_damaged_pictures_are_left_out(
    make: Make, base: Any, tmp_path: Path
) -> None:
    held = make()
    streamed = make(stream=True, cache_latents=True)
    assert all(isinstance(s.picture, StoredPicture) for s in streamed.samples if s.role)
    for step in range(3):
        ours, theirs = streamed.batch_of_step(step), held.batch_of_step(step)
        assert ours["sample_id"] == theirs["sample_id"] and torch.equal(ours["latent_mean"], theirs["latent_mean"])
    shard = tmp_path / "shards/00000.tar"
    member = index_tar(shard).entries[2].members["jpg"]
    with shard.open("r+b") as file:
        file.seek(member.offset + 170)
        file.write(bytes(member.size - 170))
    with pytest.raises(DataError, match="00000.tar:000000002"):
        make(stream=True, resolution=64)
    tolerant = make(stream=True, resolution=64, strict=False, max_skipped=1)
    assert len(tolerant.samples) == 6
    assert [r.path.endswith("000000002") for r in tolerant.records if r.fate == "skipped"] == [True]
    resumed = PersonalizationData(
        tolerant.concepts, 64, tolerant.regularization, cache_dir=str(tmp_path / "cache"), strict=False, max_skipped=1
    )
    resumed.bind(base, base)
    resumed.load_state_dict(tolerant.state_dict())
    resumed.setup("fit")  # a resume leaves out the same picture, and does not take that for changed data
    assert [s.name for s in resumed.samples] == [s.name for s in tolerant.samples]


def test_processes_share_the_work(make: Make, tmp_path: Path) -> None:
    """Each encodes its share of what is missing; afterwards nothing is."""
    from lit_datamodules.latent_cache import LatentCache
    from lit_datamodules.tensor_store import TensorStore

    data = make(cache_dir=None)
    assert data._images is not None
    encoded = [
        LatentCache(data.samples, data.geometry, data._images, TensorStore(tmp_path / "c"), (n, 2)).encoded
        for n in (0, 0)
    ]
    assert [len(views) for views in encoded] == [4, 2], "the second is given half of the three that are left"
    whole = LatentCache(data.samples, data.geometry, data._images, TensorStore(tmp_path / "c"))
    assert (whole.hits, whole.misses) == (6, 1)
