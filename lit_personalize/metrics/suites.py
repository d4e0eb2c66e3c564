"""Published data sets of personalization, read from local directories in the layout of their release."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_personalize.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class SuiteSubject:
    """One subject: its pictures, class noun, and prompts with the token in place."""

    name: str
    class_noun: str
    pictures: tuple[Path, ...]
    prompts: tuple[str, ...]


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)) if folder.is_dir() else ()
    if not found:
        raise DataError(f"suite folder {folder} is missing or holds no picture")
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"suite file {path} is missing; copy the data set in its published layout")
    return path.read_text(encoding="utf-8")


def dreambooth(root: Path, token: str = "<new1>") -> Iterator[SuiteSubject]:
    """google/dreambooth: `prompts_and_classes.txt` beside one folder per subject (30 subjects, 25 prompts each)."""
    root = root / "dataset" if (root / "dataset").is_dir() else root
    text = _text(root / "prompts_and_classes.txt")
    classes: list[tuple[str, str]] = []
    for line in text.splitlines():
        name, comma, noun = line.strip().partition(",")
        if comma and "{" not in line and "[" not in line and " " not in name.strip() and name != "subject_name":
            classes.append((name.strip(), noun.strip()))
    lists = [part.split("]")[0] for part in text.split("prompt_list = [")[1:]]
    if not classes or len(lists) != 2:
        raise DataError(f"{root / 'prompts_and_classes.txt'} does not have the published layout")
    live_nouns = {"cat", "dog"}
    for name, noun in classes:
        block = lists[1] if noun in live_nouns else lists[0]
        prompts = tuple(_template(line, token, noun) for line in block.splitlines() if "'" in line)
        yield SuiteSubject(name, noun, _pictures(root / name), prompts)


def _template(line: str, token: str, noun: str) -> str:
    """`'a {0} {1} in the jungle'.format(unique_token, class_token),` to its sentence."""
    quoted = line.strip().split(".format", 1)[0]
    return str(ast.literal_eval(quoted)).format(token, noun)


def customconcept101(root: Path, token: str = "<new1>") -> Iterator[SuiteSubject]:
    """CustomConcept101: `dataset.json` with 101 concepts and a prompt file of 20 lines for each."""
    entries = json.loads(_text(root / "dataset.json"))
    for entry in entries:
        noun = entry["class_prompt"]
        prompts = _text(root / entry["prompt_filename"]).splitlines()
        folder = root / entry["instance_data_dir"]
        filled = tuple(p.format(f"{token} {noun}").strip() for p in prompts if p.strip())
        yield SuiteSubject(folder.name, noun, _pictures(folder), filled)


SUITES = {"dreambooth": dreambooth, "customconcept101": customconcept101}
