"""Errors that a user can mend; the message names the file or option and the fix. `exit_code` is the command line's."""

from __future__ import annotations


class DataError(Exception):
    """A missing, empty, damaged or changed input."""

    exit_code = 3


class DataOptionError(Exception):
    """A wrong option of a data module, or options that cannot work together."""

    exit_code = 2


class FetchError(DataError):
    """A remote file could not be brought here; the message names its URL, the attempts and the last error.

    Args:
        final: Another attempt would end the same way, as for a file that is not there.
    """

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final
