"""Prompt templates of textual inversion, for objects and for styles (`{}` is the token with its noun)."""

from __future__ import annotations

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}", "a picture of {}", "an image of {}", "a rendering of {}", "the photo of {}",
        "a photo of one {}", "a close photo of {}", "a bright photo of {}", "a dark photo of {}", "a good photo of {}",
        "a clean photo of {}", "a photo of my {}", "a photo of the {}", "a photo of a small {}", "a photo of a large {}",
        "a photo of a nice {}", "photo of {}", "the picture of {}", "a good picture of {}", "{}",
    ),
    "style": (
        "a painting in the style of {}", "a picture in the style of {}", "a rendering in the style of {}",
        "an image in the style of {}", "a drawing in the style of {}", "a photo in the style of {}",
        "a bright painting in the style of {}", "a dark painting in the style of {}", "the painting in the style of {}",
        "a good painting in the style of {}",
    ),
}  # fmt: skip
