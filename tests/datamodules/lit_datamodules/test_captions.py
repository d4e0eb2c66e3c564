"""Captions name the concept, and what is wrong with them is said with file and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_datamodules.captions import lacks_token, prompts_of, read_caption
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.templates import TEMPLATES


@pytest.mark.parametrize(
    ("prompt", "token", "noun", "caption"),
    [
        ("photo of a {}", "<new1>", "cat", "photo of a <new1> cat"),
        ("photo of a {}", "<new1>", "", "photo of a <new1>"),
        ("photo of a {}", None, "cat", "photo of a cat"),
        ("a {token} {class} on the beach", "<new1>", "cat", "a <new1> cat on the beach"),
        ("painting in the style of {token} art", "<new1>", "", "painting in the style of <new1> art"),
        ("a photo of sks dog", "sks", "", "a photo of sks dog"),
    ],
)
def test_prompt_is_filled_in(prompt: str, token: str | None, noun: str, caption: str) -> None:
    assert prompts_of(prompt, token, noun) == (caption,)


@pytest.mark.parametrize(("name", "entries", "distinct"), [("object", 27, 27), ("style", 19, 17)])
def test_template_sets(name: str, entries: int, distinct: int) -> None:
    """As many as were published; two of the style sentences stand in their list twice."""
    captions = prompts_of(name, "<new1>", "cat")
    assert len(captions) == len(TEMPLATES[name]) == entries and len(set(captions)) == distinct
    assert all(caption.count("<new1> cat") == 1 for caption in captions)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("objects", "did you mean 'object'"),
        ("imagenet", "template sets: object, style"),
        ("a photo of a cat", "token <new1> is not in the caption"),
        ("a photo of {tokn} cat", r"unknown placeholder \{tokn\}"),
        ("a photo of {token", "braces"),
        ([], "empty list"),
        (["a photo of {}", "a cat"], "token <new1> is not in the caption 'a cat'"),
    ],
)
def test_wrong_prompt_is_refused(prompt: str | list[str], message: str) -> None:
    with pytest.raises(DataOptionError, match=message) as caught:
        prompts_of(prompt, "<new1>", "cat")
    assert caught.value.exit_code == 2


def test_token_placeholder_without_token() -> None:
    with pytest.raises(DataOptionError, match="has no token"):
        prompts_of("photo of {token} cat", None, "cat")
    with pytest.raises(DataOptionError, match="empty caption"):
        prompts_of("{}", None, "")


def test_caption_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa caf\u00e9\r\n  at night \n".encode())
    assert read_caption(path) == "a café at night"
    path.write_bytes("a café".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 0xe9 at offset 5\)") as caught:
        read_caption(path)
    assert caught.value.exit_code == 3
    path.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        read_caption(path)


def test_token_is_found_as_written() -> None:
    assert not lacks_token("a <new1> cat", "<new1>")
    assert lacks_token("a <new11> cat", "<new1>")
    assert not lacks_token("a cat", None)
