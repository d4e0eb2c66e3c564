"""Errors that a user can mend, each with the exit code of the command line."""

from __future__ import annotations


class LitpError(Exception):
    """Base class; the message names the thing and the fix. `exit_code` is what `litp` returns."""

    exit_code = 1


class UsageError(LitpError):
    """A wrong option, key, type or combination."""

    exit_code = 2


class DataError(LitpError):
    """A missing, empty or damaged input: images, captions, shards, base directories, adapter files."""

    exit_code = 3


class VerificationError(LitpError):
    """A written file does not give back what was trained."""

    exit_code = 4


class NonFiniteError(LitpError):
    """A loss, gradient or weight became NaN or infinite."""


class RunLockedError(LitpError):
    """Another process owns the run directory."""

    exit_code = 2


class PreemptedError(LitpError):
    """A signal ended the training after it was saved; a job script queues it again."""

    exit_code = 75


class RankLostError(LitpError):
    """Another rank of the training ended; `exit_code` is its own where that is known, else 1."""

    def __init__(self, exit_code: int = 1):
        super().__init__("another rank ended: its message says why; the same command continues")
        self.exit_code = exit_code
