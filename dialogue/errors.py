"""How a run ends other than by itself: a person's mistake, a signal; and what the scripts do then."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dialogue.plaintext import plain


class UserError(Exception):
    """Something a person can put right. Its text is one line: what is wrong, and what to do."""


def in_a_line(error: Exception) -> str:
    """What a library's error says, in one plain line of at most 200 characters; its kind where it says nothing."""
    return plain(" ".join(str(error).split()))[:200] or type(error).__name__


class Stopped(KeyboardInterrupt):
    """A signal ends the run. Like Ctrl-C it is no `Exception`, which libraries catch and go on."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes are a UserError: one line, and not the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class Signals:
    """The first Ctrl-C or SIGTERM is noted, or where `at_once` raises Stopped; the second ends the process."""

    def __init__(self) -> None:
        self.number = self.agreed = 0
        self.at_once = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, signals are handled here."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # nothing half-written is ever taken for whole
        # Not `print`, which must not be called while it is at work; the bar had hidden the cursor.
        show = b"\x1b[?25h" if os.isatty(2) else b""
        os.write(2, show + b"\nstopping: this step is finished and saved first; once more leaves at once\n")
        if self.at_once:
            raise Stopped(number, "interrupted")


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Call `run`; 0 when it returns, 2 after a `UserError` (one line on standard error), 128 + its number after
    a signal: 130 for Ctrl-C, 143 for SIGTERM. Any other exception is a bug and keeps its traceback, as all do
    with `debug`."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        run()
    except UserError as error:
        if debug:
            raise
        print(f"error: {' '.join(plain(str(error)).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Stopped(number, "terminated")
