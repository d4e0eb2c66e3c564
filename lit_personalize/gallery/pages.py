"""Fill the templates of this folder: what is put in is escaped, what comes out loads nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_personalize import atomic


@cache
def _environment() -> Environment:
    """Escapes in every template; a name that nobody gave is an error."""
    loader = PackageLoader("lit_personalize.gallery")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(size=size, link=quote, zip=zip)
    return made


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write one page, all or nothing."""
    atomic.write_text(path, _environment().get_template(template).render(**values))
    return path


def size(count: int) -> str:
    """Bytes as people read them: 3.1 MB."""
    power = min((len(str(count)) - 1) // 3, 3)
    amount, unit = count / 1000**power, ("bytes", "kB", "MB", "GB")[power]
    return f"{amount:.0f} {unit}" if power == 0 or amount >= 100 else f"{amount:.1f} {unit}"
