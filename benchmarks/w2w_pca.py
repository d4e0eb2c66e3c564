"""Principal components of a corpus out of core, beside scikit-learn's IncrementalPCA and torch.svd_lowrank.

A corpus of drawn rows in the layout of Weights2Weights (D = 99,648, fp16) is written to a temporary folder: factors
whose variances fall as a power law, behind the eigengap a quarter of it, and noise. Then every way has a process of its
own that standardises the rows and finds k components: ours (Gram, randomised), `IncrementalPCA` (the least batches it
takes, of k rows), and `svd_lowrank` of the standardised matrix in memory with the same l and as many power iterations.
The rate of a way is what its matrix products need (`work_of`) over all of its seconds; its share is of the rate of
square fp32 products in the same process, before and after. Memory is the peak of the process and what of it was mapped
files. Angles are to the exact way's components before the eigengap.

    python benchmarks/w2w_pca.py [--rows 1000 2000 4000 8000] [--components 1000] [--folder DIR] [--out FILE]

IncrementalPCA wants `pip install scikit-learn`; it is no dependency of the project.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus_store import layout
from torch import Tensor

from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.store import Corpus
from lit_personalize.report.circumstances import circumstances
from lit_personalize.weights2weights.components import principal_components, work_of

OURS, OTHERS = ("gram", "randomized"), ("IncrementalPCA", "svd_lowrank")
POWER = 2
PUBLISHED = 64_974
"""Adapters of Weights2Weights' corpus."""


# ---- the corpus -----------------------------------------------------------------------------------


def write(folder: Path, rows: int, shape: Layout, factors: int, gap: int, noise: float = 0.02) -> Corpus:
    """Rows F·S·B + noise; the standard deviation of factor i falls as i^-1/2 and, from the gap on, is half of that."""
    corpus = Corpus.create(folder, shape, base_fingerprint="none", init_seed=0)
    draws = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, factors + 1).float() ** -0.5
    sizes[gap:] /= 2
    basis = torch.randn(factors, shape.width, generator=draws) * sizes[:, None]
    for first in range(0, rows, 500):
        n = min(500, rows - first)
        block = torch.randn(n, shape.width, generator=draws).mul_(noise)
        block.addmm_(torch.randn(n, factors, generator=draws), basis)
        corpus.append(block, [{"id": f"{i:06d}"} for i in range(first, first + n)])
    return corpus


class First:
    """The first rows of a corpus."""

    def __init__(self, corpus: Corpus, rows: int):
        self.corpus, self.rows = corpus, rows
        self.ids, self.width, self.fingerprint = corpus.ids[:rows], corpus.width, f"{corpus.fingerprint}[:{rows}]"

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: range) -> Tensor:
        return self.corpus.gather(indices)


# ---- the ways -------------------------------------------------------------------------------------


def standardised(rows: First, size: int) -> tuple[Callable[[range], Tensor], list[range]]:
    """What gives Z of some rows, and blocks of at least `size` rows, after one reading for mean and deviation."""
    starts = list(range(0, len(rows) - size + 1, size))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
    sums = torch.zeros(2, rows.width, dtype=torch.float64)
    for block in blocks:
        values = rows.gather(block)
        sums[0] += values.sum(dim=0)
        sums[1] += values.square_().sum(dim=0)
    mean = sums[0] / len(rows)
    deviation = ((sums[1] - len(rows) * mean.square()) / (len(rows) - 1)).sqrt().float()
    return lambda block: rows.gather(block).sub_(mean.float()).div_(deviation), blocks


def ours(rows: First, count: int, method: str) -> tuple[Tensor, Tensor]:
    found = principal_components(rows, count, method, POWER)  # type: ignore[arg-type]
    return found.components, found.variances


