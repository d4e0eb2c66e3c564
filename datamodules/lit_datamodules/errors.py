"""Errors that a user can mend; the message names the file or option and the fix. `exit_code` is the command line's."""

from __future__ import annotations


class DataError(Exception):
    """A missing, empty, damaged or changed input."""

    exit_code = 3


class DataOptionError(Exception):
    """A wrong option of a data module, or options that cannot work together."""

    exit_code = 2
