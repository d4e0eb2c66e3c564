"""`litp w2w explore`: what the page says is what the space says, also by the page's own script in a browser."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.sampling.sampler import SamplingOptions
from lit_personalize.weights2weights.directions import find
from lit_personalize.weights2weights.exploration import UNKNOWN, draw_strip, label_bytes, quantised
from lit_personalize.weights2weights.points import of_row

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(planted: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page with strips of two labels and a picture for every second adapter."""
    folder = tmp_path_factory.mktemp("page")
    pictures = folder / "pictures"
    for number in range(0, 60, 2):
        (pictures / f"critter-{number:02d}").mkdir(parents=True)
        Image.new("RGB", (200, 100), (4 * number, 80, 90)).save(pictures / f"critter-{number:02d}" / "0.png")
    given = ["w2w", "explore", str(planted.folder), "--corpus", str(planted.corpus), "-o", str(folder / "space.html")]
    drawn = ["--prompt", "<b>a</b> cat", "--strips", "beard", "hat", "--by", "-2", "0", "2", "--steps", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*given, *drawn, "--pictures", str(pictures), "--embed", "6", "--title", "<i>", "--json"]) == 0
    return folder / "space.html", json.loads(out.getvalue())


def test_the_page_is_one_file_of_text_and_pictures(page: tuple[Path, dict[str, Any]]) -> None:
    path, report = page
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", source)
    places = re.findall(r"(?:src|href)=\"([^\"]*)\"", source)
    assert len([place for place in places if place.startswith("data:image/png;base64,")]) == 6
    assert all(place.startswith("data:image/") for place in places)
    assert "<h1>&lt;i&gt;</h1>" in source and "&lt;b&gt;a&lt;/b&gt; cat" in source and "<b>a" not in source
    ids = re.findall(r" id=\"([^\"]*)\"", source)
    assert len(ids) == len(set(ids)) and report["bytes"] == path.stat().st_size < 200_000
    assert report["strips"] == ["beard", "hat"] and report["adapters"] == 60


def test_directions_are_told_with_what_they_read_of_others(planted: Any, page: tuple[Path, dict[str, Any]]) -> None:
    source, report = page[0].read_text(encoding="utf-8"), page[1]
    told = {d["name"]: d for d in report["directions"]}
    assert set(told) == {"beard", "hat", "age", "rare"}
    found = find(planted.space.coefficients, (planted.factors[:, 0] > 0).float(), "beard")
    assert told["beard"]["held_out"] == pytest.approx(found.held_out) and f"{100 * found.held_out:.1f} %" in source
    assert not told["age"]["classes"] and sum(told["rare"]["counts"]) == 40


def test_coefficients_survive_being_packed(planted: Any) -> None:
    coefficients = planted.space.coefficients
    told = quantised(coefficients)
    back = torch.from_numpy(np.frombuffer(base64.b64decode(told["packed"]), "<i2").astype(np.float32)).reshape(60, 8)
    error = (back * torch.tensor(told["scales"]) - coefficients).abs().amax(0)
    assert bool((error <= coefficients.abs().amax(0) / 60000).all())
    values = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    packed = label_bytes(values, False)
    assert (packed["low"], packed["high"]) == (1, 3)
    assert list(base64.b64decode(packed["values"])) == [0, UNKNOWN, 254, 127]
    packed = label_bytes(torch.tensor([-1.0, 1.0, float("nan")]), True)
    assert list(base64.b64decode(packed["values"])) == [0, 1, UNKNOWN]