def incremental_pca(rows: First, count: int) -> tuple[Tensor, Tensor]:
    from sklearn.decomposition import IncrementalPCA

    z, blocks = standardised(rows, count)
    pca = IncrementalPCA(n_components=count, copy=False)
    for block in blocks:
        pca.partial_fit(z(block).numpy(), check_input=False)
    return torch.from_numpy(pca.components_).float(), torch.from_numpy(pca.explained_variance_).float()


def svd_lowrank(rows: First, count: int) -> tuple[Tensor, Tensor]:
    z, blocks = standardised(rows, min(500, len(rows)))
    whole = torch.empty(len(rows), rows.width)
    for block in blocks:
        whole[block.start : block.stop] = z(block)
    torch.manual_seed(0)
    _, singular, v = torch.svd_lowrank(whole, q=min(count + max(10, count // 10), len(rows) - 1), niter=POWER)
    return v[:, :count].T, singular[:count].square() / (len(rows) - 1)


def product_rate(size: int) -> float:
    """GFLOP/s of square fp32 products, median of ten seconds' worth: what a machine gives lasting work."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < 10:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * size**3 / statistics.median(seconds[1:])


class Memory(threading.Thread):
    """The most that this process has held, ten times a second, by kind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"RssAnon": 0, "RssFile": 0}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                name = line.partition(":")[0]
                if name in self.most:
                    self.most[name] = max(self.most[name], int(line.split()[1]) * 1024)


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    way, n, count = options.way, options.rows[0], min(options.components, options.rows[0] - 1)
    rows = First(Corpus.open(options.corpus), n)
    before = product_rate(options.product)
    memory = Memory()
    memory.start()
    eigen = timed_eigenproblems()
    start = time.perf_counter()
    if way in OURS:
        v, variances = ours(rows, count, way)
    else:
        v, variances = {"IncrementalPCA": incremental_pca, "svd_lowrank": svd_lowrank}[way](rows, count)
    seconds = time.perf_counter() - start
    memory.ended.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = statistics.mean([before, product_rate(options.product)])
    torch.save(v.contiguous(), options.components_file)
    report = {
        "way": way, "rows": n, "components": count, "seconds": round(seconds, 2),
        "product GFLOP/s": round(rate, 1), "product GFLOP/s before": round(before, 1),
        "peak bytes": peak, "peak bytes, mapped files": memory.most["RssFile"],
        "explained": round(float(variances.double().sum()) / rows.width, 5),
    }  # fmt: skip
    if way in OURS:
        size = count + max(10, math.ceil(count / 10))
        fewer = min(size, n - 1) / size if way == "randomized" else 1  # few rows have no l components
        work = work_of(n, rows.width, count, way, POWER) * fewer
        report |= {
            "flop of products": work, "share of product rate": round(work * 1e-9 / seconds / rate, 3),
            "seconds of the eigenproblem": round(sum(eigen), 2),
            "share without the eigenproblem": round(work * 1e-9 / (seconds - sum(eigen)) / rate, 3),
        }  # fmt: skip
    return report


def timed_eigenproblems() -> list[float]:
    """From now on the seconds of each torch.linalg.eigh."""
    seconds: list[float] = []
    eigh = torch.linalg.eigh

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = eigh(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return found

    torch.linalg.eigh = timed
    return seconds


# ---- side by side ---------------------------------------------------------------------------------


def run(way: str, rows: int, options: argparse.Namespace, corpus: Path, kept: Path) -> dict[str, Any]:
    """A way in a process of its own; what stopped it, if something did."""
    about: dict[str, Any] = {"way": way, "rows": rows}
    if way == "IncrementalPCA" and importlib.util.find_spec("sklearn") is None:
        return about | {"stopped": "scikit-learn is not installed"}
    command = [
        sys.executable, __file__, "--way", way, "--rows", str(rows), "--components", str(options.components),
        "--corpus", str(corpus), "--components-file", str(kept), "--product", str(options.product),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return about | {"stopped": f"not done after {options.limit} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return about | {"stopped": f"ended with {done.returncode}: {lines[-1] if lines else 'no word'}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def largest_angle(a: Tensor, b: Tensor) -> float:
    """Degrees between subspace a `[g, D]` and b `[k, D]`, orthonormal rows, g <= k."""
    outside = torch.zeros(len(a), len(a), dtype=torch.float64)
    overlap = a @ b.T
    for columns in torch.arange(a.shape[1]).split(1 << 14):
        left = (a[:, columns] - overlap @ b[:, columns]).double()
        outside += left @ left.T
    return math.degrees(math.asin(min(1.0, float(torch.linalg.eigvalsh(outside)[-1].clamp(min=0).sqrt()))))


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every way over the rows, the other programs where they are asked for."""
    found = []
    for rows in options.rows:
        exact: Tensor | None = None
        for way in (*OURS, *(OTHERS if rows in options.compare else ())):
            print(f"{way}, {rows} rows", file=sys.stderr)
            kept = folder / "components.pt"
            kept.unlink(missing_ok=True)
            report = run(way, rows, options, folder / "corpus", kept)
            if "stopped" not in report:
                v = torch.load(kept, weights_only=True)
                if way == "gram":
                    exact = v[: options.gap]
                elif exact is not None:
                    report["degrees to gram before the gap"] = float(f"{largest_angle(exact, v):.3g}")
                    same = largest_angle(exact, v[: options.gap])
                    report["degrees to gram, as many components"] = float(f"{same:.3g}")
            print(json.dumps(report), file=sys.stderr)
            found.append(report)
            if options.out:
                partial = options.out.with_suffix(".partial")
                partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def published(found: list[dict[str, Any]], width: int, count: int) -> dict[str, Any]:
    """Arithmetic, not measured: the published corpus at the speed of the largest randomised run."""
    runs = [report for report in found if report["way"] == "randomized" and "stopped" not in report]
    if not runs:
        return {}
    last = max(runs, key=lambda report: int(report["rows"]))
    size = count + max(10, count // 10)
    needed = {way: work_of(PUBLISHED, width, count, way, POWER) for way in OURS}
    rate = last["flop of products"] / last["seconds"]
    return {
        "rows": PUBLISHED, "bytes as fp16": 2 * PUBLISHED * width, "flop of products": needed,
        "hours, randomised": round(needed["randomized"] / rate / 3600, 2),
        "bytes of D x l": 4 * width * size, "bytes of n x l": 4 * PUBLISHED * size,
        "bytes of the Gram matrix": 8 * PUBLISHED**2,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--compare", type=int, nargs="*", help="rows at which the others run; default: the most")
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument("--factors", type=int, default=1500)
    parser.add_argument("--gap", type=int, default=300, help="components before the eigengap")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a way may take")
    parser.add_argument("--product", type=int, default=4096, help="size of the square products")
    parser.add_argument("--folder", type=Path, help="for the corpus; it is removed again")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=(*OURS, *OTHERS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--components-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(child(options)))
        return
    options.compare = [max(options.rows)] if options.compare is None else options.compare
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        start = time.perf_counter()
        corpus = write(Path(temporary) / "corpus", max(options.rows), layout(), options.factors, options.gap)
        seconds = time.perf_counter() - start
        report = {
            **circumstances(Path(__file__).parent), "D": corpus.width, "dtype": corpus.dtype,
            "factors": options.factors, "components before the gap": options.gap, "power iterations": POWER,
            "seconds to draw and write": round(seconds, 1), "bytes": sum(
                path.stat().st_size for path in (Path(temporary) / "corpus").glob("shard-*")
            ),
        }  # fmt: skip
        found = measure(options, Path(temporary))
        report |= {
            "runs": found,
            "the published corpus (arithmetic)": published(found, corpus.width, options.components),
        }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        options.out.with_suffix(".partial").unlink(missing_ok=True)
    print(text, end="")


if __name__ == "__main__":
    main()
