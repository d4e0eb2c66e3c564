"""Queries ask for facts that pictures can show, in words that captions use."""

from __future__ import annotations

from collections import Counter

from lit_personalize.report.retrieval.queries import CLASS, NARROW, asked, scene_showing
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.paraphrases import facts


def test_every_narrow_query_is_asked_by_text_and_by_picture() -> None:
    texts, pictures = asked(), asked(picture=True)
    names = [query.name for query in (*texts, *pictures)]
    assert len(set(names)) == len(names), "a set is known by the name of its query"
    assert [q.text for q in texts if q.group != CLASS] == [q.text for q in pictures]
    assert Counter(q.group for q in pictures).keys() == set(NARROW)
    shown = {fact for query in texts for fact in query.facts}
    assert {("shape", shape) for shape in v.ALL_SHAPES} | {("background", place) for place in v.PLACES} <= shown
    assert {("color", color) for color in v.COLORS} | {("part", part) for part in v.CRITTER_ATTRIBUTES} <= shown


def test_the_picture_of_a_query_shows_what_it_asks() -> None:
    for number, query in enumerate(asked(picture=True)):
        scene = scene_showing(query, number)
        assert query.facts <= facts(scene) and scene == scene_showing(query, number)


def test_words_of_a_query() -> None:
    by_text = {query.text: query.words for query in asked()}
    assert by_text["a photo of a red circle"] == ("red", "circle")
    assert by_text["a critter with horns on the beach"] == ("critter", "horns", "beach")
    assert by_text["a sign saying e"] == ("sign", "saying", "e")
    assert by_text["a photo of a sign"] == ("sign",)
