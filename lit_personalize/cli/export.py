"""`litp export`: write the files of a run again, in other formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import add_allow, add_device, add_json, allowed_by, configure_logging, report_run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp export", description="Export a run's newest complete checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    formats = "diffusers kohya peft delta neurons pipeline"
    parser.add_argument("--formats", nargs="+", default=["diffusers", "kohya"], help=formats)
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--max-error", type=float, help="of dense changes written as LoRA; 0 is exact")
    rule.add_argument("--energy", type=float, help="instead: share of their squared singular values to keep, 0.99")
    rule.add_argument("--nuclear", type=float, help="instead: share of the sum of their singular values to keep, 0.6")
    parser.add_argument("--max-rank", type=int, help="bound on their rank, before the other rules")
    parser.add_argument("--no-verify", action="store_true")
    add_json(parser)
    add_allow(parser)
    add_device(parser)
    options = parser.parse_args(arguments)
    from lit_personalize.errors import DataError

    if not (options.run / "config.yaml").is_file():
        raise DataError(f"{options.run} is not a run directory: it has no config.yaml")
    configure_logging()
    from lit_personalize.configuration import instantiate, parse
    from lit_personalize.devices import device_of
    from lit_personalize.fitting import export_run, name_initial_words
    from lit_personalize.run_directory import RunDirectory

    parser_, config = parse(["-c", str(options.run / "config.yaml"), *allowed_by(options)])
    config.export.formats = options.formats
    given = {name: getattr(options, name) for name in ("max_error", "energy", "nuclear", "max_rank")}
    if any(given[name] is not None for name in ("max_error", "energy", "nuclear")):  # instead of the run's own rule
        config.export.energy = config.export.nuclear = None
    for name, value in given.items():
        if value is not None:
            setattr(config.export, name, value)
    config.export.verify = not options.no_verify
    run = RunDirectory(options.run.parent, options.run.name)
    with run.lock():
        built = instantiate(parser_, config)
        name_initial_words(built)
        export_run(built, run, device_of(options.device))
    report_run(run.path, options.json)
    return 0
