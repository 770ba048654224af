"""Plain values come out of a pickle, and nothing in it runs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from sorsa_plugin.files.pickled_values import plain_values


@dataclass
class Record:
    place: str
    start: int
    whole: bool
    kept: object = None


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_attributes_are_found_in_their_order_whatever_the_protocol(protocol: int, tmp_path: Path) -> None:
    """Also strings that the pickle holds once and means twice, beside an object that would run code."""
    place = str(tmp_path)
    records = [Record(place, 2**40, True, Touches(tmp_path / "touched")), Record(place, 3, False)]
    found = [pair for pair in plain_values(pickle.dumps(records, protocol)) if pair[0] in ("place", "start", "whole")]
    assert found == [
        *(("place", place), ("start", 2**40), ("whole", True)),
        *(("place", place), ("start", 3), ("whole", False)),
    ]
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("damaged", [b"", b"written last", pickle.dumps({"a": 1})[:-3]])
def test_what_is_no_whole_pickle_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError):
        list(plain_values(damaged))


def test_a_frame_may_begin_between_a_name_and_its_value():
    """As in every pickle of more than 64 KiB, at some place or other."""
    value = b"\x8c\x05shard" + b"u."
    frame = b"\x95" + len(value).to_bytes(8, "little")
    pickled = b"\x80\x04}(" + b"\x8c\x05place" + frame + value
    assert pickle.loads(pickled) == {"place": "shard"}
    assert list(plain_values(pickled)) == [("place", "shard")]
