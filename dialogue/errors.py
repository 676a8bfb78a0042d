"""How a run ends other than by itself: a person's mistake, a signal; and what the scripts do then."""

import argparse
import io
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dialogue import __version__
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

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self.add_help:
            self.add_argument("--version", action="version", version=f"gpt2-dialogue {__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


# Windows has no SIGHUP, which a terminal sends when its window is closed.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def handled(handler: Callable, *numbers: int) -> Iterator[None]:
    """Inside, `handler` gets these signals, but for those that the process ignores (`nohup` has it ignore SIGHUP). In
    another thread nothing changes: Python sets handlers in the main thread only."""
    before = {}
    with suppress(ValueError):
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Signals:
    """The first Ctrl-C, SIGTERM or SIGHUP is noted, or where `at_once` raises Stopped; the second ends the process."""

    def __init__(self) -> None:
        self.number = 0
        self.at_once = False

    def noted(self) -> AbstractContextManager[None]:
        """Inside, signals are handled here."""
        return handled(self._note, signal.SIGINT, *ENDINGS)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        for each in (signal.SIGINT, *ENDINGS):
            if signal.getsignal(each) == self._note:
                signal.signal(each, signal.SIG_DFL)  # nothing half-written is ever taken for whole
        _let_go(number)
        # Not `print`, which must not be called while it is at work; the bar had hidden the cursor.
        show = b"\x1b[?25h" if os.isatty(2) else b""
        os.write(2, show + b"\nstopping: this step is finished and saved first; once more leaves at once\n")
        if self.at_once:
            raise Stopped(number, "interrupted")


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Call `run`; 0 when it returns, 2 after a `UserError` or where memory is too small (one line on standard error),
    128 + its number after a signal: 130 for Ctrl-C, 143 for SIGTERM. Any other exception is a bug and keeps its
    traceback, as all do with `debug`."""
    try:
        with handled(_terminate, *ENDINGS), _streams():
            run()
    except UserError as error:
        if debug:
            raise
        return _end(2, f"error: {' '.join(plain(str(error)).split())}")
    except KeyboardInterrupt as stop:
        return _end(128 + getattr(stop, "number", signal.SIGINT), str(stop) or "interrupted")
    except Exception as error:
        from dialogue import machine  # torch takes seconds to import; a mistake is said before

        if debug or not machine.is_out_of_memory(error):
            raise
        return _end(2, f"error: {plain(machine.out_of_memory_in_words(error))}")
    return 0


def _end(code: int, line: str) -> int:
    """`code`, with a last line on standard error where that can be written."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return code


@contextmanager
def _streams() -> Iterator[None]:
    """Inside, the standard streams are there and take any text. Raises UserError where standard output is closed, or
    one of them cannot be written: the interpreter would say so in words of its own."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if not sys.stdout:
        raise UserError("standard output is closed: send it to a terminal, a file or /dev/null")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # any bytes can come in, and any code page be written to
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        for stream in (sys.stdout, sys.stderr):
            try:
                print(file=stream, flush=True)  # is it here that writing fails?
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                raise UserError(f"{stream.name} could not be written: {error.strerror}") from error
        raise


def _let_go(number: int) -> None:
    """After SIGHUP the terminal is gone, and writing to it would be an error."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _terminate(number: int, frame: Any) -> NoReturn:
    _let_go(number)
    raise Stopped(number, "terminated")


@contextmanager
def said_in_a_line(target: Path) -> Iterator[None]:
    """Inside, a disk that is full or does not let us write is a UserError that names `target`. safetensors has the
    reason in its text; torch's writer notices that it failed, and not why."""
    signs = ("os error 28", "No space left", "I/O error", "PytorchStreamWriter failed", "unexpected pos ")
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in signs):
            raise
        full = not isinstance(error, OSError) and shutil.disk_usage(target.parent).free < 1_000_000
        reason = "No space left on device" if full else getattr(error, "strerror", None) or in_a_line(error)
        raise UserError(f"{target} could not be written: {reason}; what was there before is as it was") from error
