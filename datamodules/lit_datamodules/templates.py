"""Prompt templates for concepts without captions; `{}` stands for the token with its class noun.

Textual Inversion (Gal et al., 2022) trains on such sets, so that the token does not absorb the
wording of one sentence. `object` is about things, `style` about the manner of a picture.
"""

from __future__ import annotations

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of a {}", "a picture of a {}", "an image of a {}", "a rendering of a {}", "photo of a {}",
        "the picture of a {}", "a photo of the {}", "a picture of the {}", "an image of the {}",
        "a rendering of the {}", "the photo of the {}", "the image of a {}", "a photo of one {}",
        "a picture of one {}", "a close photo of a {}", "a close photo of the {}", "a good photo of a {}",
        "a good picture of the {}", "a clean photo of a {}", "a bright photo of the {}", "a dark photo of a {}",
        "a photo of my {}", "a small photo of the {}", "a {}",
    ),
    "style": (
        "a picture in the style of {}", "a photo in the style of {}", "an image in the style of {}",
        "a rendering in the style of {}", "the picture in the style of {}", "the photo in the style of {}",
        "a picture in {} style", "a photo in {} style", "an image in {} style", "a rendering in {} style",
        "the picture in {} style", "the image in {} style", "a painting in the style of {}",
        "a drawing in the style of {}", "the painting in the style of {}", "a good painting in the style of {}",
        "a small painting in the style of {}", "a large painting in the style of {}",
        "a bright painting in the style of {}", "a dark painting in the style of {}",
        "a clean painting in the style of {}", "a close picture in the style of {}",
    ),
}  # fmt: skip
