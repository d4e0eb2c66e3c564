"""`litp gallery`: cards say what the records say, files are the files, and the page works without a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.export.card import write_card
from lit_personalize.export.exporter import export
from lit_personalize.export.files import write_safetensors
from lit_personalize.export.verify import FileReport, VerifyReport
from lit_personalize.gallery.cards import card_of, find_cards, prompts_for
from lit_personalize.gallery.gallery_page import places_of
from lit_personalize.run_directory import RunDirectory

PROMPTS = ["a <new1> cat <script>alert(1)</script>", "a <new1> cat on the beach"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `cat & co`, verified and with samples, and `plain`, of another rank, with neither."""
    root = tmp_path_factory.mktemp("runs")
    for seed, (name, rank) in enumerate((("cat & co", 2), ("plain", 3))):
        base, adapter = load_base(tiny_bases["sd1"]), LoRA(rank=rank)
        adapter.attach(base, seed)
        weights = adapter.export_weights()
        run = RunDirectory(root, name).create()
        if seed == 0:
            weights.tokens = {"<new1>": [torch.ones(1, 32)]}
        files = export(weights, run.exports, base, name, ["diffusers", "kohya", "peft"])
        config = {
            "model": {"class_path": "x.Denoising", "init_args": {
                "base": str(tiny_bases["sd1"]), "adapters": [{"class_path": "x.LoRA"}]}},
            "sampling": {"prompts": PROMPTS, "steps": 1, "guidance": 1.0}, "export": {"license": "CC0"},
            "data": {"init_args": {"concepts": [{"token": "<new1>" if seed == 0 else ""}]}},
        }  # fmt: skip
        run.write_text("config.yaml", yaml.safe_dump(config))
        if seed == 0:
            report = VerifyReport([FileReport(f.name, f.kind, 1, 2e-7) for f in files])
            run.write_text("exports/verify.json", report.to_json())
            for step in (5, 20):
                folder = run.samples / f"step-{step:08d}"
                folder.mkdir()
                for row in range(2):
                    Image.fromarray(np.full((32, 32, 3), step + row, np.uint8)).save(folder / f"{row}_0.png")
                record = {"step": step, "prompts": PROMPTS, "seeds": [0], "pictures": ["0_0.png", "1_0.png"]}
                (folder / "samples.json").write_text(json.dumps(record))
            write_card(run, base, weights, files, PROMPTS, report)
    (root / "not-a-run").mkdir()
    return root


