"""One shard copied with other values: what safetensors reads back, and the bytes of everything else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from builders.saved import saved_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sorsa_plugin.files.base_checkpoint import BaseFiles
from sorsa_plugin.files.checkpoint_copy import copy_other_files, copy_shard

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6
    ),
    st.randoms(use_true_random=False),
)
def test_replaced_and_added_tensors_are_read_back_and_all_others_are_as_before(layout, random):
    layout = {name: kind for name, kind in layout.items() if name != "__metadata__"} or {"x": ((2,), torch.float32)}
    names = list(layout)
    stored = {name: filled(*kind, seed=i) for i, (name, kind) in enumerate(layout.items())}
    replaced = {name: filled(*layout[name], seed=99) for name in names if random.random() < 0.4}
    added = {f"{name}.added": name for name in names if random.random() < 0.4 and f"{name}.added" not in names}
    own = {name: filled(*layout[like], seed=98) for name, like in added.items() if random.random() < 0.5}
    expected = stored | {name: stored[like] for name, like in added.items()} | replaced | own
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        save_file(stored, source, metadata={"format": "pt", "mine": "ü"})
        written: list[int] = []
        values = {name: (lambda tensor=tensor: tensor) for name, tensor in (replaced | own).items()}
        copy_shard(source, target, values, added, written.append)
        found = load_file(target)
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"format": "pt", "mine": "ü"}
        assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0  # the data is aligned
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    assert sum(written) == sum(tensor.nbytes for tensor in expected.values())


def test_a_tensor_of_another_size_is_an_error(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "source")
    with pytest.raises(ValueError, match=r"x takes 12 bytes, and 6 were given to write \(torch\.bfloat16\)"):
        copy_shard(tmp_path / "source", tmp_path / "target", {"x": lambda: torch.ones(3).bfloat16()}, {}, len)


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "source")
    with pytest.raises(FileExistsError):
        copy_shard(tmp_path / "source", tmp_path / "source", {}, {}, len)


def test_links_out_of_the_base_are_not_followed_and_those_of_the_hubs_cache_are(tmp_path):
    """A stranger's model could link to a key of the user's, which would be published with the merged model."""
    (tmp_path / "secret").write_text("mine")
    blobs, base = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    saved_base(base)
    (base / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    (base / "loop").symlink_to(base / "loop")
    target = tmp_path / "target"
    target.mkdir()
    assert copy_other_files(BaseFiles(base), target) == ["vocab.txt"]
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "vocab.txt").exists()
