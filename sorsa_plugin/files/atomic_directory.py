"""Directories that appear complete or not at all, for every command that writes one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputExistsError


def refuse_occupied(output: Path) -> None:
    """Check that a directory can be written to `output`.

    Raises:
        OutputExistsError: `output` is a file, a directory that holds something, or a mount point.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        kind = "is not empty" if output.is_dir() else "is a file"
        raise OutputExistsError(f"{output} {kind}; expected a new or empty directory. Remove it, or choose another.")
    if os.path.ismount(output):
        raise OutputExistsError(
            f"{output} is a mount point, whose place the finished directory cannot take; expected a new or empty "
            "directory. Give a new one inside it."
        )


@contextmanager
def appearing_whole(output: Path, kept_as: str | None = None) -> Iterator[Path]:
    """A hidden directory beside `output`: renamed to `output` when the context ends, deleted if the context fails.

    Args:
        output: the directory to make.
        kept_as: a name for the work. An interruption then keeps what was written, and the same work finds it again.

    Raises:
        OutputExistsError: another process wrote the output in the meantime.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{kept_as or secrets.token_hex(4)}.partial"
    partial.mkdir(exist_ok=kept_as is not None)
    try:
        yield partial
        refuse_occupied(output)
        _make_readable(partial)
        os.replace(partial, output)
    except BaseException:
        if kept_as is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_readable(directory: Path) -> None:
    """Give files the permissions of any new file: safetensors lets only their owner read the files that it writes."""
    probe = directory / ".new"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(usual)
