"""Runs side by side: what differs, what is the same, and the page that shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from lit_personalize.cli.main import main
from lit_personalize.cli.run_tables import short_names
from lit_personalize.errors import DataError, UsageError
from lit_personalize.gallery.curves import chart_of, smoothed
from lit_personalize.run_comparison import compare, flattened, tensors_hash
from lit_personalize.run_directory import RunDirectory
from lit_personalize.run_state import find_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "a <new1> cat"


def made(root: Path, number: int, rank: int, losses: list[float]) -> RunDirectory:
    run = RunDirectory(root, f"s-{number}").create()
    adapter = {"class_path": "x.y.LoRA", "init_args": {"rank": rank, "alpha": 1.0}}
    config = {"name": run.name, "trainer": {"max_steps": 9}, "model": {"init_args": {"adapters": [adapter]}}}
    run.write_text("config.yaml", yaml.safe_dump(config))
    rows = [f"{loss},{10 + number},{step}" for step, loss in enumerate(losses)]
    run.write_text("metrics.csv", "\n".join(["loss,images_per_second,step", *rows, ""]))
    run.write_text("env.json", json.dumps({"time": number, "versions": {"torch": "2.13", "peft": f"0.{number}"}}))
    tensors = {"a": np.full(3, rank, np.float32), "b": np.ones((2, 2), np.float16)}
    save_file(tensors, run.exports / f"{run.name}.safetensors", {"run": run.name})
    folder = run.samples / "step-00000009"
    folder.mkdir()
    Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(folder / "0_7.png")
    record = {"step": 9, "prompts": [PROMPT], "seeds": [7], "pictures": ["0_7.png"]}
    (folder / "samples.json").write_text(json.dumps(record))
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, (rank, losses) in enumerate([(4, [3, 1, 2]), (8, [3, 0.5, 9]), (4, [float("nan"), 0.25])]):
        made(tmp_path, number, rank, losses)  # type: ignore[arg-type]
    return tmp_path


def test_only_what_differs(root: Path) -> None:
    found = compare(find_runs(["s-*"], root))
    assert found.configuration == {"model.init_args.adapters.0.init_args.rank": [4, 8, 4]}
    assert found.environment == {"versions.peft": ["0.0", "0.1", "0.2"]}
    figures = [figure and (figure.last, figure.best, figure.at) for figure in found.figures["loss"]]
    assert figures == [(2, 1, 2), (9, 0.5, 2), (0.25, 0.25, 2)]
    assert [figure and figure.best for figure in found.figures["images_per_second"]] == [10, 11, 12]
    (hashes,) = found.exports.values()
    assert list(found.exports) == ["NAME.safetensors"]
    assert hashes[0] == hashes[2] != hashes[1], "metadata is not compared, tensors are"


def test_sorted_by_a_figure_or_a_key(root: Path) -> None:
    def names(by: str) -> list[str]:
        found = compare(find_runs(["s-*"], root), by)
        assert [run.loss for run in found.runs] == [row and row.last for row in found.figures["loss"]]
        return [run.name for run in found.runs]

    assert names("loss") == ["s-2", "s-1", "s-0"] and names("images_per_second") == ["s-2", "s-1", "s-0"]
    assert names("model.init_args.adapters.0.init_args.rank") == ["s-0", "s-2", "s-1"]
    with pytest.raises(UsageError, match="no such figure or key; figures: loss, images_per_second"):
        names("lost")


def test_figures_of_an_evaluation_are_compared_too(root: Path) -> None:
    report = {"figures": {"CLIP-I": {"value": 0.8}, "KID": {"value": None}}}
    (root / "s-1/evaluation.json").write_text(json.dumps(report))
    found = compare(find_runs(["s-*"], root), by="CLIP-I")
    assert [run.name for run in found.runs] == ["s-1", "s-0", "s-2"] and found.figures["CLIP-I"][1] is None
    (root / "s-1/evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="evaluation.json is no report of litp evaluate"):
        compare(find_runs(["s-*"], root))


@pytest.mark.parametrize("harm", ["cut", "header", "bomb", "text"])
def test_a_damaged_adapter_file_is_named(root: Path, harm: str) -> None:
    path = root / "s-0/exports/s-0.safetensors"
    data = path.read_bytes()
    damaged = {"cut": data[:-1], "header": data[:9], "bomb": b"\xff" * 8 + data[8:]}
    path.write_bytes(damaged.get(harm, b"\x02" + b"\0" * 7 + b"[]"))
    with pytest.raises(DataError, match="s-0.safetensors"):
        tensors_hash(path)


def test_tables_fit_a_hundred_columns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", "--root", str(root), "s-0", "s-1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^adapters\.0\.rank +4 +8 *$", text, re.M)
    assert re.search(r"^loss +2 \(1 at 2\) +9 \(0\.5 at 2\)", text, re.M)
    assert "exports/NAME.safetensors: 2 different ones in 2 runs" in text
    for number in range(3, 12):
        made(root, number, number, [1 / number])
    assert main(["runs", "compare", "--root", str(root), "s-*", "--by", "loss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["run", "state", "step"] and "rank" in lines[0]
    assert lines[1].startswith("s-11 ") and lines[12].startswith("s-0 ")
    assert main(["runs", "compare", "--root", str(root), "s-4", "--json"]) == 2
    assert "there is one run to compare" in capsys.readouterr().err


def test_keys_are_shortened_as_far_as_they_stay_apart() -> None:
    keys = ["model.init_args.adapters.0.init_args.lr", "model.init_args.optimizer.init_args.lr", "trainer.max_steps"]
    assert list(short_names(keys).values()) == ["adapters.0.lr", "optimizer.lr", "max_steps"]
    assert flattened({"a": [1, 2], "b": [{"c": 1}, {}], "d": {}}) == {"a": [1, 2], "b.0.c": 1, "b.1": {}, "d": {}}


def test_curves_are_scaled_and_smoothed() -> None:
    chart = chart_of("loss", [[(1, 1.0), (2, float("nan")), (100, 0.001)], [], [(50, 0.1)]])
    assert chart is not None and chart.logarithmic and [line.number for line in chart.lines] == [0, 2]
    assert chart.lines[1].single and chart.shown[0] == [(1, 1.0), (100, 0.001)]
    assert chart_of("loss", [[], [(1, float("inf"))]]) is None
    noisy = [(step, float(step % 2)) for step in range(300)]
    assert max(value for _, value in smoothed(noisy)[10:-10]) < 0.6, "means of neighbours"
    flat = chart_of("loss", [[(1, 0.0), (2, 0.0)]])
    assert flat is not None and flat.ticks_y


class Page(HTMLParser):
    """Addresses of a page, and how many elements of a name."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.names: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def page(root: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made(root, 5, 16, [1 / (step + 1) for step in range(60)])
    assert main(["runs", "compare", str(root), "--html", str(root / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(root / "page.html")
    return root / "page.html"


def test_the_page_has_all_in_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.addresses) == 4 and all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert not re.search(r"https?://|url\(", text), "nothing is loaded from elsewhere"
    assert found.names.count("svg") == 2 and found.names.count("polyline") >= 4
    assert "a &lt;new1&gt; cat" in text and "adapters.0.rank" in text


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_works_in_a_browser(page: Path) -> None:
    """A probe behind the page's script points at a step, picks a run and opens a picture."""
    probe = """<script>
    const svg = document.querySelector("svg"), box = svg.getBoundingClientRect(), notes = [];
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top + 9}));
    notes.push(document.querySelector(".read").textContent);
    document.querySelectorAll("[data-pick]")[1].click();
    notes.push([...document.querySelectorAll("svg:first-of-type g.on")].map(g => g.dataset.run).join());
    document.querySelector("button.picture").click();
    notes.push(document.querySelector("dialog figcaption").textContent);
    document.title = JSON.stringify(notes);
    </script></body>"""
    probed = page.with_name("probe.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{probed}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    read, picked, caption = json.loads(title.replace("&lt;", "<").replace("&gt;", ">"))
    assert "s-5 0.01667 at 60" in read and "s-0 2 at 3" in read, done.stderr
    assert set(picked.split(",")) == {"1"} and caption == f"s-0: {PROMPT}, seed 7"
