"""Precision and recall of `litp data retrieve` on a rendered corpus, beside searches for words, in one run.

    python -m lit_personalize.report.retrieval.quality WORK [--pairs 100000] [--processes 2] [--clip DIR]

WORK gets the corpus and the retrieved set; a stopped run goes on there. All queries are asked in one pass. A query's
relevant pictures show the facts that it asks (`queries`); what was retrieved is judged by the `json` of the packed set.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lit_personalize.atomic import replacing, write_text
from lit_personalize.errors import DataError
from lit_personalize.report.circumstances import circumstances
from lit_personalize.report.retrieval.queries import BY, CLASS, NARROW, Asked, asked, scenes_showing
from lit_personalize.report.retrieval.sheet import Shown, sheet
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.corpus import write_corpus
from lit_personalize.tinyworld.dataset import read_tar
from lit_personalize.tinyworld.paraphrases import Facts
from lit_personalize.tinyworld.render import render

N = 200
OUT = Path("docs/retrieval_quality")
RESULTS, PICTURES = "quality.json", "pictures.png"


@dataclass(frozen=True)
class Pair:
    """A sample of the corpus without its picture."""

    shard: Path
    key: str
    caption: str
    facts: Facts
    said: Facts

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """Of the caption; kept, since every query asks for them."""
        return frozenset(re.findall(r"[a-z]+", self.caption))


def facts_of(pairs: Sequence[Sequence[str]]) -> Facts:
    """Facts as a sample's `json` holds them."""
    return frozenset((aspect, value) for aspect, value in pairs)


def read_pairs(shards: Sequence[Path]) -> list[Pair]:
    """All samples in the order of the shards."""
    found = []
    for shard in shards:
        for key, members in read_tar(shard):
            about = json.loads(members["json"])
            said = facts_of(about["said"])
            found.append(Pair(shard, key, members["txt"].decode(), facts_of(about["facts"]), said))
    return found


def by_substring(query: Asked, pair: Pair) -> bool:
    """Whether every word of a query occurs in the caption, also inside another word."""
    return all(word in pair.caption for word in query.words)


def by_words(query: Asked, pair: Pair) -> bool:
    """Whether every word of a query is one of the caption's."""
    return pair.words.issuperset(query.words)


BASELINES: dict[str, Callable[[Asked, Pair], bool]] = {"substring": by_substring, "words": by_words}


def retrieve(shards: Sequence[Path], queries: Sequence[Asked], clip: Path, n: int, out: Path) -> None:
    """Ask all queries with `litp data retrieve`; pictures that ask are drawn into `out/asked`.

    Near-duplicates are kept: they would be counted as missing.

    Raises:
        DataError: The command failed.
    """
    from lit_personalize.cli.main import main as litp

    draw(queries, out / "asked")
    arguments = ["data", "retrieve", "--shards", str(shards[0].parent / "[0-9]*.tar"), "--clip", str(clip),
                 "--n", str(n), "--keep", str(n), "--near-duplicates", "0", "-o", str(out)]  # fmt: skip
    for query in queries:
        arguments += ["--image", str(out / "asked" / query.name)] if query.pictures else ["--query", query.text]
    if code := litp(arguments):
        raise DataError(f"litp data retrieve ended with {code}")


def draw(queries: Sequence[Asked], folder: Path) -> None:
    """The pictures that ask, `folder/QUERY/0.png` and so on."""
    for number, query in enumerate(queries):
        for i, scene in enumerate(scenes_showing(query, number)):
            place = folder / query.name / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(scene)).save(place)


Retrieved = dict[str, list[tuple[str, str]]]


def retrieved(out: Path, found: dict[tuple[str, str], Facts]) -> Retrieved:
    """Source shard and key of what each query got, the most similar first; `found` gets the facts of each."""
    scored: dict[str, list[tuple[float, str, str]]] = {}
    for shard in sorted(out.glob("[0-9]*.tar")):
        for _, members in read_tar(shard):
            about = json.loads(members["json"])
            where = (about["source"]["shard"], about["source"]["key"])
            found[where] = facts_of(about["facts"])
            for name, similarity in about["similarity"].items():
                scored.setdefault(name, []).append((-similarity, *where))
    return {name: [(shard, key) for _, shard, key in sorted(rows)] for name, rows in scored.items()}


def judge(got: Sequence[Facts], wanted: Facts) -> dict[str, int]:
    """How many pictures a search gave, and how many of them show what was asked."""
    return {"found": len(got), "hits": sum(wanted <= shown for shown in got)}


