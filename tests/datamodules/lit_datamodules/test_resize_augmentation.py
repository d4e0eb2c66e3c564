"""The resize augmentation of Custom Diffusion: what prompt, mask and pixels say must agree."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lit_datamodules.order import counter_rng
from lit_datamodules.resize_augmentation import (
    LARGE_PREFIXES,
    SMALL_PREFIXES,
    Variant,
    View,
    apply_view,
    apply_view_to_alpha,
    crop_box,
    custom_diffusion_view,
    latent_mask,
    plain_view,
    prefixed,
)

SIZES = [(512, 8), (64, 4), (32, 2), (64, 8), (1024, 8)]


def views(size: int, variant: Variant = "paper", count: int = 3000) -> list[View]:
    return [custom_diffusion_view(counter_rng("test", i), (size, size), variant) for i in range(count)]


@pytest.mark.parametrize(("size", "downscale"), SIZES)
def test_prefix_names_the_scale(size: int, downscale: int) -> None:
    for view in views(size, count=1000):
        side, other = view.scaled
        assert side == other and side % 2 == 0
        assert size // 3 <= side <= 1.4 * size
        assert not size < side < 1.2 * size - 1, "scales between 1 and 1.2 never occur"
        assert (view.prefix in SMALL_PREFIXES) == (side < 0.6 * size) == view.pasted
        assert (view.prefix in LARGE_PREFIXES) == (side > size)
        if not view.prefix:
            assert view == plain_view((size, size)), "from 0.6 to 1 the picture is shown at full size"


def test_a_prefix_stands_for_the_article() -> None:
    assert prefixed("a far away ", "photo of a <new1> cat") == "a far away photo of a <new1> cat"
    assert prefixed("a far away ", "a painting in the style of <new1> art") == (
        "a far away painting in the style of <new1> art"
    )
    assert prefixed("zoomed in ", "The painting") == "zoomed in painting"
    assert prefixed("close up ", "anything") == "close up anything"
    assert prefixed("", "a photo") == "a photo", "views without a prefix keep their caption"


def test_port_pastes_middle_scales_without_prefix() -> None:
    middle = [v for v in views(512, "port") if 0.6 * 512 <= v.scaled[0] <= 512]
    assert middle and all(v.pasted and not v.prefix for v in middle)
    assert any(v.scaled[0] < 500 for v in middle)
    assert {v.prefix for v in views(512, "port")} == {"", *SMALL_PREFIXES, *LARGE_PREFIXES}


def test_shares_of_the_branches() -> None:
    """Uniform over [170, 512] with probability 2/3: 26.7 % small, 40 % plain; 33.3 % enlarged."""
    counts = Counter("small" if v.pasted else "large" if v.prefix else "plain" for v in views(512, count=6000))
    for kind, share in {"small": 0.267, "plain": 0.400, "large": 0.333}.items():
        assert abs(counts[kind] / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5, (kind, counts)
    assert Counter(v.prefix for v in views(512)).keys() == {"", *SMALL_PREFIXES, *LARGE_PREFIXES}


@pytest.mark.parametrize(("size", "downscale"), SIZES)
def test_mask_lies_inside_the_picture(size: int, downscale: int) -> None:
    """No counted cell sees grey, one cell of border is dropped, and something always counts."""
    for view in views(size, "port", 500):
        mask = latent_mask(view, downscale)
        assert mask.shape == (1, size // downscale, size // downscale) and mask.dtype == np.float32
        if not view.pasted:
            assert (mask == 1).all()
            continue
        assert set(np.unique(mask)) <= {0.0, 1.0} and mask.any()
        rows, columns = np.nonzero(mask[0])
        left, top, right, bottom = view.box
        if mask.sum() > 1:
            assert rows.min() == top // downscale + 1 and rows.max() == bottom // downscale - 2
            assert columns.min() == left // downscale + 1 and columns.max() == right // downscale - 2
            assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert rows.min() * downscale >= top - downscale and (rows.max() + 1) * downscale <= bottom + downscale


def test_mask_of_a_known_view() -> None:
    mask = latent_mask(View((64, 64), (24, 24), top=8, left=20, pasted=True), 4)
    expected = np.zeros((1, 16, 16), dtype=np.float32)
    expected[0, 3:7, 6:10] = 1
    np.testing.assert_array_equal(mask, expected)


def test_pasted_pixels_are_in_the_box_and_grey_around() -> None:
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    for view in [v for v in views(64, count=200) if v.pasted]:
        pixels = apply_view(white, view)
        left, top, right, bottom = view.box
        inside = np.zeros((64, 64), dtype=bool)
        inside[top:bottom, left:right] = True
        assert (pixels[:, inside] == 1).all() and (pixels[:, ~inside] == 0).all()
        assert (pixels[:, np.kron(latent_mask(view, 4)[0], np.ones((4, 4))) > 0] == 1).all()


def test_enlarged_view_is_a_crop_of_the_enlarged_picture() -> None:
    ramp = np.zeros((64, 64, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, (np.arange(64) * 4)[:, None]
    view = View((64, 64), (88, 88), top=20, left=4)
    pixels = (apply_view(ramp, view) + 1) * 127.5
    expected = np.arange(64)
    np.testing.assert_allclose(pixels[0, 30], ((expected + 4.5) * 64 / 88 - 0.5) * 4, atol=3)
    np.testing.assert_allclose(pixels[1, :, 30], ((expected + 20.5) * 64 / 88 - 0.5) * 4, atol=3)


def test_plain_view_is_the_picture_and_flip_its_mirror() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    view = apply_view(picture, plain_view((32, 32)))
    np.testing.assert_array_equal(np.rint((view + 1) * 127.5).astype(np.uint8), picture.transpose(2, 0, 1))
    np.testing.assert_array_equal(apply_view(picture, plain_view((32, 32), flip=True)), view[:, :, ::-1])


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64)])
def test_crops(height: int, width: int) -> None:
    left, top, right, bottom = crop_box((height, width), (64, 64), "center")
    assert right - left == bottom - top == min(height, width)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    assert crop_box((height, width), (64, 64), "squash") == (0, 0, width, height)
    boxes = {crop_box((height, width), (64, 64), "random", counter_rng(i)) for i in range(100)}
    assert all(0 <= x0 and 0 <= y0 and x1 <= width and y1 <= height and x1 - x0 == y1 - y0 for x0, y0, x1, y1 in boxes)
    assert (len(boxes) > 20) == (height != width)
    with pytest.raises(ValueError, match="generator"):
        crop_box((height, width), (64, 64), "random")


def test_alpha_goes_the_same_way_as_the_pixels() -> None:
    alpha = np.zeros((64, 64), dtype=np.uint8)
    alpha[:, :32] = 255
    np.testing.assert_array_equal(apply_view_to_alpha(alpha, plain_view((64, 64)), 4)[0, :, :7], 1)
    np.testing.assert_array_equal(apply_view_to_alpha(alpha, plain_view((64, 64), flip=True), 4)[0, :, :7], 0)
    small = apply_view_to_alpha(alpha, View((64, 64), (32, 32), top=16, left=0, pasted=True), 4)
    assert small[0, 5:11, 0:3].min() == 1 and small[0, :3].max() == 0 and small[0, :, 5:].max() == 0
