"""The README names make targets, options, an address and files that exist; test_docs_code.py runs its code."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from pathlib import Path

from peft import PeftConfig

import sorsa_plugin
from sorsa_plugin import SORSAConfig, SORSAModel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_of_options_has_every_option_and_its_default() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, flags=re.MULTILINE))
    filled_in = {"base_storage", "lora_layouts", "adapted_layers"}
    known = {field.name for field in dataclasses.fields(PeftConfig)} | filled_in
    defaults = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(SORSAConfig)
        if field.name not in known
    }
    assert {name: ast.literal_eval(default) for name, default in listed.items()} == defaults
    functions = re.findall(r"^\| `(?:model\.)?(\w+)\(", page, flags=re.MULTILINE)
    assert len(functions) >= 7
    assert all(hasattr(sorsa_plugin, name) or hasattr(SORSAModel, name) for name in functions)


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"quickstart", "test"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


def test_the_address_is_that_of_the_package() -> None:
    address = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert address is not None
    assert f"REPOSITORY={address[1]}\n" in README


def test_every_local_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    missing = [link for link in links if not os.path.exists(ROOT / link)]
    assert missing == []
