"""Queries ask for facts that pictures can show, in words that captions use."""

from __future__ import annotations

from collections import Counter

from lit_personalize.report.retrieval.queries import BY, CLASS, NARROW, asked, scenes_showing
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.paraphrases import facts


def test_every_narrow_query_is_asked_by_text_and_by_pictures() -> None:
    texts, *several = ([query for query in asked() if query.pictures == by] for by in BY)
    names = [query.name for query in asked()]
    assert len(set(names)) == len(names), "a set is known by the name of its query"
    for pictures in several:
        assert [q.text for q in texts if q.group != CLASS] == [q.text for q in pictures]
        assert Counter(q.group for q in pictures).keys() == set(NARROW)
    shown = {fact for query in texts for fact in query.facts}
    assert {("shape", shape) for shape in v.ALL_SHAPES} | {("background", place) for place in v.PLACES} <= shown
    assert {("color", color) for color in v.COLORS} | {("part", part) for part in v.CRITTER_ATTRIBUTES} <= shown


def test_the_pictures_of_a_query_show_what_it_asks() -> None:
    for number, query in enumerate(asked()):
        scenes = scenes_showing(query, number)
        assert len(scenes) == query.pictures and scenes == scenes_showing(query, number)
        assert all(query.facts <= facts(scene) for scene in scenes)
        assert len(scenes) < 2 or frozenset.intersection(*map(facts, scenes)) < facts(scenes[0]), (
            "nothing else is shared"
        )


def test_words_of_a_query() -> None:
    by_text = {query.text: query.words for query in asked()}
    assert by_text["a photo of a red circle"] == ("red", "circle")
    assert by_text["a critter with horns on the beach"] == ("critter", "horns", "beach")
    assert by_text["a sign saying e"] == ("sign", "saying", "e")
    assert by_text["a photo of a sign"] == ("sign",)