def test_a_strip_changes_along_its_direction_alone(planted: Any) -> None:
    """At 0 it is the adapter itself; and every picture is that of the adapter at its place, whatever came before."""
    space = planted.space
    direction = find(space.coefficients, (planted.factors[:, 0] > 0).float(), "beard")
    point = of_row(space, "one", planted.rows[1])
    how = SamplingOptions(steps=2, guidance=1.0)

    def strip(*steps: float) -> np.ndarray:
        return draw_strip(space, load_base(space.details["base"]), point, direction, steps, "a cat", 3, how).pictures

    whole = strip(-40, 0, 40)
    for place, by in enumerate((-40, 0, 40)):
        assert np.array_equal(whole[place], strip(by)[0])
    assert not np.array_equal(whole[0], whole[1]) and not np.array_equal(whole[1], whole[2])


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--strips", "beard"], 2, "say of what with --prompt"),
        (["--labels", "bread"], 2, "there is no label 'bread'"),
        (["--embed", "1"], 2, "--embed 2 or more"),
        (["--pictures", "NOWHERE"], 3, "is no folder"),
    ],
)
def test_wrong_input_gets_one_sentence(
    planted: Any, tmp_path: Path, given: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["w2w", "explore", str(planted.folder), "--corpus", str(planted.corpus), "-o", str(tmp_path / "x.html")]
    assert main([*asked, *given]) == code and said in capsys.readouterr().err and not (tmp_path / "x.html").exists()


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_choosing_and_comparing_work_in_a_browser(
    planted: Any, page: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A probe behind the page's own script clicks, types and chooses, and notes what the page then shows."""
    probe = """<script>
    const notes = [], near = () => [...document.querySelectorAll("#near button")].map(b => b.dataset.id);
    const name = () => document.querySelector("#chosen strong").textContent;
    const set = (element, value, event) => { element.value = value; element.dispatchEvent(new Event(event)); };
    const inked = () => canvas.toDataURL();
    addEventListener("error", event => notes.push(event.message));
    notes.push(name(), near());
    set(find, "critter-17", "input"); notes.push(name(), near());
    document.querySelectorAll("#near button")[2].click(); notes.push(name());
    set(across, "2", "change"); set(up, "3", "change");
    const [x, y] = place(byId.get("critter-42")), size = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new MouseEvent("click", {clientX: size.left + x + 1, clientY: size.top + y}));
    notes.push(name(), document.querySelectorAll("#chosen img").length);
    const before = inked(); set(colour, "age", "change");
    notes.push(inked() !== before, get("legend").textContent.trim());
    document.querySelector("[data-colour=beard]").click(); notes.push(colour.value, get("legend").textContent);
    const order = [...space.ids.keys()].sort((a, b) => points[a * width + 2] - points[b * width + 2]);
    set(find, space.ids[order[0]], "input");
    canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); notes.push(name());
    set(across, String(width + named.indexOf("beard")), "change");
    order.sort((a, b) => at(b, axes[0]) - at(a, axes[0]));
    notes.push(across.selectedOptions[0].text, order.slice(0, 5));
    notes.push(document.documentElement.scrollWidth <= innerWidth);
    document.title = JSON.stringify(notes);
    </script></body>"""
    asked = tmp_path / "probe.html"
    asked.write_text(page[0].read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    done = subprocess.run([*command, f"file://{asked}"], capture_output=True, text=True, timeout=120)
    notes = json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))

    space = planted.space
    beta = space.coefficients[:, :6]

    def near(number: int) -> list[str]:
        order = (beta - beta[number]).norm(dim=1).argsort().tolist()
        return [space.ids[j] for j in order if j != number][:10]

    ages = [f"{float(v):.3g}" for v in (planted.factors[:, 2].min(), planted.factors[:, 2].max())]
    beard = find(space.coefficients, (planted.factors[:, 0] > 0).float(), "beard")
    most = (space.coefficients @ beard.vector).argsort(descending=True)[:5].tolist()
    last = space.ids[int(beta[:, 2].argmax())]
    assert notes == [
        "critter-00", near(0), "critter-17", near(17), near(17)[2], "critter-42", 1, True, " ".join(ages), "beard",
        "beardnot beard", last, "direction beard", most, True,
    ], done.stderr  # fmt: skip
