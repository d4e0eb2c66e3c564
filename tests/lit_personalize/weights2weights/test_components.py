"""Components out of core: those of a decomposition in memory, however they are found, shared out or interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from lit_personalize.errors import DataError, UsageError
from lit_personalize.weights2weights.components import Components, orthonormal, principal_components


@dataclass
class Memory:
    """Rows in memory that count how often they are read."""

    values: Tensor
    fingerprint: str = "memory"
    readings: int = 0
    stop_after: int | None = None
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = [f"adapter-{number}" for number in range(len(self.values))]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def gather(self, indices: Sequence[int]) -> Tensor:
        self.readings += 1
        if self.stop_after is not None and self.readings > self.stop_after:
            raise KeyboardInterrupt
        return self.values[list(indices)].clone()


def planted(n: int = 200, width: int = 300, seed: int = 0) -> Tensor:
    """Six directions that stand out from noise, around a mean, with columns of different sizes."""
    draws = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, 6, generator=draws)).Q.T
    sizes = torch.tensor([40.0, 30.0, 22.0, 16.0, 11.0, 8.0])
    factors = torch.randn(n, 6, generator=draws) * sizes
    values = factors @ basis + 0.05 * torch.randn(n, width, generator=draws)
    return values * (torch.rand(width, generator=draws) + 0.1) + 3 * torch.randn(width, generator=draws)


def in_memory(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Z, V and variances by torch.linalg.svd in fp64."""
    z = values.double()
    z = (z - z.mean(0)) / z.std(0)
    _, singular, v = torch.linalg.svd(z, full_matrices=False)
    return z, v[:count], singular[:count].square() / (len(z) - 1)


