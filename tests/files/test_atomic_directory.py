"""An output appears whole, where nothing is lost, with the permissions of its place, and says which disk is full."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sorsa_plugin.errors import OutputExistsError
from sorsa_plugin.files import atomic_directory
from sorsa_plugin.files.atomic_directory import appearing_whole, output_path, refuse_occupied


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def written(output: Path) -> Path:
    with appearing_whole(output) as directory:
        (directory / "folder").mkdir()
        (directory / "file").write_text("x")
        (directory / "folder" / "file").write_text("x")
        (directory / "file").chmod(0o600)  # as safetensors does
    return output


@pytest.mark.parametrize(("given", "files"), [(0o700, 0o600), (0o2750, 0o640), (0o755, 0o644), (0o2775, 0o644)])
def test_an_empty_directory_keeps_its_permissions_and_gives_its_files_no_more(tmp_path, given, files):
    previous = os.umask(0o022)
    try:
        (tmp_path / "out").mkdir()
        (tmp_path / "out").chmod(given)
        written(tmp_path / "out")
    finally:
        os.umask(previous)
    assert [mode(tmp_path / "out"), mode(tmp_path / "out" / "folder")] == [given, given]
    assert {mode(path) for path in (tmp_path / "out").rglob("file")} == {files}


def test_a_new_directory_has_the_permissions_of_any_new_one(tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    out = written(tmp_path / "out")
    assert mode(out) == mode(tmp_path / "usual")
    assert mode(out / "file") == mode(tmp_path / "usual" / "file")


def test_links_that_lead_back_to_themselves_are_no_output(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputExistsError, match=r"a is .*Choose another|a is a link that leads back to itself"):
        output_path(tmp_path / "a")


def test_an_output_inside_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match=r"cannot be made, because .*file is a file"):
        refuse_occupied(tmp_path / "file" / "a" / "b")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)}")],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_said_with_the_output(tmp_path, error):
    with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}.*out") as raised, appearing_whole(tmp_path / "out"):
        raise error
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        atomic_directory.os, "fsync", lambda handle: flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    )
    written(tmp_path / "out")
    assert sorted(name for name in flushed if not name.startswith(".out")) == ["file", "file", "folder"]
