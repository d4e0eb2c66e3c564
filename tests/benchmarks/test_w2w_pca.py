"""What the benchmark of principal components compares is the same, and what stops a way is said."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_personalize.corpus.layout import Layout

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GAP = 5


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import w2w_pca

    return w2w_pca


@pytest.fixture
def rows(program: Any, tmp_path: Path) -> Any:
    shape = Layout.from_shapes({"unet.to_q": ((1, 150), (250, 1))}, {"unet.to_q": 1.0})
    return program.First(program.write(tmp_path / "corpus", 130, shape, 30, GAP), 120)


def test_every_way_finds_the_components_before_the_gap(program: Any, rows: Any) -> None:
    v, variances = program.ours(rows, 12, "gram")
    assert v.shape == (12, 400) and len(rows) == 120
    for found, other in (program.ours(rows, 12, "randomized"), program.svd_lowrank(rows, 12)):
        assert program.largest_angle(v[:GAP], found) < 0.5
        assert torch.allclose(other[:GAP], variances[:GAP], rtol=1e-2)


def test_blocks_hold_every_row_once_and_at_least_so_many(program: Any, rows: Any) -> None:
    z, blocks = program.standardised(rows, 50)
    assert [len(block) for block in blocks] == [50, 70] and [i for b in blocks for i in b] == list(range(120))
    whole = torch.cat([z(block) for block in blocks])
    assert torch.allclose(whole.mean(0), torch.zeros(400), atol=1e-4)
    assert torch.allclose(whole.std(0), torch.ones(400), atol=1e-4)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0])
def test_an_angle_is_the_angle(program: Any, degrees: float) -> None:
    a, b = torch.eye(6)[:2], torch.eye(6)[:2].clone()
    b[1] = torch.eye(6)[1] * math.cos(math.radians(degrees)) + torch.eye(6)[5] * math.sin(math.radians(degrees))
    assert program.largest_angle(a, b) == pytest.approx(degrees, abs=0.1)


def test_what_stops_a_way_is_said(program: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(components=3, product=64, limit=0.05)
    found = program.run("gram", 10, options, tmp_path / "corpus", tmp_path / "components.pt")
    assert found == {"way": "gram", "rows": 10, "stopped": "not done after 0.05 s"}
