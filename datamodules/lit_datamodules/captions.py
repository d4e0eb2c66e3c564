"""Where a picture's caption comes from: a sidecar `.txt`, or the concept's prompt."""

from __future__ import annotations

from pathlib import Path

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.templates import TEMPLATES


def read_caption(path: Path) -> str:
    """Read a UTF-8 caption file as one line.

    Raises:
        DataError: It is not UTF-8, or empty.
    """
    try:
        text = " ".join(path.read_bytes().decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise DataError(f"caption {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not text:
        raise DataError(f"caption {path} is empty; write a sentence or remove the file")
    return text


def prompts_of(prompt: str, token: str | None, class_noun: str) -> list[str]:
    """The captions that a prompt stands for: a template-set name, or one sentence with `{token}` and `{class}`."""
    subject = f"{token} {class_noun}".strip() if token else class_noun
    if prompt in TEMPLATES:
        return [template.format(subject) for template in TEMPLATES[prompt]]
    if " " not in prompt and "{" not in prompt:
        raise DataOptionError(f"prompt {prompt!r} is no template set ({', '.join(TEMPLATES)}) and no sentence")
    try:
        return [prompt.format(**{"token": token or "", "class": class_noun}).strip()]
    except (KeyError, IndexError, ValueError) as error:
        raise DataOptionError(f"prompt {prompt!r}: only {{token}} and {{class}} may stand in braces") from error


def check_token(caption: str, token: str | None, where: str) -> None:
    """Refuse a caption that lacks the concept's token: it would teach the token nothing."""
    if token and token not in caption:
        raise DataError(f"{where}: token {token} is not in the caption {caption!r}; add it, or drop `token`")
