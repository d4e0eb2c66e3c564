"""Where a picture's caption comes from: a sidecar `.txt`, a prompt, or a set of templates."""

from __future__ import annotations

import difflib
import string
from collections.abc import Sequence
from pathlib import Path

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.templates import TEMPLATES


def read_caption(path: Path) -> str:
    """Read a UTF-8 caption file as one line.

    Raises:
        DataError: It cannot be read, is not UTF-8, or is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read caption {path}: {error.strerror}") from error
    return decode_caption(data, f"caption {path}")


def decode_caption(data: bytes, name: str) -> str:
    """Decode the bytes of a caption; line breaks become blanks.

    Raises:
        DataError: They are not UTF-8, or blank.
    """
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); save it as UTF-8"
        ) from error
    if not text:
        raise DataError(f"{name} is empty; write a sentence or remove the file")
    return text


def subject(token: str | None, class_noun: str) -> str:
    """What `{}` stands for: "<new1> cat", or the token or the noun alone."""
    return f"{token or ''} {class_noun}".strip()


def fill(caption: str, token: str | None, class_noun: str) -> str:
    """Put token and noun into `{token}`, `{class}` and `{}`; other braces stay."""
    filled = caption.replace("{}", subject(token, class_noun)).replace("{token}", token or "")
    return " ".join(filled.replace("{class}", class_noun).split())


def prompts_of(prompt: str | Sequence[str], token: str | None, class_noun: str) -> tuple[str, ...]:
    """The captions that a prompt stands for.

    Args:
        prompt: A sentence with `{}` or `{token}` and `{class}`, a list of them, or a template set's name.

    Raises:
        DataOptionError: An unknown template set or placeholder, no sentence, or one without the token.
    """
    if isinstance(prompt, str):
        return _captions_of(TEMPLATES.get(prompt) or (_sentence(prompt),), token, class_noun)
    if not prompt:
        raise DataOptionError("concept.prompt is an empty list; give sentences, or the name of a template set")
    return _captions_of(tuple(prompt), token, class_noun)


def _sentence(prompt: str) -> str:
    if " " not in prompt.strip() and "{" not in prompt:
        close = difflib.get_close_matches(prompt, TEMPLATES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"template sets: {', '.join(TEMPLATES)}"
        raise DataOptionError(f"prompt {prompt!r} is no template set and no sentence; {hint}")
    return prompt


def _captions_of(prompts: Sequence[str], token: str | None, class_noun: str) -> tuple[str, ...]:
    for prompt in prompts:
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        except ValueError as error:
            raise DataOptionError(f"prompt {prompt!r}: {error}; braces come in pairs") from error
        if unknown := fields - {"", "token", "class"}:
            raise DataOptionError(
                f"prompt {prompt!r}: unknown placeholder {{{min(unknown)}}}; known are {{}}, {{token}} and {{class}}"
            )
        if "token" in fields and token is None:
            raise DataOptionError(
                f"prompt {prompt!r} has {{token}}, but the concept has no token; name one or write {{}}"
            )
    captions = tuple(fill(prompt, token, class_noun) for prompt in prompts)
    for prompt, caption in zip(prompts, captions, strict=True):
        if not caption:
            raise DataOptionError(f"prompt {prompt!r} gives an empty caption; name a class_noun or write a sentence")
        if reason := lacks_token(caption, token):
            raise DataOptionError(f"prompt {prompt!r}: {reason}")
    return captions


def lacks_token(caption: str, token: str | None) -> str:
    """Why a caption teaches the concept's token nothing; "" if it names it (or there is none)."""
    if not token or token in caption:
        return ""
    return f"token {token} is not in the caption {caption!r}; write {token} or {{token}} into it, or drop the token"
