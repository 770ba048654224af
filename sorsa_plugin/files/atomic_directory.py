"""Directories that appear complete or not at all, for every command that writes one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError

from ..errors import OutputExistsError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""A full disk, a used-up quota, a failing disk, and a file that is too large for it."""


def output_path(output: str | os.PathLike[str]) -> Path:
    """The absolute path of an output, links followed.

    Raises:
        OutputExistsError: its links lead back to themselves.
    """
    try:
        found = Path(output).resolve()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:  # Python 3.13 raises none of them for a loop
        raise OutputExistsError(f"{output} is no path where something new can be ({error}). Choose another.") from error
    if found.is_symlink():
        raise OutputExistsError(f"{output} is a link that leads back to itself. Remove it, or choose another.")
    return found


def refuse_occupied(output: Path) -> None:
    """Check that a directory can be written to `output`.

    Raises:
        OutputExistsError: `output` is a file, a directory that holds something, a mount point, or in a place where
            nothing can be written.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        kind = "is not empty" if output.is_dir() else "is a file"
        raise OutputExistsError(f"{output} {kind}; expected a new or empty directory. Remove it, or choose another.")
    if os.path.ismount(output):
        raise OutputExistsError(
            f"{output} is a mount point, whose place the finished directory cannot take; expected a new or empty "
            "directory. Give a new one inside it."
        )
    refuse_unwritable(output)


def refuse_unwritable(output: Path) -> None:
    """Check that something can be made at `output`.

    Raises:
        OutputExistsError: what lies above it is a file, or read-only.
    """
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is read-only for you" if above.is_dir() else "is a file"
        raise OutputExistsError(f"{output} cannot be made, because {above} {why}. Choose another place.")


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
            with naming(output):
                yield partial
            refuse_occupied(output)
            _give_permissions(partial, output)
            _flush(partial)
            os.replace(partial, output)
        except BaseException:
            if kept_as is None:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Give the errors of a full or failing disk, which name no file, the name of the output."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_ERRORS:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
    except SafetensorError as error:
        number = next((number for number in DISK_ERRORS if os.strerror(number) in str(error)), None)
        if number is not None:
            raise OSError(number, os.strerror(number), str(output)) from error
        raise


def _flush(directory: Path) -> None:
    """Wait until all files are on the disk: else a machine that stops after the renaming leaves empty ones."""
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink() and (path.is_file() or os.name == "posix"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


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


def _give_permissions(directory: Path, output: Path) -> None:
    """Give files the permissions of any new file: safetensors lets only their owner read the files that it writes.

    If there is an empty directory whose place they take, its own permissions and group stay, and its files get no more.
    """
    probe = directory / ".new"
    probe.touch()
    usual, group = stat.S_IMODE(probe.stat().st_mode), None
    probe.unlink()
    paths = [path for path in directory.rglob("*") if not path.is_symlink()]
    if output.is_dir():
        taken = output.stat()
        usual, group = usual & taken.st_mode, taken.st_gid
        for path in (*(path for path in paths if path.is_dir()), directory):
            _hand_over(path, group)  # before the mode, because it clears the bit that hands the group down
            path.chmod(stat.S_IMODE(taken.st_mode))
    for path in paths:
        if path.is_file():
            if group is not None:
                _hand_over(path, group)
            path.chmod(usual)


def _hand_over(path: Path, group: int) -> None:
    """Give a file to a group, where the system lets us."""
    with suppress(OSError, AttributeError):
        os.chown(path, -1, group)
