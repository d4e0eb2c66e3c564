"""`litp`, stage one: knows the verbs and nothing heavy; torch is imported by a verb that needs it."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

# verb -> module of lit_personalize.cli, one line of help
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "learn a subject of the embedded world in a few minutes"),
    "init": ("init", "write a run.yaml for a folder of pictures"),
    "fit": ("fit", "train, export, verify; the same command continues"),
    "bank": ("bank", "train many adapters in one batched pass"),
    "w2w": ("w2w", "sample, edit, invert, merge and explore in the space of a corpus of adapters"),
    "plan": ("plan", "count memory, steps, time and disk of a run before it"),
    "sample": ("sample", "draw pictures with a base and adapters"),
    "edit": ("edit", "change words of a prompt and keep the picture or photo; show where words act"),
    "evaluate": ("evaluate", "measure fidelity, alignment and drift of an adapter"),
    "merge": ("merge", "combine adapters into one"),
    "export": ("export", "write adapter files of a run again, in other formats"),
    "verify": ("verify", "reload an adapter file through the stock client and compare"),
    "inspect": ("inspect", "show keys, ranks, tokens and metadata of an adapter file"),
    "import": ("import_", "take an adapter of another program, pickles included, into .safetensors"),
    "data": ("data", "check the pictures of a configuration, or draw what the model sees"),
    "gallery": ("gallery", "write a page of adapters with their pictures and files"),
    "runs": ("runs", "list runs, show one, or compare some"),
    "prefetch": ("prefetch", "check, list or copy all that a run opens, for nodes without network"),
    "sweep": ("sweep", "train a configuration over values of its keys, as an array of jobs"),
    "slurm": ("slurm", "write, submit and list the job scripts of a cluster"),
    "profile": ("profile", "show where a step's time goes, and what kernels take"),
    "doctor": ("doctor", "report versions, devices and known problems"),
    "world": ("world", "render pictures of the embedded world, or build its base"),
}


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EROFS, errno.EACCES)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp",
        description="Personalize text-to-image diffusion models.",
        epilog="litp VERB --help shows the options of a verb.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code (0 ok, 2 usage, 3 data, 4 verification, 75 preempted, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in VERBS:
        return _run(given[0], given[1:])
    parser = build_parser()
    if given and not given[0].startswith("-"):
        import difflib

        close = difflib.get_close_matches(given[0], VERBS, 1)
        print(f"litp: unknown verb {given[0]!r}{f'; did you mean {close[0]!r}?' if close else ''}", file=sys.stderr)
        return 2
    options = parser.parse_args(given)
    if options.version:
        from lit_personalize import __version__

        print(__version__)
        return 0
    parser.print_help()
    return 0 if not given else 2


def _run(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(f"lit_personalize.cli.{VERBS[verb][0]}")
    try:
        return int(module.main(arguments) or 0)
    except KeyboardInterrupt as stop:
        print(f"litp {verb}: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the one place that turns errors into messages and exit codes
        code, message = getattr(error, "exit_code", None), str(error)
        if code is None and isinstance(error, OSError) and error.errno in NO_ROOM + NO_ACCESS:
            code, message = 1, unwritten(error)
        if code is None or os.environ.get("LITP_DEBUG"):
            raise
        print(f"litp {verb}: {message}", file=sys.stderr)
        return int(code)


def unwritten(error: OSError) -> str:
    """One sentence for a disk that is full or closed to this user; what was written before stays."""
    fix = "make room" if error.errno in NO_ROOM else "allow it, or name another place"
    return f"cannot write {error.filename or 'a file'}: {error.strerror}; {fix}; the same command continues"


if __name__ == "__main__":
    sys.exit(main())
