"""`litp data retrieve`: a set that training takes, the same from one task or several; wrong input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from lit_datamodules.shard_sets import read_shards
from lit_datamodules.tar_index import index_tar, read_member
from lit_personalize.cli.main import main
from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder, write_shards


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_shards(sample_pictures(40, 6), tmp_path / "laion", per_shard=10)
    return ["data", "retrieve", "--shards", str(tmp_path / "laion/{00000..00003}.tar"), "--clip", "tinyworld"]


def test_a_set_for_training(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "reg"
    assert main([*command, "--query", "photo of a critter", "--n", "6", "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "40 captions of 40 samples in 4 shards" in shown.out and "photo of a critter" in shown.out
    assert "00003.tar: 10 captions of 10 samples (4 of 4)" in caplog.text
    contents = read_shards(0, str(out / "00000.tar"), 64)
    assert len(contents.samples) == 6 and all(record.fate == "used" for record in contents.records)
    (out / "00000.tar").write_bytes((out / "00000.tar").read_bytes().replace(b"critter", b"kritter", 1))
    fates = [record.fate for record in read_shards(0, str(out / "00000.tar"), 64).records]
    assert fates[-1] == "skipped", "a flipped byte is seen"


def test_tasks_of_an_array_and_a_picture_as_query(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(sample_pictures(1, 8, kind="critter").pixels[0]).save(tmp_path / "mine.png")
    asked = [*command, "--image", str(tmp_path / "mine.png"), "--n", "4", "--json"]
    for task in ("1/2", "0/2"):
        assert main([*asked, "-o", str(tmp_path / "many"), "--task", task]) == 0
        assert json.loads(capsys.readouterr().out)["shards scanned"] == 2
    assert main([*asked, "-o", str(tmp_path / "many"), "--merge"]) == 0
    many = capsys.readouterr().out
    assert main([*asked, "-o", str(tmp_path / "one")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(many)
    assert json.loads(many)["queries"]["mine"]["kept"] == 4


def test_the_pictures_of_a_folder_ask_together(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Similarities are those of the normalised mean of their unit vectors."""
    write_folder(sample_pictures(3, 8, kind="critter"), tmp_path / "my.photos")
    asked = [*command, "--image", str(tmp_path / "my.photos"), "--n", "3", "--near-duplicates", "0", "--json", "-o"]
    assert main([*asked, str(tmp_path / "reg")]) == 0
    kept = json.loads(capsys.readouterr().out)["queries"]["my.photos"]["similarity"]
    encoder = CaptionEncoder(committed_weights() / "retrieval_clip")
    mean = sum(encoder.image(picture)[0] for picture in sorted((tmp_path / "my.photos").glob("*.png")))
    captions = [c for n in range(4) for s in read_shards(0, str(tmp_path / f"laion/{n:05d}.tar"), 64).samples
                for c in s.captions]  # fmt: skip
    cosines = sorted(encoder.texts(captions) @ (mean / np.linalg.norm(mean)))
    assert [kept["max"], kept["min"]] == pytest.approx([cosines[-1], cosines[-3]], abs=1e-4)
    (tmp_path / "my.photos/00001.png").unlink()
    assert main([*asked, str(tmp_path / "reg")]) == 0
    assert json.loads(capsys.readouterr().out)["queries"]["my.photos"]["similarity"] != kept, "other pictures ask anew"


