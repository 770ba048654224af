"""The package's own words: `adapter: sorsa`, and `adapter: qsorsa` on a quantised base."""

from __future__ import annotations

from typing import Any

from ..config import SORSAConfig
from ..plugins import hookimpl
from .adapter_type import AdapterOptions, AdapterSetup, AdapterType, build_config


def _sorsa(options: AdapterOptions, **fixed: Any) -> AdapterSetup:
    config = build_config(SORSAConfig, options, names={"dropout": "sorsa_dropout"}, fixed=fixed, unused=("alpha",))
    return AdapterSetup(options.adapter, config)


def _qsorsa(options: AdapterOptions) -> AdapterSetup:
    return _sorsa(options, residual_base=True)


@hookimpl
def sorsa_adapters() -> list[AdapterType]:
    """SORSA, and its form on a quantised residual."""
    return [
        AdapterType("sorsa", "singular triplets U, S, V with an orthonormal regularizer", _sorsa),
        AdapterType("qsorsa", "SORSA on a quantised base that stores the quantised residual", _qsorsa),
    ]
