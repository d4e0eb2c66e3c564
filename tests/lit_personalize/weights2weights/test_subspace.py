"""A subspace on disk, and to and fro between rows and coefficients."""

import pytest
import torch

from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError
from lit_personalize.weights2weights.subspace import Subspace


def subspace(count: int = 3) -> Subspace:
    draws = torch.Generator().manual_seed(0)
    layout = Layout.from_shapes({"unet.a.to_q": ((1, 4), (6, 1))}, {"unet.a.to_q": 1.0})
    components = torch.linalg.qr(torch.randn(layout.width, count, generator=draws)).Q.T.contiguous()
    deviation = torch.rand(layout.width, generator=draws) + 0.5
    mean = torch.randn(layout.width, generator=draws)
    return Subspace(layout, mean, deviation, components, torch.ones(count), torch.zeros(2, count), ["a", "b"])


def test_inside_the_space_nothing_is_lost():
    space = subspace()
    beta = torch.randn(5, 3)
    assert torch.allclose(space.project(space.unproject(beta)), beta, atol=1e-5)
    whole = subspace(10)
    rows = torch.randn(4, 10)
    assert torch.allclose(whole.unproject(whole.project(rows)), rows, atol=1e-5)


def test_a_saved_space_comes_back(tmp_path):
    space = subspace()
    space.details = {"init_seed": 0}
    space.save(tmp_path / "space")
    back = Subspace.load(tmp_path / "space")
    assert back.ids == space.ids and back.layout == space.layout and back.details == {"init_seed": 0}
    assert torch.equal(back.components, space.components)


def test_a_folder_without_one_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match="litp w2w fit"):
        Subspace.load(tmp_path)
