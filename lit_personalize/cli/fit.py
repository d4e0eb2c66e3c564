"""`litp fit`: train, export and verify from a configuration."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    from lit_personalize.cli.console import configure_logging

    configure_logging()
    if "-h" in arguments or "--help" in arguments:
        from lit_personalize.configuration import build_parser

        build_parser().print_help()
        return 0
    from lit_personalize.fitting import fit

    run = fit(arguments)
    from lit_personalize.cli.console import where_things_are

    where_things_are(run.path, sys.stdout)
    return 0
