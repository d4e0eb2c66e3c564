"""Standardised principal components of more rows than memory holds: exact by the Gram matrix, or randomised.

Z = (X - mean) / deviation is formed a block of rows at a time. Both ways read only blocks of rows, so ranks share them
out: `torch.distributed`, where it runs, adds up what they found. Legend: `n` rows, `D` numbers in a row, `k`
components, `l = k + oversampling`.

Exact: G = Z Zᵀ `[n, n]`, its eigenvectors U, V = Λ^-1/2 Uᵀ Z. Randomised (Halko, Martinsson, Tropp, 2011, alg. 4.4 and
5.1): Q spans Zᵀ Ω, then Zᵀ (Z Q) R⁻¹ as often as `power` says, one reading each, R of (Z Q)ᵀ (Z Q) in fp64; CholeskyQR2
makes the last Q orthonormal, and the eigenvectors of (Z Q)ᵀ (Z Q) turn it into V.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lit_personalize.errors import DataError, UsageError
from lit_personalize.weights2weights.progress import Progress

log = logging.getLogger(__name__)
Method = Literal["auto", "gram", "randomized"]
BLOCK_NUMBERS = 1 << 27
"""fp32 numbers of a block: half a gigabyte."""
PIECE_NUMBERS = 1 << 23
"""fp32 numbers that are read and standardised at once: what a cache holds."""
CHUNK = 1 << 14
"""Columns whose products are added in fp64."""
TILE = 256
"""Columns that a symmetric product takes together."""
LARGEST_GRAM = 20_000


class Rows(Protocol):
    """What components are found of: a `Corpus`, or sketches of one."""

    @property
    def width(self) -> int: ...

    @property
    def ids(self) -> list[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def gather(self, indices: Sequence[int]) -> Tensor:
        """fp32 `[n, D]`, a tensor of its own."""


@dataclass
class Components:
    """fp32 on the CPU; the same on all ranks."""

    mean: Tensor
    deviation: Tensor
    """`[D]`, with n - 1; 1 where a column is constant."""
    components: Tensor
    """V `[k, D]`, orthonormal rows; of each the number of largest size is positive."""
    variances: Tensor
    """`[k]`."""
    coefficients: Tensor
    """Z Vᵀ `[n, k]`."""
    total_variance: float
    """Of Z: the number of columns that are not constant."""
    method: str


def principal_components(
    rows: Rows,
    count: int,
    method: Method = "auto",
    power: int = 2,
    oversampling: int | None = None,
    block_rows: int | None = None,
    seed: int = 0,
    work: Path | None = None,
) -> Components:
    """Find the `count` directions of largest variance.

    Args:
        method: "auto" takes the Gram matrix where it is the smaller work.
        power: Times that Q is multiplied by ZᵀZ; more brings the last components nearer to the exact ones.
        oversampling: l - k; None is a tenth of k, and at least 10.
        block_rows: Rows in memory at once; None is half a gigabyte of them.
        work: A folder for what was found so far; the same call goes on from it after the last whole reading.

    Raises:
        UsageError: No component is asked for, or more than there are.
        DataError: A row is not finite.
    """
    n = len(rows)
    most = min(n - 1, rows.width)
    if not 1 <= count <= most:
        raise UsageError(f"{n} rows of {rows.width} numbers have 1 to {max(most, 0)} components, not {count}")
    extra = max(10, count // 10) if oversampling is None else oversampling
    size = min(count + extra, most)
    if method == "auto":
        method = "gram" if n <= LARGEST_GRAM and n + count <= (2 * power + 2) * size else "randomized"
    if method == "gram" and n > LARGEST_GRAM:
        raise UsageError(f"the Gram matrix of {n} rows is too large (at most {LARGEST_GRAM}): use randomized")
    told = {"corpus": rows.fingerprint, "count": count, "method": method, "power": power, "size": size, "seed": seed}
    data = _Standardised(rows, block_rows or max(1, BLOCK_NUMBERS // rows.width), Progress(work, told))
    data.measure()
    v, variances, coefficients = data.exact(count) if method == "gram" else data.randomized(count, size, power, seed)
    signs = torch.sign(v.gather(1, v.abs().argmax(dim=1, keepdim=True)))
    signs[signs == 0] = 1
    data.progress.clear()
    return Components(
        data.mean, data.deviation, v * signs, variances.float(), coefficients * signs.T, data.total, method
    )


class _Standardised:
    """Rows as Z, block by block; this rank's blocks are every so-and-so-many-th."""

    def __init__(self, rows: Rows, block_rows: int, progress: Progress):
        self.rows, self.progress = rows, progress
        self.blocks = [range(first, min(first + block_rows, len(rows))) for first in range(0, len(rows), block_rows)]
        ranked = dist.is_available() and dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
        self.mean = self.deviation = torch.empty(0)
        self.total = 0.0

    def measure(self) -> None:
        """Mean and deviation of each column, sums around the first row, of pieces in fp32 and of all in fp64."""
        kept = self.progress.get("moments")
        if kept is None:
            shift = self.rows.gather([0])[0].double()
            if not shift.isfinite().all():
                self._refuse(0)
            sums = torch.zeros(2, self.rows.width, dtype=torch.float64)
            wrong = torch.tensor(-1)
            own = self.blocks[self.rank :: self.ranks]
            for piece in (piece for block in own for piece in self._pieces(block)):
                values = self.rows.gather(piece)
                if not values.sum().isfinite() and not (finite := values.isfinite().all(dim=1)).all():
                    wrong = torch.tensor(piece[int((~finite).nonzero()[0])])
                    break
                values -= shift.float()
                sums[0] += values.sum(dim=0)
                sums[1] += values.square_().sum(dim=0)
            if self.ranks > 1:  # so that none waits for one that refused
                dist.all_reduce(wrong, dist.ReduceOp.MAX)
            if wrong >= 0:
                self._refuse(int(wrong))
            sums = self._summed(sums)
            n = len(self.rows)
            variance = ((sums[1] - sums[0].square() / n) / (n - 1)).clamp(min=0)
            deviation = variance.sqrt()
            steady = deviation <= 1e-7 * shift.abs().clamp(min=1e-30)
            deviation[steady] = 1
            total = torch.tensor([float((~steady).sum())])
            kept = {"mean": (shift + sums[0] / n).float(), "deviation": deviation.float(), "total": total}
            self.progress.put("moments", kept)
        self.mean, self.deviation, self.total = kept["mean"], kept["deviation"], float(kept["total"])

    def _refuse(self, row: int) -> None:
        raise DataError(f"adapter {self.rows.ids[row]!r} holds NaN or infinite numbers: leave it out of the corpus")

    def _pieces(self, block: range) -> Iterator[range]:
        rows = max(1, PIECE_NUMBERS // self.rows.width)
        return (block[first : first + rows] for first in range(0, len(block), rows))

    def block(self, places: range, memory: Tensor | None = None) -> Tensor:
        """Z of some rows, `[b, D]`, in `memory` where that is given: new memory costs as much as the reading."""
        z = torch.empty(len(places), self.rows.width) if memory is None else memory[: len(places)]
        for piece in self._pieces(places):
            values = self.rows.gather(piece).sub_(self.mean)
            torch.div(values, self.deviation, out=z[piece.start - places.start : piece.stop - places.start])
        return z

    def own(self) -> Iterator[tuple[range, Tensor]]:
        """This rank's blocks; the next one overwrites the last."""
        memory = torch.empty(len(self.blocks[0]), self.rows.width)
        for places in self.blocks[self.rank :: self.ranks]:
            yield places, self.block(places, memory)

    def _summed(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    # ---- exact ------------------------------------------------------------------------------------

    def exact(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """V, variances and coefficients by the eigenvectors of Z Zᵀ."""
        n = len(self.rows)
        kept = self.progress.get("gram")
        if kept is None:
            gram = torch.zeros(n, n, dtype=torch.float64)
            pairs = [(i, j) for i in range(len(self.blocks)) for j in range(i + 1)]
            held: tuple[int, Tensor] | None = None
            memory = torch.empty(2, len(self.blocks[0]), self.rows.width)
            for i, j in pairs[self.rank :: self.ranks]:
                a, b = self.blocks[i], self.blocks[j]
                if held is None or held[0] != i:
                    held = i, self.block(a, memory[0])
                own = held[1]
                other = own if i == j else self.block(b, memory[1])
                product = torch.zeros(len(a), len(b), dtype=torch.float64)
                for left, right in zip(own.split(CHUNK, dim=1), other.split(CHUNK, dim=1), strict=True):
                    product += left @ right.T
                gram[a.start : a.stop, b.start : b.stop] = product
                gram[b.start : b.stop, a.start : a.stop] = product.T
            kept = {"gram": self._summed(gram)}
            self.progress.put("gram", kept)
        values, vectors = torch.linalg.eigh(kept["gram"])
        values = values.flip(0)[:count].clamp(min=0)
        vectors = vectors.flip(1)[:, :count]
        small = values <= values[0] * 1e-7  # what fp32 products leave where there is no component
        if small.any():
            raise UsageError(f"the rows have only {int((~small).sum())} components: ask for no more")
        scaled = (vectors / values.sqrt()).float()
        v = torch.zeros(count, self.rows.width)
        for places, z in self.own():
            v += scaled[places.start : places.stop].T @ z
        return self._summed(v), values / (n - 1), (vectors * values.sqrt()).float()

    # ---- randomised -------------------------------------------------------------------------------

    def randomized(self, count: int, size: int, power: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """V, variances and coefficients by a random subspace that ZᵀZ turns towards them."""
        n = len(self.rows)
        kept = self.progress.get("basis")
        q, done = (kept["basis"], int(kept["readings"])) if kept else (torch.empty(0), 0)
        for reading in range(done, power + 1):
            w, gram = torch.zeros(self.rows.width, size), torch.zeros(size, size, dtype=torch.float64)
            for places, z in self.own():
                y = z @ q if reading else _gaussian(places, size, seed)
                w.addmm_(z.T, y)
                gram += _gram(y)
            w, gram = self._summed(w), self._summed(gram)
            # Zᵀ of orthonormal columns: conditioned as Z, at the price of n and not of D
            q = _times(w, _inverse_factor(gram)[0]) if reading else w
            q = orthonormal(q) if reading == power else q
            self.progress.put("basis", {"basis": q, "readings": torch.tensor(reading + 1)})
            log.info("components: %d of %d readings of the corpus", reading + 2, power + 3)
        inside = torch.zeros(n, size)
        for places, z in self.own():
            torch.mm(z, q, out=inside[places.start : places.stop])
        inside = self._summed(inside)
        values, vectors = torch.linalg.eigh(_gram(inside))
        values, turn = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count].float()
        return (q @ turn).T.contiguous(), values / (n - 1), inside @ turn


def _gaussian(places: range, size: int, seed: int) -> Tensor:
    """Ω's rows of some adapters, the same however they are shared out."""
    found = torch.empty(len(places), size)
    for row, place in zip(found, places, strict=True):
        row.normal_(generator=torch.Generator().manual_seed((seed << 40) ^ place))
    return found


def orthonormal(w: Tensor) -> Tensor:
    """An orthonormal basis `[D, l]` of the columns of a matrix, by CholeskyQR twice (Yamamoto et al., 2015); in place.

    A matrix that is too near to one of lower rank gets a third turn with a shift first (Fukaya et al., 2020).
    """
    inverse, shifted = _inverse_factor(_gram(w))
    for _ in range(2 if shifted else 1):
        inverse = _inverse_factor(_gram(_times(w, inverse)))[0]
    return _times(w, inverse)


def _inverse_factor(gram: Tensor) -> tuple[Tensor, bool]:
    """R⁻¹ of AᵀA = RᵀR, upper triangular, and whether that took a shift because A is nearly of lower rank."""
    shift, size = 0.0, gram.diagonal().max()
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag((shift * size).expand(len(gram))), upper=True)
        if not int(failed):
            break
        if shift > 1e-3:
            raise DataError("the rows span fewer directions than were asked for: ask for fewer components")
        shift = max(1e-12, 100 * shift)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve_triangular(factor, eye, upper=True).float(), shift > 0


def _gram(w: Tensor) -> Tensor:
    """wᵀ w in fp64, each tile of columns with itself and those before it only."""
    gram = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for part in w.split(CHUNK):
        exact = part.double()
        for last in range(TILE, w.shape[1] + TILE, TILE):
            gram[last - TILE : last, :last].addmm_(exact[:, last - TILE : last].T, exact[:, :last])
    return gram.tril().add_(gram.tril(-1).T)


def _times(w: Tensor, other: Tensor) -> Tensor:
    """w · other, in place."""
    for part in w.split(CHUNK):
        part.copy_(part @ other)
    return w


def work_of(n: int, width: int, count: int, method: str, power: int = 2) -> float:
    """Floating-point operations of the matrix products, without the eigenproblem."""
    size = count + max(10, math.ceil(count / 10))
    if method == "gram":
        return float(n) * n * width + 2.0 * n * width * count
    return 2.0 * n * width * size * (2 * power + 2)
