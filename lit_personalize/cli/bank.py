"""`litp bank`: many adapters trained in one batched pass; a file for each group of verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lit_personalize.cli import bank_jobs, bank_plan, bank_run, bank_store

VERBS: dict[str, tuple[str, Callable[..., None], Callable[..., int]]] = {
    "plan": ("write a job table: one row for each adapter", bank_jobs.add_plan_verb, bank_jobs.plan_verb),
    "run": ("train what is free of a table; the same command continues", bank_run.add_run, bank_run.main),
    "status": ("show done, running, failed, waiting, adapters/hour", bank_jobs.add_status, bank_jobs.status),
    "retry": ("put failed adapters back", bank_jobs.add_retry, bank_jobs.retry),
    "pack": ("add finished adapters to a corpus, rows that one can compute with", bank_store.add_pack, bank_store.pack),
    "get": ("write adapters of a corpus as LoRA files, verified", bank_store.add_get, bank_store.get),
}
"""Name: line of help, what adds the options, what runs with them and with those that it does not know."""
TRAINS = ("plan", "run")
"""Take options of litp fit."""


def build_parser() -> argparse.ArgumentParser:
    about = "Train many adapters in one batched pass, each as if it were alone."
    parser = argparse.ArgumentParser(prog="litp bank", description=about)
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join(VERBS))
    for name, (text, add, _) in VERBS.items():
        add(verbs.add_parser(name, help=text, epilog=bank_plan.FURTHER if name in TRAINS else None))
    return parser


def main(arguments: list[str]) -> int:
    options, rest = build_parser().parse_known_args(arguments)
    return VERBS[options.what][2](options, rest)
