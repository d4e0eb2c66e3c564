"""`litp bank plan`: a job table from folders, a csv or shards; what cannot be trained is named, and budgeted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from lit_personalize.bank import job_table
from lit_personalize.cli.bank_people import member_writer, rows_of
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

GIVEN = ["--trainer.max_steps", "3"]


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for name in ("ann", "bob"):
        write_folder(sample_pictures(2, len(name), kind="critter"), tmp_path / "people" / name)
    return tmp_path / "people"


def table(people: Path, *lines: str, head: str = "id,images,class_noun,seed,steps,lr,big_nose,hair") -> str:
    path = people / "people.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return str(path)


def test_a_table_of_text(people: Path) -> None:
    """Own words and numbers, files one by one, and labels: numbers where the whole column is."""
    text = table(people, "a1,ann,woman,0,,,1,red", 'b.2,"bob/00000.png; ann/00001.png",,7,40,0.01,0.5,', "c,bob,,,,,,7")
    rows = rows_of(text).rows
    assert [row.id for row in rows] == ["a1", "b.2", "c"]
    assert rows[0].folder == str(people / "ann") and rows[0].class_noun == "woman" and rows[0].seed == 0
    assert rows[0].labels == {"big_nose": 1.0, "hair": "red"} and rows[0].steps is None
    assert rows[1].files == [str(people / "bob/00000.png"), str(people / "ann/00001.png")] and not rows[1].folder
    assert (rows[1].seed, rows[1].steps, rows[1].lr, rows[1].class_noun) == (7, 40, 0.01, None)
    assert rows[2].labels == {"hair": "7"}, "a column with a word holds words"
    folder = people / "gathered"
    folder.mkdir()
    member_writer(rows[1])(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "0000-00000.png", "0000-00000.txt", "0001-00001.png", "0001-00001.txt",
    ]  # fmt: skip
    job_table.write(people, rows)
    assert job_table.read(people) == rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a1,gone,,,,,,", "a1: image folder .*gone does not exist"),
        ("a1,ann/none.png,,,,,,", "a1: there is no picture .*none.png"),
        ("a1,,,,,,,", "line 2: a1 has no images"),
        ("a1,ann", "line 2 has fewer values"),
        ("a1,ann,,,,,,,9", "line 2 has more values"),
        ("a1,ann,,x,,,,", "line 2: seed of a1 is 'x', which is no whole number"),
        ("a1,ann,,,0,,,", "line 2: steps of a1 must be at least 1"),
        ("../a,ann,,,,,,", "line 2: '../a' cannot name an adapter"),
        (",ann,,,,,,", "line 2: '' cannot name an adapter"),
    ],
)
def test_rows_of_no_use_are_named_and_budgeted(people: Path, line: str, said: str) -> None:
    text = table(people, line, "b,bob,,,,,,")
    with pytest.raises(DataError, match=f"1 of 2 adapters cannot be trained: {said}.*--tolerate 1"):
        rows_of(text)
    found = rows_of(text, tolerate=1)
    assert [row.id for row in found.rows] == ["b"] and len(found.left_out) == 1


def test_tables_that_are_none(people: Path) -> None:
    with pytest.raises(DataError, match="b stand more than once"):
        rows_of(table(people, "b,bob,,,,,,", "b,ann,,,,,,"), tolerate=9)
    with pytest.raises(DataError, match="lacks the column images"):
        rows_of(table(people, "b", head="id"))
    with pytest.raises(DataError, match="holds no adapter"):
        rows_of(table(people))
    latin = people / "latin.csv"
    latin.write_bytes("id,images\na,ann\nb,b\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 3 of .*latin.csv is not UTF-8"):
        rows_of(str(latin))


def test_shards(people: Path, tmp_path: Path) -> None:
    """Members of an id, which may lie between others; a tar that is cut short costs what is behind the cut."""
    jpg = (people / "ann/00000.png").read_bytes()
    tar = tmp_path / "p-000.tar"
    with tarfile.open(tar, "w") as file:
        for key in ("x/0", "y/0", "x/1"):
            for name, data in ((f"{key}.png", jpg), (f"{key}.txt", key.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    rows = rows_of(str(tmp_path / "p-{000..000}.tar")).rows
    assert [(row.id, [name for name, _, _ in row.members]) for row in rows] == [
        ("x", ["0.png", "0.txt", "1.png", "1.txt"]), ("y", ["0.png", "0.txt"]),
    ]  # fmt: skip
    place = tmp_path / "x"
    place.mkdir()
    member_writer(rows[0])(place)
    assert (place / "1.png").read_bytes() == jpg and (place / "1.txt").read_text() == "x/1"
    job_table.write(tmp_path, rows)
    assert job_table.read(tmp_path) == rows
    tar.write_bytes(tar.read_bytes()[: rows[0].members[2][1] + 10])
    with pytest.raises(DataError, match="has changed: x/1.png is not where it was"):
        member_writer(rows[0])(place)
    with pytest.raises(DataError, match="adapters cannot be trained"):
        rows_of(str(tar))


def test_a_table_only_grows(people: Path) -> None:
    rows = rows_of(str(people)).rows
    assert [job_table.write(people, part) for part in (rows[:1], rows, rows)] == [1, 1, 0]
    assert job_table.read(people) == rows
    with pytest.raises(UsageError, match="planned with other adapters: ann is not among them"):
        job_table.write(people, rows[1:])
    with pytest.raises(UsageError, match="bob has another folder"):
        job_table.write(people, [rows[0], job_table.Row("bob", folder="elsewhere")])
    path = people / job_table.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(b ^ 255 for b in whole[40:60]) + whole[60:])
    with pytest.raises(DataError, match="is damaged"):
        job_table.read(people)
    path.unlink()
    with pytest.raises(DataError, match="has no jobs.parquet: litp bank plan"):
        job_table.read(people)


def test_the_verb(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = table(people, "a,ann,,,,,1,", "b,gone,,,,,1,")
    plan = ["bank", "plan", text, "--out", str(tmp_path / "out"), "--json", *GIVEN]
    assert main(plan) == 3
    assert "1 of 2 adapters cannot be trained" in capsys.readouterr().err
    assert main([*plan, "--tolerate", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["adapters"], report["new"], len(report["left out"])) == (1, 1, 1)
    assert "gone" in (tmp_path / "out/left_out.txt").read_text()
    table(people, "a,ann,,,,,1,", "b,bob,,,,,1,")
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 1
    assert main([*plan, "--class-noun", "cat"]) == 2
    assert "was begun with other options" in capsys.readouterr().err
    assert main([*plan, "--trainer.max_stepz", "3"]) == 2
    assert main(["bank", "run", str(people)]) == 2
    assert "is no planned bank: give --out DIR" in capsys.readouterr().err
    assert main(["bank", "run", str(tmp_path / "out"), "--trainer.max_steps", "9"]) == 2
    assert "--trainer.max_steps is an option of planning" in capsys.readouterr().err
    assert main(["bank", "status", str(people)]) == 3
