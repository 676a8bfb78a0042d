"""The one exception that stands for a person's mistake, and what the scripts do with it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something a person can put right. Its text is one line: what is wrong, and what to do."""


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Call `run`; 0 when it returns, 2 after a `UserError` (one line on standard error),
    130 after Ctrl-C. Any other exception is a bug and keeps its traceback, as all do with `debug`."""
    try:
        run()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
