"""A file appears whole, with the permissions of any new one, and replaces nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sorsa_plugin.errors import OutputExistsError
from sorsa_plugin.files import atomic_file
from sorsa_plugin.files.atomic_file import refuse_existing, write_whole


def test_a_new_file_has_its_text_and_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_whole(tmp_path / "new" / "file", "größer\n")
    assert (tmp_path / "new" / "file").read_bytes() == "größer\n".encode()
    assert (tmp_path / "new" / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_there_stays(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine") if kind == "file" else target.mkdir()
    before = target.stat()
    for check in (refuse_existing, lambda path: write_whole(path, "new")):
        with pytest.raises(OutputExistsError, match="target exists; expected the path of a new file"):
            check(target)
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_place_inside_a_file_or_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="file is a file"):
        refuse_existing(tmp_path / "file" / "page")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputExistsError, match="is read-only for you"):
        refuse_existing(tmp_path / "page")


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*page"):
        write_whole(tmp_path / "page", "text")
    assert list(tmp_path.iterdir()) == []
