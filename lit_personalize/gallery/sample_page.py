"""What `litp sample` leaves: one file per picture, grid.png, and a page to look at them."""

from __future__ import annotations

from itertools import groupby, product
from pathlib import Path
from typing import Any

from PIL import Image

from lit_personalize.gallery.pages import write_page
from lit_personalize.sampling.cells import Cells
from lit_personalize.sampling.grid import Labels, labelled_grid


def write_cells(cells: Cells, folder: Path) -> list[dict[str, Any]]:
    """Write pictures, `grid.png` and `index.html`; returns a record for each picture.

    A file is named by the number of its prompt and its seed and, where there are several, by the number of its
    adapters and their strength: `00_7.png`, `00_7_a1_0.5.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = (range(len(cells.prompts)), cells.seeds, range(len(cells.groups)), cells.strengths)
    pictures = cells.pictures.reshape(-1, *cells.pictures.shape[-3:])
    drawn: list[dict[str, Any]] = []
    for (prompt, seed, group, strength), pixels in zip(product(*axes), pictures, strict=True):
        name = f"{prompt:02d}_{seed}"
        name += f"_a{group}" if len(cells.groups) > 1 else ""
        name += f"_{strength:g}" if len(cells.strengths) > 1 else ""
        path = folder / f"{name}.png"
        Image.fromarray(pixels).save(path)
        record = {"file": str(path), "prompt": cells.prompts[prompt], "seed": seed}
        drawn.append(record | {"adapters": cells.groups[group], "strength": strength})
    rows, columns = cells.axes()
    labelled_grid(cells.table(), rows, columns).save(folder / "grid.png")
    files = [Path(record["file"]).name for record in drawn]
    table = [files[r * len(columns) : (r + 1) * len(columns)] for r in range(len(rows))]
    write_page(
        folder / "index.html", "grid.html", title="Samples", rows=rows, columns=columns, table=table,
        row_spans=_spans(rows), column_spans=_spans(columns), side=cells.pictures.shape[-2],
    )  # fmt: skip
    return drawn


def _spans(labels: Labels) -> list[tuple[str, int]]:
    """Each outer label with the number of neighbours that share it."""
    return [(label, len(list(same))) for label, same in groupby(outer for outer, _ in labels)]
