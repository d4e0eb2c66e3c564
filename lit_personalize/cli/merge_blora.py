"""`litp merge blora`: the content half of one B-LoRA and the style half of another."""

from __future__ import annotations

import argparse

from lit_personalize.cli.console import base_of, configure_logging
from lit_personalize.cli.merge_arithmetic import add_output, renames, show


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp merge blora", description="The content half of one SDXL adapter and the style half of another."
    )
    parser.add_argument("--content", default=None, metavar="FILE|FOLDER[@STRENGTH]")
    parser.add_argument("--style", default=None, metavar="FILE|FOLDER[@STRENGTH]")
    parser.add_argument(
        "--scale", choices=("linear", "reference"), default="linear",
        help="linear: the change times the strength; reference: times its square, as the method's own code",
    )  # fmt: skip
    parser.add_argument("--rename", action="append", default=[], metavar="N:TOKEN=NEW", help="content is 1, style 2")
    add_output(parser)
    given = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.errors import UsageError
    from lit_personalize.merging.blora import mix
    from lit_personalize.sampling.cells import split_strengths

    halves = [None if entry is None else split_strengths(entry) for entry in (given.content, given.style)]
    if named := [part for half in halves if half for part in half[2]]:
        raise UsageError(f"a half has one strength, FILE@0.8; {named[0]} cannot have its own")
    content, style = (half and half[:2] for half in halves)
    report = mix(
        given.output, content, style,
        base_of(given),
        scale=given.scale, renames=renames(given.rename), formats=given.formats, verify=not given.no_verify,
        force=given.force, prompt=given.prompt,
    )  # fmt: skip
    show(report, given.json)
    return 0