def furthest(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between two subspaces `[k, D]`."""
    a, b = a.double(), b.double()
    return float(torch.linalg.matrix_norm(a - (a @ b.T) @ b, 2))


@pytest.mark.parametrize("method", ["gram", "randomized"])
@pytest.mark.parametrize("block_rows", [None, 7, 500])
def test_components_are_those_of_the_whole_decomposition(method: str, block_rows: int | None) -> None:
    values = planted()
    found = principal_components(Memory(values), 6, method, block_rows=block_rows)  # type: ignore[arg-type]
    z, v, variances = in_memory(values, 6)
    assert furthest(v, found.components) < 1e-3, "the space"
    assert torch.allclose(found.variances.double(), variances, rtol=1e-4)
    assert torch.allclose(found.components @ found.components.T, torch.eye(6), atol=1e-5)
    assert torch.allclose(found.coefficients.double(), z @ found.components.double().T, atol=1e-3)
    assert torch.allclose(found.mean, values.mean(0), atol=1e-5)
    assert torch.allclose(found.deviation, values.std(0), rtol=1e-5)
    assert found.total_variance == 300
    assert (found.components.gather(1, found.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_last_components_come_nearer_with_power() -> None:
    draws = torch.Generator().manual_seed(1)
    values = torch.randn(300, 400, generator=draws) * torch.arange(1, 401).float() ** -0.5
    values = values @ torch.linalg.qr(torch.randn(400, 400, generator=draws)).Q
    _, v, _ = in_memory(values, 20)
    errors = [
        furthest(v[:10], principal_components(Memory(values), 20, "randomized", power=power).components)
        for power in (0, 1, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_all_components_give_the_rows_back() -> None:
    values = planted(20, 50)
    found = principal_components(Memory(values), 19, "gram")
    back = (found.coefficients @ found.components) * found.deviation + found.mean
    assert torch.allclose(back, values, atol=1e-3)


def test_a_direction_that_was_planted_is_found_by_least_squares() -> None:
    draws = torch.Generator().manual_seed(2)
    direction = torch.nn.functional.normalize(torch.randn(20, generator=draws), dim=0)
    label = torch.randint(0, 2, (2000,), generator=draws).float()
    values = torch.randn(2000, 20, generator=draws) * 0.1 + label[:, None] * direction
    found = principal_components(Memory(values), 20, "randomized")
    beta = torch.linalg.lstsq(found.coefficients, (label - label.mean())[:, None]).solution[:, 0]
    told = (beta @ found.components) / found.deviation  # what tells the label from a row that is not standardised
    assert torch.cosine_similarity(told, direction, dim=0) > 0.99


def test_constant_columns_stay_as_they_are() -> None:
    values = planted(30, 40)
    values[:, 3], values[:, 9] = 2.5, 0.0
    found = principal_components(Memory(values), 5)
    assert found.deviation[3] == found.deviation[9] == 1 and found.total_variance == 38
    assert not found.components[:, [3, 9]].abs().max() > 1e-6


def test_what_cannot_be_is_refused() -> None:
    values = planted(30, 40)
    with pytest.raises(UsageError, match="1 to 29 components, not 30"):
        principal_components(Memory(values), 30)
    with pytest.raises(UsageError, match="only 2 components"):
        principal_components(Memory(torch.randn(30, 2) @ torch.randn(2, 40)), 5, "gram")
    values[17, 5] = float("nan")
    with pytest.raises(DataError, match="adapter-17"):
        principal_components(Memory(values), 3)


@pytest.mark.parametrize("method", ["gram", "randomized"])
def test_it_goes_on_after_every_reading(method: str, tmp_path: Path) -> None:
    values, work = planted(), tmp_path / "work"
    whole = Memory(values)
    wanted = principal_components(whole, 6, method, block_rows=50)  # type: ignore[arg-type]
    stops, again = 0, 0
    for stop in range(1, whole.readings):
        rows = Memory(values, stop_after=stop)
        with pytest.raises(KeyboardInterrupt):
            principal_components(rows, 6, method, block_rows=50, work=work)  # type: ignore[arg-type]
        stops += 1
        rows = Memory(values)
        found = principal_components(rows, 6, method, block_rows=50, work=work)  # type: ignore[arg-type]
        assert torch.equal(found.components, wanted.components)
        again += rows.readings < whole.readings
        assert not work.exists(), "nothing is left at the end"
    assert stops >= 13 and again >= stops - 5, "only what came before the end of a reading is done again"
    with pytest.raises(KeyboardInterrupt):
        principal_components(Memory(values, stop_after=8), 6, method, block_rows=50, work=work)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another computation"):
        principal_components(Memory(values), 5, method, block_rows=50, work=work)  # type: ignore[arg-type]


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e12])
def test_a_basis_is_orthonormal_however_near_its_columns_are(condition: float) -> None:
    u, v = (torch.linalg.qr(torch.randn(size, 20, dtype=torch.float64)).Q for size in (500, 20))
    w = (u * torch.logspace(0, -float(torch.tensor(condition).log10()), 20, dtype=torch.float64)) @ v.T
    q = orthonormal(w.float())
    assert torch.allclose(q.T @ q, torch.eye(20), atol=1e-5)


def _rank(rank: int, folder: str, method: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = principal_components(Memory(planted()), 6, method, block_rows=30, work=Path(folder) / "work")  # type: ignore[arg-type]
    torch.save(vars(found), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _damaged_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = planted()
    values[35, 0] = float("inf")  # of the second rank's first block
    try:
        principal_components(Memory(values), 3, block_rows=30)
    except DataError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_all_ranks_refuse_what_one_of_them_finds(tmp_path: Path) -> None:
    mp.spawn(_damaged_rank, (str(tmp_path),), nprocs=2)
    assert all("adapter-35" in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))


@pytest.mark.parametrize("method", ["gram", "randomized"])
def test_two_ranks_find_what_one_finds(method: str, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path), method), nprocs=2)
    alone = principal_components(Memory(planted()), 6, method, block_rows=30)  # type: ignore[arg-type]
    for rank in range(2):
        found = Components(**torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        assert torch.allclose(found.components, alone.components, atol=1e-5)
        assert torch.allclose(found.coefficients, alone.coefficients, atol=1e-3)
        assert torch.allclose(found.variances, alone.variances, rtol=1e-5)
