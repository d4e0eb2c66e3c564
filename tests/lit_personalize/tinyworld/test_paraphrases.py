"""Captions of the web are true, and often do without the noun."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.paraphrases import DECOYS, INDIRECT, Facts, alt_text, facts
from lit_personalize.tinyworld.scene import Scene, sample_scene

SYNONYMS = {"color": v.COLOR_SYNONYMS, "texture": v.TEXTURE_SYNONYMS, "size": v.SIZE_SYNONYMS, "shape": INDIRECT,
            "kind": INDIRECT, "background": v.COLOR_SYNONYMS}  # fmt: skip
PARTS = {**v.CRITTER_ATTRIBUTES, **v.PERSON_ATTRIBUTES}


@pytest.fixture(scope="module")
def said() -> list[tuple[Scene, str, Facts]]:
    rng = np.random.default_rng(3)
    return [(scene, *alt_text(scene, rng)) for scene in (sample_scene(rng, "all") for _ in range(2000))]


def ways(aspect: str, value: str) -> tuple[str, ...]:
    """All that a caption may write for a fact; nothing for what it need not write."""
    if aspect == "kind" and value in ("object", "pair"):
        return ()
    if aspect == "part":
        return (PARTS[value],)
    if aspect == "text":
        return (" ".join(value.lower()),)
    if aspect == "relation":
        return (v.RELATIONS[value],)
    if value in v.PLACES:
        return (v.PLACES[value],)
    return (value, *SYNONYMS.get(aspect, {}).get(value, ()))


def test_what_a_caption_says_is_true_and_written(said: list[tuple[Scene, str, Facts]]) -> None:
    for scene, text, claims in said:
        assert claims <= facts(scene), text
        for aspect, value in claims:
            words = ways(aspect, value)
            assert not words or any(re.search(rf"\b{re.escape(w)}\b", text) for w in words), (text, aspect, value)


def test_a_caption_claims_what_it_writes(said: list[tuple[Scene, str, Facts]]) -> None:
    """Otherwise a picture without horns would count as showing what "with horns" says."""
    for _, text, claims in said:
        for part, phrase in PARTS.items():
            assert ("part", part) in claims or not re.search(rf"\b{phrase}\b", text), text
        for texture in v.ALL_TEXTURES[1:]:
            assert ("texture", texture) in claims or not re.search(rf"\b{texture}\b", text), text


def test_captions_vary_and_leave_things_out(said: list[tuple[Scene, str, Facts]]) -> None:
    assert len({text for _, text, _ in said}) > 1900
    for aspect in ("color", "background", "part", "texture"):
        with_it = [claims for scene, _, claims in said if any(a == aspect and x != "flat" for a, x in facts(scene))]
        silent = np.mean([not any(a == aspect for a, _ in claims) for claims in with_it])
        assert 0.05 < silent < 0.7, (aspect, silent)
    assert any(text.endswith(DECOYS) for _, text, _ in said)


@pytest.mark.parametrize("noun", INDIRECT)
def test_a_paraphrase_does_not_contain_its_noun(noun: str) -> None:
    assert all(noun not in phrase for phrase in INDIRECT[noun])


def test_the_class_noun_is_named_in_less_than_half_of_the_captions(said: list[tuple[Scene, str, Facts]]) -> None:
    named = [
        bool(re.search(rf"\b{scene.things[0].shape if scene.things else scene.kind}\b", text))
        for scene, text, _ in said
        if scene.kind != "pair"
    ]
    assert 0.3 < np.mean(named) < 0.5
