"""Work in a forked process, which may be killed there: nothing is imported again, which is most of a start's time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def exit_code_of(work: Callable[[], object]) -> int:
    """The exit code of a process that did the work; negative for the signal that ended it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(120)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def exit_code_of_program(program: str, *arguments: object) -> int:
    """The exit code of a Python program, given as `python -c` takes it."""

    def work() -> None:
        sys.argv = ["-c", *map(str, arguments)]
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})

    return exit_code_of(work)
