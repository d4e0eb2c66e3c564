"""`litp fit`: train, export and verify from a configuration."""

from __future__ import annotations

import signal

from lit_personalize.cli.console import ALLOW_HELP, JSON_HELP, configure_logging, report_run
from lit_personalize.errors import PreemptedError
from lit_personalize.stop_signals import NOTICES, listen


def main(arguments: list[str]) -> int:
    configure_logging()
    # Not an option of the parser, whose options are the configuration that the run keeps.
    as_json, arguments = "--json" in arguments, [a for a in arguments if a != "--json"]
    if "-h" in arguments or "--help" in arguments:
        from lit_personalize.configuration import build_parser

        parser = build_parser()
        parser.epilog = f"--json: {JSON_HELP}. --allow NAME: {ALLOW_HELP}"
        parser.print_help()
        return 0
    give_back = listen(*NOTICES)  # imports take their time, and an unheard notice ends the process
    try:
        from lit_personalize.fitting import fit
        from lit_personalize.ranks import is_rank_zero

        run = fit(arguments)
    except PreemptedError:
        for number in NOTICES:  # the first rank that ends has the others told to end, which they do with this code
            signal.signal(number, signal.SIG_IGN)
        raise
    except BaseException:
        give_back()
        raise
    give_back()
    if is_rank_zero():
        report_run(run.path, as_json)
    return 0
