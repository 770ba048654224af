"""Reads plain values out of a stranger's pickle without unpickling it, which could run code."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator

_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}


def plain_values(pickled: bytes) -> Iterator[tuple[str, str | int]]:
    """(name, value) wherever a string is followed by a string, an integer or a bool, as attributes of objects are.

    Raises:
        ValueError: it is no pickle, or ends too early.
    """
    memo: dict[int, object] = {}
    last: object = None
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "FRAME":  # the length of what follows, between any two others
            continue
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = last  # type: ignore[index]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = last
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            name, last = last, memo.get(argument)  # type: ignore[arg-type]
            if isinstance(name, str) and isinstance(last, str):
                yield name, last
        else:
            name, last = last, _CONSTANTS.get(code.name, argument)
            if isinstance(name, str) and isinstance(last, str | int):
                yield name, last
