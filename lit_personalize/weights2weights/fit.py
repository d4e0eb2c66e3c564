"""From a corpus to its space."""

from __future__ import annotations

import logging
from pathlib import Path

from lit_personalize.corpus.sketch import Sketched
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import UsageError
from lit_personalize.weights2weights.components import Method, principal_components
from lit_personalize.weights2weights.sampling import COMPONENTS
from lit_personalize.weights2weights.subspace import Subspace

log = logging.getLogger(__name__)


def fit(
    corpus: Corpus,
    components: int | None = None,
    method: Method = "auto",
    power: int = 2,
    block_rows: int | None = None,
    seed: int = 0,
    sketch: int | None = None,
    work: Path | None = None,
) -> Subspace:
    """The standardised principal components of a corpus's adapters, out of core.

    Args:
        components: By default 1,000, or as many as there are.
        sketch: Of ΔW with so many numbers per layer instead of the factors: for adapters that did not begin alike. Such
            a space tells adapters apart, and makes none.
        work: As in `principal_components`.

    Raises:
        UsageError: The adapters began differently and no sketch is asked for, or there are too few.
        DataError: A row is not finite.
    """
    if corpus.gauge == "unknown" and sketch is None:
        raise UsageError(
            f"{corpus.folder}: its adapters did not begin at one initial LoRA (gauge unknown), so their factors cannot "
            "be compared number by number: use --sketch 64, components of what they change"
        )
    rows = corpus if sketch is None else Sketched(corpus, sketch, seed)
    most = min(len(rows) - 1, rows.width)
    count = min(COMPONENTS, most) if components is None else components
    if components is not None and 1 <= most < components:
        log.warning("%d adapters have %d components: that many are taken, not %d", len(rows), most, components)
        count = most
    found = principal_components(rows, count, method, power, block_rows=block_rows, seed=seed, work=work)
    told = {
        "base_fingerprint": corpus.base_fingerprint, "base": corpus.manifest.get("base", ""),
        "init_seed": corpus.init_seed, "corpus": corpus.fingerprint, "adapters": len(corpus), "method": found.method,
        "power": power if found.method == "randomized" else None, "total_variance": found.total_variance,
        "sketch": None if sketch is None else {"size": sketch, "seed": seed},
    }  # fmt: skip
    return Subspace(
        corpus.layout, found.mean, found.deviation, found.components, found.variances, found.coefficients, corpus.ids,
        told,
    )  # fmt: skip
