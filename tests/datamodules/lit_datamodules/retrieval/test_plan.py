"""Filters drop what they should and say why; a plan's name changes with what decides the outcome."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lit_datamodules.errors import DataOptionError
from lit_datamodules.retrieval.plan import Filters, Plan, Query


@pytest.mark.parametrize(
    ("asked", "meta", "reason"),
    [
        ({}, {}, ""),
        ({"min_side": 256}, {"width": 300, "height": 200}, "side below 256"),
        ({"min_side": 256}, {"WIDTH": 300, "HEIGHT": 256}, ""),
        ({"min_side": 256}, {"width": 100}, ""),  # its picture tells
        ({"max_punsafe": 0.5}, {"punsafe": 0.51}, "punsafe above 0.5"),
        ({"max_punsafe": 0.5}, {"punsafe": 0.5}, ""),
        ({"max_punsafe": 0.5}, {"NSFW": "UNLIKELY"}, ""),
        ({"max_punsafe": 0.4}, {"NSFW": "UNSURE"}, "punsafe above 0.4"),
        ({"max_punsafe": 0.5}, {}, "no punsafe field"),
        ({"max_punsafe": 0.5}, {"punsafe": float("nan")}, "no punsafe field"),
        ({"max_watermark": 0.8}, {"pwatermark": "0.9"}, "watermark above 0.8"),
        ({"min_aesthetic": 5}, {"AESTHETIC_SCORE": 4.9}, "aesthetic below 5"),
        ({"min_aesthetic": 5}, {"aesthetic": 5.5}, ""),
        ({"licences": ("CC0", "cc-by")}, {"LICENSE": "cc-by "}, ""),
        ({"licences": ("CC0",)}, {"license": "?"}, "licence not accepted"),
        ({"languages": ("en",)}, {"LANGUAGE": "EN"}, ""),
        ({"languages": ("en",)}, {"caption": "eine Katze"}, "no language field"),
    ],
)
def test_a_sample_is_dropped_with_its_reason(asked: dict[str, Any], meta: dict[str, Any], reason: str) -> None:
    filters = Filters(**asked)
    assert filters.reason(meta) == reason
    assert filters.asks == bool(asked)


def test_a_plan_is_named_by_all_that_decides() -> None:
    plan = Plan((Query("cat", text="a cat"),), "clip")
    others = [
        replace(plan, queries=(Query("cat", text="a dog"),)),
        replace(plan, queries=(Query("cat", image="cat.png", sha256="1"),)),
        replace(plan, queries=(Query("cat", image="cat.png", sha256="2"),)), replace(plan, encoder="another"),
        replace(plan, filters=Filters(min_side=1)), replace(plan, keep=3), replace(plan, batch_size=3),
    ]  # fmt: skip
    assert plan.id == Plan((Query("cat", text="a cat"),), "clip").id
    assert len({plan.id, *(other.id for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan((), "clip"), "nothing to look for"),
        (lambda: Plan((Query("a", text="x"), Query("a", text="y")), "clip"), "two queries are called 'a'"),
        (lambda: Query("a"), "a text or an image"),
        (lambda: Query("a", text="a", image="b"), "a text or an image"),
        (lambda: Plan((Query("a", text="x"),), "clip", keep=0), "keep must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(make: Any, said: str) -> None:
    with pytest.raises(DataOptionError, match=said):
        make()
