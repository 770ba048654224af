"""One file that appears complete or not at all, and takes no other file's place."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..errors import OutputExistsError
from .atomic_directory import naming, refuse_unwritable


def refuse_existing(output: Path) -> None:
    """Check that a new file can be written to `output`.

    Raises:
        OutputExistsError: there is something, or nothing can be written there.
    """
    if output.exists():
        raise OutputExistsError(f"{output} exists; expected the path of a new file. Remove it, or choose another.")
    refuse_unwritable(output)


def write_whole(output: Path, text: str) -> None:
    """Write a new UTF-8 file, by way of a hidden one beside it.

    Raises:
        OutputExistsError: something took its place in the meantime.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{secrets.token_hex(4)}.partial"
    try:
        with naming(output), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(output)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
