"""`litp merge extract`: the difference of a fine-tuned model and its base as a LoRA."""

from __future__ import annotations

import argparse

from lit_personalize.cli.console import base_of, configure_logging
from lit_personalize.cli.merge_arithmetic import add_cut, add_output, show


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp merge extract", description="The difference of a fine-tuned model and its base as a LoRA."
    )
    parser.add_argument("--tuned", required=True, help="fine-tuned model: diffusers directory or single file")
    add_cut(parser)
    add_output(parser, adapters=False)
    given = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.merging.extract import extract
    from lit_personalize.merging.truncation import Cut
    from lit_personalize.merging.writing import check_output

    Cut(given.rank, given.energy)  # before gigabytes are read
    check_output(given.output, [], given.formats)
    report = extract(
        base_of(given), given.tuned, given.output,
        rank=given.rank, energy=given.energy, config=given.base_config, formats=given.formats,
        verify=not given.no_verify, prompt=given.prompt,
    )  # fmt: skip
    show(report, given.json)
    return 0