def test_shards_elsewhere_give_the_same_set(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--query", "photo of a critter", "--n", "6", "--json", "-o"]
    assert main([*command, *asked, str(tmp_path / "local")]) == 0
    elsewhere = [f"file://{part}" if part.endswith(".tar") else part for part in command]
    assert main([*elsewhere, "--fetch-to", str(tmp_path / "fetched"), *asked, str(tmp_path / "away")]) == 0
    assert (tmp_path / "local/00000.tar").read_bytes() == (tmp_path / "away/00000.tar").read_bytes()
    assert not list((tmp_path / "fetched").iterdir())
    capsys.readouterr()


def test_a_streamed_set_trains_and_late_damage_is_in_the_manifest(
    command: list[str], tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--query", "photo of a critter", "--n", "4", "-o", "reg"]) == 0
    write_folder(sample_pictures(2, 1, kind="critter"), tmp_path / "photos")
    (tmp_path / "reg/shards.json").unlink()  # with it, the damage would be found at the start
    entry = index_tar(Path("reg/00000.tar")).entries[1]
    with Path("reg/00000.tar").open("r+b") as file:
        file.seek(entry.members["jpg"].offset + entry.members["jpg"].size - 200)
        file.write(b"damage")
    (tmp_path / "run.yaml").write_text(
        f"name: run\nmodel: {{init_args: {{base: {tiny_bases['sd1']}}}}}\n"
        "data: {init_args: {concepts: [{path: photos, class_noun: critter, token: <new1>, captions: prompt}],\n"
        "  regularization: {shards: reg/00000.tar, stream: true}, resolution: 32, batch_size: 4}}\n"
        "sampling: {every: 100, steps: 2}\nexport: {verify: false}\ntrainer: {max_steps: 2}\n"
    )
    fit = ["fit", "-c", "custom_diffusion/sd15", "-c", "run.yaml"]
    assert main(fit) == 3
    assert f"00000.tar:{entry.key} is damaged: its sha256" in capsys.readouterr().err
    assert main([*fit, "--data.init_args.strict", "false"]) == 0
    lines = [json.loads(line) for line in Path("runs/run/manifest.jsonl").read_text().splitlines()]
    fates = {line["path"]: line["fate"] for line in lines if ".tar:" in line["path"]}
    assert list(fates.values()).count("skipped") == 1 and fates[f"reg/00000.tar:{entry.key}"] == "skipped"


def test_an_index_is_made_once_and_asked_many_times(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["data", "index", *command[2:], "-o", str(tmp_path / "index"), "--json"]
    assert main([*made, "--task", "1/2"]) == 0
    assert json.loads(capsys.readouterr().out)["shards embedded"] == 2
    assert main(made) == 0
    assert json.loads(capsys.readouterr().out)["vectors"] == 40
    asked = [*command, "--query", "photo of a critter", "--index", str(tmp_path / "index"), "--json"]
    assert main([*asked, "--n", "6", "--probes", "1", "-o", str(tmp_path / "reg")]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 6
    assert not (tmp_path / "reg/parts").exists()


def test_a_set_that_the_base_draws(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "retrieve", "--generate", "17", "--query", "a cat", "--query", "a dog", "--steps", "1", "--json",
               "--base", str(tiny_bases["sd1"])]  # fmt: skip
    assert main([*command, "-o", str(tmp_path / "one")]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 34
    for task, pictures in (("1/2", 0), ("0/2", 34)):
        assert main([*command, "-o", str(tmp_path / "two"), "--task", task]) == 0
        assert json.loads(capsys.readouterr().out)["pictures"] == pictures
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()
    captions = [sample.captions for sample in read_shards(0, str(tmp_path / "one/00000.tar"), 64).samples]
    assert captions == [("a cat",)] * 17 + [("a dog",)] * 17
    assert main([*command, "-o", str(tmp_path / "none"), "--generate", "0"]) == 2
    assert "--generate 0: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ([], 2, "nothing to look for: give a query"),
        (["--query", "a", "--min-similarity", "0.9999"], 3, "most similar caption per query: a: 0."),
        (["--query", "a", "--min-similarity", "0.5", "--percentile", "9"], 2, "give one"),
        (["--query", "a", "--merge"], 3, "4 of 4 shards are not scanned yet: 00000.tar"),
        (["--query", "a", "--merge", "--task", "0/2"], 2, "--task scans, --merge merges and --index searches"),
        (["--query", "a", "--index", "none"], 3, "none holds no finished index"),
        (["--image", "none.png"], 3, "cannot read picture none.png"),
        (["--image", "laion"], 3, "image folder laion holds no jpg, png or webp file"),
        (["--query", "a", "--clip", "nowhere"], 3, "nowhere has no config.json"),
        (["--query", "a", "--shards", "https://host/0.tar"], 2, "name a folder for that by --fetch-to"),
        (["--query", "a", "--keep-fetched"], 2, "name it by --fetch-to"),
        (["--query", "a", "--shards", "file:///none/0.tar", "--fetch-to", "f"], 3, "0.tar: not found (1 attempt)"),
        (["--query", "a", "--shards", "none/{0..2}.tar"], 3, "shards are missing: none/0.tar"),
    ],
)
def test_wrong_input_is_one_sentence(
    more: list[str], code: int, said: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*command, "-o", str(tmp_path / "out"), *more]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("litp data: ") and said in last


def test_a_bare_text_encoder_on_request(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranked by the pooled state of the end token, which stock `CLIPTextModel` gives for captions padded to the end."""
    base = committed_weights() / "base"
    asked = command[: command.index("--clip")]
    query = ["--query", "photo of a critter", "--n", "5", "--near-duplicates", "0", "-o", str(tmp_path / "reg")]
    assert main([*asked, "--text-encoder", str(base / "text_encoder"), *query]) == 0
    model = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")

    def pooled(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return torch.nn.functional.normalize(model(**tokens).pooler_output, dim=1)

    captions = [c for n in range(4) for s in read_shards(0, str(tmp_path / f"laion/{n:05d}.tar"), 64).samples
                for c in s.captions]  # fmt: skip
    with torch.no_grad():
        cosines = (pooled(captions) @ pooled(["photo of a critter"]).T)[:, 0]
    packed = tmp_path / "reg/00000.tar"
    kept = [json.loads(read_member(packed, entry.members["json"])) for entry in index_tar(packed).entries]
    ours = sorted((value for row in kept for value in row["similarity"].values()), reverse=True)
    assert ours == pytest.approx(sorted(cosines.tolist(), reverse=True)[:5], abs=1e-4)
    mine = tmp_path / "mine.png"
    Image.new("RGB", (9, 9)).save(mine)
    capsys.readouterr()
    for folder, more, code, said in (
        (base / "text_encoder", ["--image", str(mine)], 2, f"a text encoder alone cannot embed the picture {mine}"),
        (committed_weights() / "clip", query[:2], 3, "is no bare text encoder; give a whole CLIP as --clip"),
        (tmp_path, query[:2], 3, "has no config.json"),
    ):
        assert main([*asked, "--text-encoder", str(folder), "-o", str(tmp_path / "x"), *more]) == code
        assert said in capsys.readouterr().err


def test_a_task_that_does_not_exist(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--query", "a", "-o", str(tmp_path), "--task", "2/2"])
    assert "'2/2' is no I/N with I from 0 to N-1" in capsys.readouterr().err
