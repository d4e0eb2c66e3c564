"""One page of a comparison of runs: figures, curves over each other, pictures beside each other, in one file."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from lit_personalize.errors import DataError
from lit_personalize.gallery.curves import HEIGHT, WIDER, WIDTH, chart_of, colours_of
from lit_personalize.gallery.pages import write_page
from lit_personalize.run_comparison import Comparison, lower_is_better
from lit_personalize.run_state import RunState

LARGEST = 384
"""Pixels of the longer side of a picture in the page; a larger one is shrunk."""
SEEDS = 4
"""Pictures of a prompt and run at most."""


def write_comparison(made: Comparison, path: Path) -> Path:
    """Write the page with all that it shows in it.

    Raises:
        DataError: A run's pictures or their record cannot be read.
    """
    names = sorted(made.curves, key=lambda name: (name != "loss", not name.startswith("loss")))
    drawn = (chart_of(name, made.curves[name], WIDTH if i else WIDER) for i, name in enumerate(names))
    charts = [chart for chart in drawn if chart]
    prompts, steps = pictures_of(made.runs)
    best = {name: _best(name, [f.best if f else None for f in row]) for name, row in made.figures.items()}
    return write_page(
        path, "comparison.html", title=f"{len(made.runs)} runs", made=made, colours=colours_of(len(made.runs)),
        best=best, charts=charts, height=HEIGHT, prompts=prompts, steps=steps,
        points=json.dumps([chart.shown for chart in charts]), text=text_of,
    )  # fmt: skip


def pictures_of(runs: list[RunState]) -> tuple[dict[str, list[list[dict[str, Any]]]], list[int | None]]:
    """Prompt -> for each run its newest pictures, as data URIs; and the step that they are of.

    Raises:
        DataError: See `write_comparison`.
    """
    found: dict[str, list[list[dict[str, Any]]]] = {}
    steps: list[int | None] = []
    for number, run in enumerate(runs):
        records = sorted(Path(run.path, "samples").glob("step-*/samples.json"))
        steps.append(None)
        if not records:
            continue
        try:
            record = json.loads(records[-1].read_text(encoding="utf-8"))
            steps[-1] = int(record["step"])
            asked = [(str(prompt), seed) for prompt in record["prompts"] for seed in record["seeds"]]
            for (prompt, seed), name in zip(asked, record["pictures"], strict=True):
                cells = found.setdefault(prompt, [[] for _ in runs])
                if len(cells[number]) < SEEDS:
                    cells[number].append(_picture(records[-1].parent / name) | {"seed": seed})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the samples of run {run.path} cannot be read: {error!r}; draw them again") from error
    return found, steps


def _picture(path: Path) -> dict[str, Any]:
    """A picture as a data URI with its side in pixels."""
    with Image.open(path) as opened:
        side = max(opened.size)
        if side <= LARGEST and path.suffix == ".png":
            data, kind = path.read_bytes(), "png"
        else:
            small = opened.convert("RGB")
            small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "side": side}


def _best(name: str, values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and value == value]
    if len(known) < 2 or name == "images_per_second":
        return None
    return min(known) if lower_is_better(name) else max(known)


def text_of(key: str, value: Any) -> str:
    """A value of a configuration, classes by their short names."""
    if value is None:
        return "–"
    if isinstance(value, str) and key.endswith("class_path"):
        return value.rpartition(".")[2]
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.5g}" if isinstance(value, float) else str(value)
