"""The card of the embedded base: what it draws for captions it never saw, read by the reader.

Every figure is measured by this file: the base's pictures, real renders of the same scenes (the
reader's own ceiling) and VAE reconstructions of those renders (the ceiling of the latents).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.sampling.grid import captioned_grid
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.tinyworld.autoencoder import psnr, reconstruct
from lit_personalize.tinyworld.build import VERSION
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.dataset import sample_pictures
from lit_personalize.tinyworld.scene import Kind, Scene, Thing
from lit_personalize.tinyworld.training import Log

COUNTS: dict[Kind, int] = {"object": 150, "critter": 100, "person": 100, "pair": 100, "sign": 100}
OPTIONS = SamplingOptions(steps=25, guidance=4.0, batch_size=32)
ASKED = {"shape": (0.90, 0.80), "object colour": (0.95, 0.90), "background": (0.95, 0.90),
         "critter attributes": (0.85, 0.70)}  # fmt: skip
"""What the base must reach, and what one that was trained on a CPU must."""


def test_scenes(counts: dict[Kind, int], seed: int = 1000) -> tuple[list[Scene], np.ndarray]:
    """Scenes whose combination the base never saw, in plain photo style, and their real renders."""
    scenes: list[Scene] = []
    pixels = []
    for kind, count in counts.items():
        made = sample_pictures(3 * count, seed, split="test", kind=kind)
        plain = [i for i, scene in enumerate(made.scenes) if scene.style == "photo"][:count]
        scenes += [made.scenes[i] for i in plain]
        pixels.append(made.pixels[plain])
    return scenes, np.concatenate(pixels)


def measure(base: Base, reader_dir: Path, counts: dict[Kind, int] | None = None, log: Log = print) -> dict[str, Any]:
    """Score the base on unseen combinations, beside the two ceilings."""
    from lit_personalize.tinyworld.reader import Reader
    from lit_personalize.tinyworld.score import score_pictures

    reader = Reader.load(reader_dir)
    scenes, real = test_scenes(counts or COUNTS)
    log(f"drawing {len(scenes)} captions: {OPTIONS.steps} DDIM steps, guidance {OPTIONS.guidance}")
    drawn = generate(base, [caption(s) for s in scenes], list(range(len(scenes))), options=OPTIONS)
    rebuilt = reconstruct(base.vae, real)
    return {
        "base": score_pictures(drawn, scenes, reader),
        "real": score_pictures(real, scenes, reader),
        "vae": score_pictures(rebuilt, scenes, reader),
        "vae_psnr_db": round(psnr(real, rebuilt), 2),
        "captions": len(scenes),
        "steps": OPTIONS.steps,
        "guidance": OPTIONS.guidance,
    }


def caption_retrieval(clip_dir: Path, pictures: int = 960, among: int = 96) -> float:
    """Share of unseen pictures, held-out attributes included, whose caption is nearest among `among` of them."""
    from lit_personalize.metrics.alignment import cosines
    from lit_personalize.metrics.features import Clip

    made, clip = sample_pictures(pictures, 77, split="test", population="all"), Clip(clip_dir)
    matrix = cosines(clip.images(made.pixels), clip.texts([caption(scene) for scene in made.scenes]))
    blocks = [matrix[i : i + among, i : i + among] for i in range(0, pictures, among)]
    return float(np.mean([(block.argmax(1).numpy() == np.arange(len(block))).mean() for block in blocks]))


def showcase() -> list[Scene]:
    """Sixty-four scenes for the picture: eight rows of one kind each."""
    rng = np.random.default_rng(64)
    shapes = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
    colors = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
    grounds = ("blue", "white", "yellow", "black", "orange", "gray", "brown", "pink")
    rows: list[Scene] = [
        Scene("object", (Thing(s, c),), background=g) for s, c, g in zip(shapes, colors, grounds, strict=True)
    ]
    textured = [
        ("hexagon", "striped"), ("oval", "dotted"), ("circle", "checkered"), ("heart", "striped"),
        ("square", "dotted"), ("diamond", "checkered"), ("crescent", "striped"), ("arrow", "dotted"),
    ]  # fmt: skip
    places = ("beach", "forest", "snow", "night", "desert", "city", "meadow", "sea")
    tones = ("red", "orange", "purple", "pink", "blue", "yellow", "brown", "white")
    rows += [Scene("object", (Thing(s, c, t),), background="white" if c != "white" else "blue")
             for (s, t), c in zip(textured, tones, strict=True)]  # fmt: skip
    rows += [Scene("object", (Thing(s, c),), background=p)
             for s, c, p in zip(reversed(shapes), ("pink", "red", "purple", "orange", "red", "green", "red", "orange"),
                                places, strict=True)]  # fmt: skip
    for kind, count in (("critter", 16), ("person", 8), ("sign", 8), ("pair", 8)):
        made = sample_pictures(4 * count, int(rng.integers(1 << 30)), split="test", kind=kind)  # type: ignore[arg-type]
        rows += [scene for scene in made.scenes if scene.style == "photo"][:count]
    return rows


def table(card: dict[str, Any]) -> str:
    """The card's scores as a Markdown table, in percent."""
    rows = ["| balanced accuracy (%) | base | asked | asked of a CPU's base | VAE ceiling | real renders |",
            "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, value in card["base"].items():
        asked, floor = (f"{100 * limit:.0f}" for limit in ASKED[name]) if name in ASKED else ("", "")
        ceilings = f"{100 * card['vae'][name]:.1f} | {100 * card['real'][name]:.1f}"
        rows.append(f"| {name} | {100 * value:.1f} | {asked} | {floor} | {ceilings} |")
    if found := card.get("CLIP, caption found among 96"):
        rows += ["", f"The metric CLIP finds the caption of an unseen picture among 96 in {100 * found:.1f} %."]
    return "\n".join(rows)


def write_card(
    out: Path, docs: Path | None = None, counts: dict[Kind, int] | None = None, log: Log = print
) -> dict[str, Any]:
    """Measure `<out>/base` with `<out>/reader`; write `<out>/card.json` and, with `docs`, page and picture."""
    base = load_base(out / "base")
    card = measure(base, out / "reader", counts, log)
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in out.iterdir() if p.is_dir()}
    card |= {
        "version": VERSION,
        "fingerprint": base.fingerprint,
        "date": datetime.now(UTC).date().isoformat(),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in base.components().items()},
        "bytes": {name: size for name, size in sizes.items() if not name.startswith(".")},
    }
    if (out / "clip").is_dir():
        card["CLIP, caption found among 96"] = round(caption_retrieval(out / "clip"), 4)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if docs is not None:
        scenes = showcase()
        captions = [caption(scene) for scene in scenes]
        pictures = generate(base, captions, list(range(len(scenes))), options=OPTIONS)
        captioned_grid(pictures, captions).save(docs / "tinyworld.png")
        (docs / "tinyworld_scores.md").write_text(table(card) + "\n", encoding="utf-8")
    return card
