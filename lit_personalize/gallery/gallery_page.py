"""The gallery: one folder with a page of cards, their pictures and their files, for any web server or none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lit_personalize.gallery.cards import Card
from lit_personalize.gallery.pages import write_page
from lit_personalize.run_state import natural


def write_gallery(cards: Sequence[Card], folder: Path, title: str = "Adapters", files: bool = True) -> Path:
    """Copy pictures and files of the cards into `folder` and write its `index.html`.

    Args:
        files: Also copy adapter files, so that the page can offer them; else only their sizes are shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = [_shown(card, folder, place, files) for card, place in zip(cards, places_of(cards), strict=True)]
    facets = {
        key: sorted({item[key] for item in shown if item[key]}, key=natural) for key in ("method", "base", "rank")
    }
    return write_page(folder / "index.html", "gallery.html", title=title, cards=shown, facets=facets)


def places_of(cards: Sequence[Card]) -> list[str]:
    """A folder name for each card, without characters that need care in an address."""
    found: list[str] = []
    for card in cards:
        plain = re.sub(r"[^\w.-]+", "-", card.name).strip("-.") or "adapter"
        number = 2
        name = plain
        while name in found:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found


def _shown(card: Card, folder: Path, place: str, files: bool) -> dict[str, Any]:
    """What the template needs, with places relative to `folder`."""
    pictures = []
    for number, sample in enumerate(card.samples):
        target = folder / place / f"sample-{number:02d}{sample.path.suffix}"
        _copy(sample.path, target)
        with Image.open(target, formats=("PNG", "JPEG", "WEBP")) as opened:
            side = opened.width
        pictures.append({"file": f"{place}/{target.name}", "prompt": sample.prompt, "seed": sample.seed, "side": side})
    offered = []
    for path in card.files:
        name = path.relative_to(card.home).as_posix()
        if files:
            _copy(path, folder / place / "files" / name)
        error = next((card.checked[n] for n in (name, str(Path(name).parent), path.name) if n in card.checked), None)
        offered.append({
            "name": name, "file": f"{place}/files/{name}" if files else "", "bytes": path.stat().st_size,
            "kind": card.kinds.get(path, "configuration"), "error": error,
        })  # fmt: skip
    words = [card.name, card.method, card.base, card.license, *card.tokens, *card.prompts]
    words += [sample.prompt for sample in card.samples]
    return {
        "name": card.name, "method": card.method, "base": card.base, "rank": card.rank, "tokens": card.tokens,
        "step": card.step, "license": card.license, "pictures": pictures, "files": offered, "bytes": card.size,
        "verified": card.verified, "loading": card.loading.replace('"exports', f'"{place}/files') if files else "",
        "words": " ".join(dict.fromkeys(word.lower() for word in words if word)),
    }  # fmt: skip


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
