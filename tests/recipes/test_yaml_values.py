"""Numbers of a YAML recipe are numbers, with or without a dot before the exponent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import AdapterOptionsError


@pytest.mark.parametrize("number", ["4e-4", "4E-4", "+4e-4", "4.e-4", "4.0e-04", "0.0004"])
def test_numbers_need_no_dot_before_their_exponent(number: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"adapter: sorsa\nr: 4\ntarget_modules: [q_proj]\nsorsa:\n  gamma: {number}\n")
    for options in (recipe, {"adapter": "sorsa", "adapter_options": f"{{gamma: {number}}}"}):
        assert setup_adapter(options).peft_config.gamma == 4e-4


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [bytes(range(256)), BOMB.encode(), b"a: &a [*a]", b"[" * 50_000, b"a: 2001-99-99"],
    ids=["binary", "a-bomb", "a-list-that-holds-itself", "nested", "an-impossible-date"],
)
def test_what_is_no_recipe_ends_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(AdapterOptionsError, match=r"cannot be read as YAML"):
        setup_adapter(recipe)
