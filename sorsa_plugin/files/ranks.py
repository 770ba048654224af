"""The rank of an adapted weight, from the config and the weight's sides: the same for a new adapter and a saved one."""

from __future__ import annotations

from ..compat.peft import get_pattern_key
from ..config import SORSAConfig


def rank_of(config: SORSAConfig, name: str, out_features: int, in_features: int) -> int:
    """The rank of the adapter on a weight (out x in).

    An entry of `rank_pattern` holds as it is: it was given for this module. `r` is for all modules, so it is at most
    the number of a weight's singular triplets. The config keeps what the user asked for.

    Args:
        config: the adapter's.
        name: the module's or parameter's dotted name, which `rank_pattern` is matched with.
        out_features, in_features: the sides of the weight, or of each matrix of a stack.
    """
    own = own_rank(config, name)
    return min(config.r, out_features, in_features) if own is None else own


def own_rank(config: SORSAConfig, name: str) -> int | None:
    """The rank that `rank_pattern` gives a module or parameter; None if it does not name it."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name))