@pytest.fixture(scope="module")
def gallery(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    assert main(["gallery", str(runs), "-o", str(folder), "--title", "<b>Ours</b>"]) == 0
    return folder


def test_a_card_says_what_the_records_say(runs: Path) -> None:
    card, plain = find_cards([runs])
    assert (card.name, card.method, card.base, card.rank, card.license) == (
        "cat & co", "LoRA by Denoising", "sd1", "2", "CC0",
    )  # fmt: skip
    assert card.tokens == ["<new1>"] and card.step == 20 and card.verified and set(card.checked.values()) == {2e-7}
    assert [(s.prompt, s.seed, s.path.parent.name) for s in card.samples] == [(p, 0, "step-00000020") for p in PROMPTS]
    assert card.size == sum(path.stat().st_size for path in card.files) and "load_lora_weights" in card.loading
    assert (plain.name, plain.rank, plain.verified, plain.samples, plain.tokens) == ("plain", "3", False, [], [])


def test_a_card_names_the_recipe_of_a_run_and_of_a_file(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "cat & co", tmp_path / "copy")
    RunDirectory(tmp_path, "copy").write_env("custom_diffusion")
    assert card_of(copy).method == "Custom Diffusion"
    for details, method in (('{"recipe": "lora"}', "LoRA"), ("[1]", "diffusers LoRA"), ("", "diffusers LoRA")):
        write_safetensors(
            tmp_path / "x.safetensors", load_file(runs / "plain/exports/pytorch_lora_weights.safetensors"),
            {"litp.details": details},
        )  # fmt: skip
        assert card_of(tmp_path / "x.safetensors").method == method


def test_a_file_that_was_not_checked_makes_the_adapter_unverified(runs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs / "cat & co", tmp_path / "copy")
    shutil.copy(copy / "exports/pytorch_lora_weights.safetensors", copy / "exports/late.safetensors")
    assert not card_of(copy).verified


def test_files_of_other_people_are_cards_too(runs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / "plain/exports/pytorch_lora_weights.safetensors", tmp_path / name / "x.safetensors")
    files = [tmp_path / name / "x.safetensors" for name in ("one", "two")]
    cards = find_cards([*files, files[0]])
    assert [(c.name, c.method, c.rank) for c in cards] == [
        ("x", "diffusers LoRA", "3"),
        ("x (2)", "diffusers LoRA", "3"),
    ]
    assert places_of(cards) == ["x", "x-2"]
    assert [card.name for card in find_cards([tmp_path])] == ["one", "two"]


def test_the_page_is_whole_and_shows_text_as_text(gallery: Path, runs: Path, check_page: Callable[[Path], Any]) -> None:
    page = check_page(gallery / "index.html")
    text = "".join(page.text)
    assert "<b>Ours</b>" in text and PROMPTS[0] in text and "cat & co" in text and "2 adapters" in text
    assert len(page.all("script")) == 2 and not page.all("b")
    source = (gallery / "index.html").read_text()
    assert str(runs) not in source and str(runs.parent) not in source, "no path of the machine is shown"
    pictures = [image["src"] for image in page.all("img") if "src" in image]
    assert [int(np.asarray(Image.open(gallery / place))[0, 0, 0]) for place in pictures] == [20, 21]
    links = [attributes["href"] for attributes in page.all("a")]
    offered = {Path(link).relative_to("cat-co/files").as_posix() for link in links if link.startswith("cat-co/")}
    exports = runs / "cat & co" / "exports"
    assert offered == {p.relative_to(exports).as_posix() for p in exports.rglob("*") if p.is_file()} - {"verify.json"}
    for name in offered:
        assert (gallery / "cat-co/files" / name).read_bytes() == (exports / name).read_bytes()
    assert 'load_lora_weights("cat-co/files", weight_name=' in text
    cards = page.all("article")
    assert [(c["data-verified"], c["data-rank"]) for c in cards] == [("yes", "2"), ("no", "3")]
    assert "<script>alert(1)" in cards[0]["data-words"] and "beach" in cards[0]["data-words"]


def test_files_stay_where_they_are_on_request(runs: Path, tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    assert main(["gallery", str(runs / "cat & co"), "-o", str(tmp_path), "--no-files"]) == 0
    page = check_page(tmp_path / "index.html")
    assert not page.all("a") and not list(tmp_path.rglob("*.safetensors")) and "1 adapter" in "".join(page.text)


def test_samples_are_drawn_anew(
    runs: Path, tmp_path: Path, check_page: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["gallery", str(runs / "cat & co"), "-o", str(tmp_path), "--draw", "--seeds", "4", "--json"]
    capsys.readouterr()
    assert main([*given, "--prompts", "a {token} on a sofa", "a cat"]) == 0
    assert json.loads(capsys.readouterr().out)["cards"][0]["pictures"] == 2
    page = check_page(tmp_path / "index.html")
    images = [image for image in page.all("img") if "src" in image]
    assert [image["alt"] for image in images] == ["a <new1> on a sofa, seed 4", "a cat, seed 4"]
    check_page(tmp_path / "cat-co/drawn/index.html")
    (plain,) = find_cards([runs / "plain"])
    assert prompts_for(plain, []) == PROMPTS


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["RUNS/none"], 3, "does not exist; name runs"),
        (["RUNS/not-a-run"], 3, "holds no finished run and no adapter file"),
        (["RUNS", "--prompts", "a cat"], 2, "add --draw"),
        (["RUNS/plain", "--draw", "--prompts", "a {token}"], 3, "names no token to write for {token}"),
        (["RUNS/plain/exports/pytorch_lora_weights.safetensors", "--draw"], 2, "name it with --base"),
        (
            ["RUNS/plain/exports/pytorch_lora_weights.safetensors", "--draw", "--base", "x"],
            3,
            "give some with --prompts",
        ),
        (["BROKEN"], 3, "cannot be read"),
    ],
)
def test_wrong_input_gets_one_sentence(
    runs: Path, tmp_path: Path, given: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(runs / "plain", tmp_path / "broken")
    (broken / "config.yaml").write_text("model: [")
    given = [part.replace("RUNS", str(runs)).replace("BROKEN", str(broken)) for part in given]
    assert main(["gallery", *given, "-o", str(tmp_path / "page")]) == code
    message = capsys.readouterr().err
    assert said in message and len([m for m in message.splitlines() if m.startswith("litp gallery: ")]) == 1


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_search_and_filters_work_in_a_browser(gallery: Path) -> None:
    """The page's own script: a probe behind it types and chooses, and notes which cards are left."""
    probe = """<script>
    const left = () => [...document.querySelectorAll("article")].filter(a => a.offsetParent).map(a => a.dataset.name);
    const set = (element, value) => {
      element.value = value; element.dispatchEvent(new Event("input", {bubbles: true}));
      element.dispatchEvent(new Event("change", {bubbles: true}));
    };
    const notes = [left()];
    for (const asked of ["CAT &", "plain", "nothing"]) { set(words, asked); notes.push(left()); }
    document.getElementById("clear").click(); notes.push(left());
    set(document.querySelector("[data-facet=verified]"), "no"); notes.push(left());
    set(document.querySelector("[data-facet=verified]"), ""); set(order, "bytes"); notes.push(left());
    document.querySelector("button.picture").click();
    notes.push([document.querySelector("dialog figcaption").textContent]);
    document.title = JSON.stringify(notes);
    </script></body>"""
    source = (gallery / "index.html").read_text(encoding="utf-8")
    page = gallery / "probe.html"
    page.write_text(source.replace("</body>", probe), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    for sign, letter in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        title = title.replace(sign, letter)
    both = ["cat & co", "plain"]
    assert json.loads(title) == [
        both, both[:1], both[1:], [], both, both[1:], both, [f"{PROMPTS[0]}, seed 0"],
    ], done.stderr  # fmt: skip
