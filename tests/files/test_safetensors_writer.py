"""A file written tensor by tensor is the one that the safetensors library writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sorsa_plugin.files.safetensors_writer import TensorFile, file_header


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a.long.name": (7,), "scalar": (), "empty": (0, 4)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"half": made["b"].half(), "brain": made["b"].bfloat16(), "integers": torch.arange(5)}


def test_the_bytes_are_the_librarys_in_any_order(tmp_path):
    wanted = tensors()
    save_file(wanted, tmp_path / "library", metadata={"format": "pt"})
    with TensorFile(tmp_path / "ours", {name: tensor.to("meta") for name, tensor in wanted.items()}) as file:
        for name in reversed(wanted):
            file.write(name, wanted[name])
            assert torch.equal(file.read(name), wanted[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert file_header(wanted)[2] == (tmp_path / "library").stat().st_size


def test_what_is_not_written_is_zero_and_what_was_is_kept(tmp_path):
    wanted = tensors()
    with TensorFile(tmp_path / "file", wanted) as file:
        file.write("b", wanted["b"])
    with TensorFile(tmp_path / "file", wanted) as file:
        file.write("half", wanted["half"])
    found = load_file(tmp_path / "file")
    assert torch.equal(found["b"], wanted["b"])
    assert torch.equal(found["half"], wanted["half"])
    assert not found["brain"].any()


def test_a_file_laid_out_otherwise_is_begun_again(tmp_path):
    with TensorFile(tmp_path / "file", {"a": torch.ones(4)}) as file:
        file.write("a", torch.ones(4))
    with TensorFile(tmp_path / "file", {"b": torch.ones(4)}):
        pass
    assert not load_file(tmp_path / "file")["b"].any()


def test_values_are_cast_to_the_dtype_laid_out_and_other_shapes_are_refused(tmp_path):
    with TensorFile(tmp_path / "file", {"a": torch.ones(4, dtype=torch.bfloat16)}) as file:
        file.write("a", torch.full((4,), 1 / 3))
        with pytest.raises(ValueError, match=r"a has shape \(2, 2\); the file has \(4,\)"):
            file.write("a", torch.ones(2, 2))
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.full((4,), 1 / 3).bfloat16())
