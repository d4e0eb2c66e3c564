"""Errors about input data; the message names the file and the fix. `exit_code` is the command line's."""

from __future__ import annotations


class DataError(Exception):
    """A missing, empty or damaged input."""

    exit_code = 3


class DataOptionError(Exception):
    """Options of a data module that cannot work together."""

    exit_code = 2
