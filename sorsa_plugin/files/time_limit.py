"""Ends work on a stranger's file that would never end: one regular expression can keep a process busy for years."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BaseFilesError, IncompleteAdapterError, SORSAError

SECONDS = 20.0
"""Long enough for the names of any model's layers: matching takes about a millisecond for each."""


REASONS: dict[type[SORSAError], str] = {
    IncompleteAdapterError: "it looks as if a regular expression in adapter_config.json (rank_pattern, target_modules, "
    "exclude_modules) never ends. Correct it",
    BaseFilesError: "a number in config.json, such as that of layers, is too large. Correct it",
}


@contextmanager
def time_limit(
    work: str, seconds: float | None = None, error: type[SORSAError] = IncompleteAdapterError
) -> Iterator[None]:
    """In this context, work that takes longer is interrupted, regular expressions too.

    Without effect where Python has no such timer: outside of the main thread, on Windows, or inside code that uses the
    timer (SIGALRM) itself.

    Args:
        work: what is done, for the message; it begins a sentence.
        seconds: how long it may take; None for `SECONDS`.
        error: what is raised: of which file the work is.

    Raises:
        SORSAError: of the type `error`: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    allowed = SECONDS if seconds is None else seconds
    previous = signal.getsignal(signal.SIGALRM)
    if previous is not signal.SIG_DFL or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def interrupt(*_: Any) -> None:
        raise error(f"{work} took more than {allowed:g} s and was stopped: {REASONS.get(error, 'it would not end')}.")

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, allowed)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
