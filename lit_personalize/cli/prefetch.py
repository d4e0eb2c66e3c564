"""`litp prefetch`: all that a run opens, checked and listed, or copied into one folder for nodes without network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_json, configure_logging, emit

if TYPE_CHECKING:
    from lit_personalize.cli.prefetch_files import Needed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp prefetch",
        description="Check that everything that a run opens is here: base, tokenizers, metric models, pictures, "
        "shards, caches. Write a list of it, or copy it into one folder that needs nothing from elsewhere.",
    )  # fmt: skip
    parser.add_argument("-c", "--config", action="append", default=[], help="YAML file or recipe; may be repeated")
    parser.add_argument("--to", type=Path, metavar="DIR", help="copy all of it into DIR, with a run.yaml that uses it")
    parser.add_argument("--fetch", action="store_true", help="ask a hub for models, and URLs for shards, not here yet")
    parser.add_argument("--hub-cache", type=Path, metavar="DIR", help="where a hub's models are kept; default: HF_HOME")
    parser.add_argument("--clip", help="CLIPModel for litp evaluate: local directory or hub id")
    parser.add_argument("--dino", help="ViT or DINO for litp evaluate: local directory or hub id")
    parser.add_argument("--cache", action="store_true", help="draw generated sets, encode latents and text states now")
    parser.add_argument("-o", "--output", type=Path, help="the list; default: prefetch.json, in DIR with --to")
    parser.add_argument("--check", type=Path, metavar="DIR", help="instead: check that a copied folder is whole")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options, overrides = build_parser().parse_known_args(arguments)
    from lit_personalize.errors import UsageError

    if options.check:
        return _check(options)
    if not options.config:
        raise UsageError("litp prefetch needs a configuration: -c FILE, or --check DIR for a folder that was copied")
    configure_logging()
    import yaml

    from lit_personalize.cli import prefetch_files, prefetch_folder
    from lit_personalize.configuration import parse, resolved_text

    given = [*(part for config in options.config for part in ("-c", config)), *overrides]
    known = any(argument.partition("=")[0] == "--name" for argument in overrides)
    try:
        parser, config = parse(given)
    except UsageError:
        if known:
            raise
        parser, config = parse([*given, "--name", "run"])  # a configuration without a name has files, too
    whole = yaml.safe_load(resolved_text(parser, config))
    needs = prefetch_files.collect(whole, options.clip, options.dino, options.fetch, options.hub_cache)
    missing = [(need, reason) for need in needs for reason in need.missing]
    listed = options.output or (options.to or Path()) / "prefetch.json"
    report: dict[str, Any] = {"list": str(listed), "missing": [m | {} for m in map(_missing_row, missing)]}
    if missing:
        if not options.to:
            prefetch_folder.write_list(listed, needs, None, report["missing"])
        _tell(needs, report, options.json)
        return 3
    if options.to:
        extra = {key: config[key] for key in ("recipe", "slurm") if config[key]}
        report["run"] = str(prefetch_folder.copy_all(needs, whole | extra, options.to))
    if options.cache:
        report["cache"] = _fill(options.to, given, options.to is not None)
    report |= prefetch_folder.write_list(listed, needs, options.to, [])
    _tell(needs, report, options.json)
    return 0


def _fill(folder: Path | None, given: list[str], copied: bool) -> dict[str, Any]:
    """Draw sets and encode pictures and captions, in the copied folder by what is there, or in place."""
    import contextlib

    from lit_personalize.cli.cache import fill
    from lit_personalize.configuration import instantiate, parse
    from lit_personalize.fitting import name_initial_words

    with contextlib.chdir(folder or "."):
        parser, config = parse(["-c", "run.yaml"] if copied else [*given, "--name", "prefetch"])
        built = instantiate(parser, config)
        name_initial_words(built)
        return fill(built, (0, 1))


def _check(options: argparse.Namespace) -> int:
    from lit_personalize.cli.prefetch_folder import wrong_with

    wrong = wrong_with(options.check)
    if options.json:
        emit({"folder": str(options.check), "wrong": wrong}, True)
    else:
        print("\n".join(wrong) or f"{options.check} is whole")
    return 3 if wrong else 0


def _missing_row(pair: tuple[Needed, str]) -> dict[str, str]:
    need, reason = pair
    return {"what": need.what, "given": need.given, "reason": reason, "fix": need.fix}


def _tell(needs: list[Needed], report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(report, True)
        return
    from rich.console import Console
    from rich.table import Table

    from lit_personalize.cli.run_tables import console
    from lit_personalize.gallery.pages import size

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("what", "as configured", "files", "size", ""):
        table.add_column(title, overflow="fold", justify="right" if title in ("files", "size") else "left")
    for need in needs:
        bytes_ = sum(path.stat().st_size for path in need.files)
        note = "missing" if need.missing else need.note
        table.add_row(need.what, need.given, str(len(need.files)), size(bytes_), note)
    console().print(table)
    if report["missing"]:
        table = Table(title="missing", title_justify="left", header_style="bold")
        for title in ("what", "reason", "how to get it"):
            table.add_column(title, overflow="fold")
        for row in report["missing"]:
            table.add_row(row["what"], row["reason"], row["fix"])
        Console(file=sys.stderr, width=None if sys.stderr.isatty() else 100).print(table)
        return
    print(report["list"])
    if "run" in report:
        print(report["run"])
        print(f"there: cd {Path(report['run']).parent} && litp fit -c run.yaml", file=sys.stderr)
