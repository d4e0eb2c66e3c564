"""Signals that end a training: a handler notes them, the next step boundary heeds them.

A notice is what a cluster sends before it takes a job's nodes away: USR2 by our own job scripts, USR1 by others', TERM
at preemption and at a time limit. It asks for a save, and for the same command later. Ctrl-C asks for a save and an
end. Nothing is done inside a handler: a state that is saved there may be that of half a step.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

from lit_personalize.errors import PreemptedError

NOTICES = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
log = logging.getLogger(__name__)


class Noted:
    """What has arrived and was not heeded yet."""

    notice: signal.Signals | None = None
    interrupt = False

    def clear(self) -> None:
        """It was heeded."""
        self.notice, self.interrupt = None, False


noted = Noted()
"""Of this process; the only one."""


def listen(*signals: signal.Signals) -> Callable[[], None]:
    """Note these signals from now on, whoever listened before; only the main thread can.

    Returns:
        Gives them back to those who listened before, unless someone else has come since.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {number: signal.signal(number, _note) for number in signals}

    def give_back() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is _note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    return give_back


def heed(done: str) -> None:
    """End here, between two pieces of work, if a notice has come.

    Raises:
        PreemptedError: It has.
    """
    if noted.notice is not None:
        name = noted.notice.name
        noted.clear()
        raise PreemptedError(f"{name}: {done}; the same command continues")


def _note(number: int, frame: FrameType | None) -> None:
    """A second Ctrl-C ends at once, without saving; a second notice changes nothing."""
    if number == signal.SIGINT:
        if noted.interrupt:
            raise KeyboardInterrupt
        noted.interrupt = True
        log.warning("Ctrl-C: saving after this step; press it again to stop at once without saving")
    elif noted.notice is None:
        noted.notice = signal.Signals(number)
        log.warning("%s: saving after this step, to go on when the same command is given again", noted.notice.name)
