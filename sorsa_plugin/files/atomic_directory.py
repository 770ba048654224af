"""Directories that appear complete or not at all, for every command that writes one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

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
        kept_as: a name for the work. An interruption then keeps what was written, and the same work finds it again;
            two processes that do the same work at once are kept apart.

    Raises:
        OutputExistsError: another process wrote the output in the meantime, or is doing the same work now.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{kept_as or secrets.token_hex(4)}.partial"
    with ExitStack() as stack:
        if kept_as is not None:
            stack.enter_context(_only_writer(partial.with_suffix(".lock"), output))
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


@contextmanager
def _only_writer(lock: Path, output: Path) -> Iterator[None]:
    """Hold a lock beside the output until the output is there.

    The lock file goes away only once the output is there, and while it is held: a process that waited for it, or takes
    a new one, finds the output and stops. After a failure the file stays for the next attempt.

    Raises:
        OutputExistsError: another process holds the lock, or has written the output.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=0.1))
        except TimeoutError as error:
            raise OutputExistsError(
                f"Another process is writing {output}. Wait for it, or choose another output."
            ) from error
        try:
            refuse_occupied(output)
        except OutputExistsError:
            lock.unlink(missing_ok=True)
            raise
        yield
        lock.unlink(missing_ok=True)


def _make_readable(directory: Path) -> None:
    """Give files the permissions of any new file: safetensors lets only their owner read the files that it writes."""
    probe = directory / ".new"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(usual)
