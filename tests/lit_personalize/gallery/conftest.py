"""Read a page as a browser would, strictly: every tag is closed, every place that it names exists beside it."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements, texts and places of one page.

    Raises:
        AssertionError: A tag closes another than the last that was opened, or stays open.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag at line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def places(self) -> list[str]:
        """Where pictures and links lead, in order."""
        named = [(attributes.get("src"), attributes.get("href")) for _, attributes in self.elements]
        return [unquote(place) for pair in named for place in pair if place is not None]


def _check(path: Path) -> Page:
    page = Page(path)
    for place in page.places():
        assert (path.parent / place).is_file() and ":" not in place and ".." not in place, place
    source = path.read_text(encoding="utf-8")
    assert "http:" not in source and "https:" not in source and "@import" not in source and "url(" not in source
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all(image.get("alt") is not None for image in page.all("img"))
    return page


@pytest.fixture(scope="session")
def check_page() -> Callable[[Path], Page]:
    """Parse a page; everything that it names must lie below its folder."""
    return _check