def measure(pairs: Sequence[Pair], queries: Sequence[Asked], n: int, out: Path) -> list[dict[str, Any]]:
    """A row of counts per query: relevant pictures, and what retrieval and the baselines found in their first `n`.

    A query of which a small corpus has no relevant picture has no recall, and no row.
    """
    shown: dict[tuple[str, str], Facts] = {}
    ranked = retrieved(out, shown)
    rows = []
    for query in queries:
        relevant = sum(query.facts <= pair.facts for pair in pairs)
        if not relevant:
            continue
        got = {"clip": [shown[where] for where in ranked.get(query.name, [])]}
        for name in BASELINES:
            got[name] = [pair.facts for pair in matching(name, query, pairs, n)]
        rows.append({
            "group": query.group, "text": query.text, "pictures": query.pictures, "asked": sorted(query.facts),
            "relevant": relevant, "said": sum(query.facts <= pair.said for pair in pairs),
            **{name: judge(facts, query.facts) for name, facts in got.items()},
        })  # fmt: skip
    return rows


def matching(baseline: str, query: Asked, pairs: Sequence[Pair], n: int) -> list[Pair]:
    """The first `n` pairs, in the order of the shards, whose captions have a query's words."""
    found = []
    for pair in pairs:
        if BASELINES[baseline](query, pair):
            found.append(pair)
            if len(found) == n:
                break
    return found


def named_share(pairs: Sequence[Pair], classes: Sequence[Asked]) -> float:
    """Share of the captions of class pictures that have the class noun as a word."""
    named = total = 0
    for pair in pairs:
        for query in classes:
            if query.facts <= pair.said:
                total += 1
                named += by_words(query, pair)
    return named / max(1, total)


def shown_on_sheet(pairs: Sequence[Pair], queries: Sequence[Asked], n: int, out: Path) -> list[Shown]:
    """What came first for the first query of each narrow group: asked by text, by pictures, and by its words."""
    ranked, facts = retrieved(out, {}), {(pair.shard.name, pair.key): pair for pair in pairs}
    rows = []
    for group in NARROW:
        same = [next(q for q in queries if q.group == group and q.pictures == by) for by in BY]
        for query in same:
            chosen = [facts[where] for where in ranked.get(query.name, [])]
            by = f"{query.pictures} picture{'s' * (query.pictures > 1)}" if query.pictures else "text"
            rows.append(Shown(f"{by}: {query.text}", query.facts, chosen, out / "asked" / query.name))
        found = matching("substring", same[0], pairs, n)
        rows.append(Shown(f"substring: {' '.join(same[0].words)}", same[0].facts, found))
    return rows


def run(work: Path, pairs: int, per_shard: int, n: int, processes: int, clip: Path) -> dict[str, Any]:
    """Render, retrieve and judge; what `quality.json` holds, and the sheet of pictures under "sheet"."""
    log = functools.partial(print, file=sys.stderr, flush=True)
    shards = write_corpus(work / "corpus", pairs, per_shard, processes=processes, log=log)
    queries = asked()
    out = work / "retrieved"
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    retrieve(shards, queries, clip, n, out)
    after = resource.getrusage(resource.RUSAGE_SELF)
    told = json.loads((out / "retrieval.json").read_text(encoding="utf-8"))
    corpus = read_pairs(shards)
    return {
        **circumstances(Path(__file__).parent), "pairs": len(corpus), "n": n, "encoder": told["plan"]["encoder"],
        "seconds": round(time.monotonic() - started),
        "cpu seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "named": named_share(corpus, [query for query in queries if query.group == CLASS]),
        "rows": measure(corpus, queries, n, out),
        "sheet": sheet(shown_on_sheet(corpus, queries, n, out)),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    from lit_personalize.cli.console import configure_logging

    parser = argparse.ArgumentParser(description="Measure retrieval on a rendered corpus.")
    parser.add_argument("work", type=Path, help="folder for the corpus and the retrieved set; half a gigabyte")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--n", type=int, default=N, help="pictures per query")
    parser.add_argument("--processes", type=int, default=1, help="that render")
    parser.add_argument("--clip", type=Path, default=committed_weights() / "retrieval_clip")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    configure_logging()
    found = run(options.work, options.pairs, options.per_shard, options.n, options.processes, options.clip)
    picture: Image.Image = found.pop("sheet")
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / PICTURES) as temporary:
        picture.quantize(256).save(temporary)
    write_text(options.out / RESULTS, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
