"""What a study's YAML file fixes before its first run: base, data, methods, rates, seeds and margins."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

HALF_DECADES = (-14, 0)
"""The search for a rate stays within 1e-7 and 1, in exponents of half a decade."""


def rate(exponent: int) -> float:
    """The learning rate of an exponent that counts half decades: -6 is 1e-3, -5 is 3.2e-3."""
    return float(f"{10 ** (exponent / 2):.1e}")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: in files and tables.
        adapter: a word of `adapter:`.
        exponents: of the rates that are tried first (`rate`).
        options: what a recipe's block says about the method.
        gamma_over_rate: SORSA's gamma as a multiple of the learning rate, which is the weight of L_reg in the loss.
    """

    name: str
    adapter: str
    exponents: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    gamma_over_rate: float | None = None

    def recipe(self, study: Study, lr: float) -> dict[str, Any]:
        """The recipe of `setup_adapter` for one learning rate."""
        if self.adapter == "full":
            return {"adapter": "full"}
        block = dict(self.options)
        if self.gamma_over_rate is not None:
            block["gamma"] = self.gamma_over_rate * lr
        return {"adapter": self.adapter, "r": study.rank, "target_modules": "all-linear", self.adapter: block}


@dataclass(frozen=True)
class Study:
    """A study. Rates are chosen on validation rows with `grid_seed`; test rows are read by runs of `seeds` alone."""

    name: str
    title: str
    base: Literal["smollm2", "embedded"]
    top_layers: int
    rank: int
    steps: int
    batch: int
    max_tokens: int
    train_rows: int
    validation_rows: int
    test_rows: int
    passages: int
    passage_tokens: int
    kl_passages: int
    solutions: int
    grid_seed: int
    seeds: tuple[int, ...]
    margins: dict[str, float]
    methods: tuple[Method, ...]

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        ValueError: the file has other keys than a study, or a method is named twice.
    """
    content = yaml.safe_load(path.read_text())
    methods = [
        Method(name, adapter=entry.pop("adapter"), exponents=tuple(entry.pop("exponents")), **entry)
        for name, entry in content.pop("methods").items()
    ]
    expected = {item.name for item in fields(Study)} - {"name", "methods"}
    if content.keys() != expected:
        odd = sorted(content.keys() ^ expected)
        raise ValueError(f"{path} has other keys than a study: {', '.join(odd)}. See study/design.py.")
    content["seeds"] = tuple(content["seeds"])
    return Study(name=path.stem, methods=tuple(methods), **content)
