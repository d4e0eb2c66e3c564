"""Shipped recipes as text, and which one fits a base."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from lit_personalize.errors import UsageError

RECIPES = Path(__file__).parent / "recipes"
BASES = ("tinyworld", "sd15", "sd21", "sdxl")


def recipe_path(name: str) -> Path:
    """A configuration file: a path, or a shipped recipe such as "custom_diffusion/tinyworld"."""
    for candidate in (Path(name), RECIPES / f"{name}.yaml", RECIPES / name):
        if candidate.is_file():
            return candidate
    known = names()
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"recipes: {', '.join(known)}"
    raise UsageError(f"no configuration file or recipe {name!r}; {hint}")


def base_key(base: str) -> str:
    """The recipe family of a base: by the class and text width of a diffusers directory, else by name."""
    if base in BASES:
        return base
    index = Path(base) / "model_index.json"
    if not index.is_file():
        return "sdxl" if "xl" in base.lower() else "sd15"
    if "XL" in json.loads(index.read_text(encoding="utf-8"))["_class_name"]:
        return "sdxl"
    unet = json.loads((Path(base) / "unet" / "config.json").read_text(encoding="utf-8"))
    return "sd21" if unet.get("cross_attention_dim") == 1024 else "sd15"


def recipe_text(method: str, key: str, base: str, token: str) -> str:
    """A recipe's YAML with its comments, and with base and token filled in."""
    path = RECIPES / method / f"{key}.yaml"
    if not path.is_file():
        raise UsageError(f"there is no recipe {method}/{key}; recipes: {', '.join(names())}")
    text = path.read_text(encoding="utf-8")
    text = text.replace("<new1>", token).replace("<s0><s1>", token)
    return "\n".join(f"    base: {base}" if line.startswith("    base: ") else line for line in text.splitlines())


def method_of(path: Path) -> str:
    """The method of a shipped recipe file; "" of any other file, and of those that only fit a method to hardware."""
    inside = path.resolve()
    method = inside.parent.name if inside.parent.parent == RECIPES.resolve() else ""
    return "" if method == "hardware" else method


def title_of(method: str) -> str:
    """A method's name as its recipe's head writes it: "Custom Diffusion"; of an unknown method what was given."""
    known = [name for name in names() if name.partition("/")[0] == method != "hardware"]
    if not known:
        return method
    head = (RECIPES / f"{known[0]}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return re.sub(r" \([^)]*\)", "", head).partition(" on ")[0]


def names() -> list[str]:
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))
