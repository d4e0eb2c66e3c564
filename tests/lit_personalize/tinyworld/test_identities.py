"""The people of a corpus: known labels, distinct critters, a table that says them, and a larger count that goes on."""

import csv

import pytest

from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import targets
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS
from lit_personalize.tinyworld.identities import identity, labels_of, with_part, write_people


def test_three_thousand_identities_are_distinct_and_their_parts_are_even():
    people = [identity(number) for number in range(3000)]
    assert len({(p.attributes["color"], p.critter_parts, p.body) for p in people}) == 3000
    held_out = {(s.critter_parts, s.body) for s in HELD_OUT_CONCEPTS.values()}
    assert not held_out & {(p.critter_parts, p.body) for p in people}
    for part in v.CRITTER_ATTRIBUTES:
        assert 0.46 < sum(labels_of(p)[part] for p in people) / 3000 < 0.54


def test_labels_are_what_the_pictures_show():
    import numpy as np

    subject = identity(7)
    shown = targets(subject.scene("white", np.random.default_rng(0)))
    for part in v.CRITTER_ATTRIBUTES:
        if f"critter_{part}" in shown:
            assert labels_of(subject)[part] == (shown[f"critter_{part}"] == "present")
    assert shown["color"] == subject.attributes["color"] and labels_of(subject)[f"color_{shown['color']}"] == 1


def test_a_part_can_be_given_and_taken():
    subject = identity(0)
    for part in v.CRITTER_ATTRIBUTES:
        for present in (True, False):
            other = with_part(subject, part, present)
            assert labels_of(other) == {**labels_of(subject), part: float(present)}


def test_people_are_written_once_and_a_larger_count_goes_on(tmp_path, capsys):
    folder = tmp_path / "people"
    assert main(["world", "people", "-o", str(folder), "--count", "2", "--pictures", "3"]) == 0
    first = folder / "identity-00000" / "00000.png"
    before = first.stat().st_mtime_ns
    table = write_people(folder, 3, pictures=3)
    rows = list(csv.DictReader(table.open()))
    assert [row["id"] for row in rows] == ["identity-00000", "identity-00001", "identity-00002"]
    assert first.stat().st_mtime_ns == before and len(list((folder / "identity-00002").glob("*.png"))) == 3
    assert {name: float(rows[2][name]) for name in labels_of(identity(2))} == labels_of(identity(2))
    caption = (folder / "identity-00002" / "00000.txt").read_text()
    assert caption.startswith("photo of a sks critter ") and {row["seed"] for row in rows} == {"0"}
    with pytest.raises(UsageError, match="at least one identity"):
        write_people(folder, 0)
