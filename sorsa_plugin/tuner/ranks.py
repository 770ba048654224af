"""The rank of each adapted module: `r`, `rank_pattern`, or what a narrow weight has that "all-linear" chose."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key

from ..errors import RankError
from ..rank_zero import say

if TYPE_CHECKING:
    from ..config import SORSAConfig


class Ranks:
    """The ranks of one adapter's modules.

    Args:
        config: the adapter's, before PEFT replaces "all-linear" in it by names.
    """

    def __init__(self, config: SORSAConfig) -> None:
        self.config = config
        self.narrows = config.target_modules == "all-linear"
        self.asked = 0
        self.narrowed: list[int] = []

    def of(self, name: str, target: Any) -> int:
        """The rank of a module. Where "all-linear" chose one whose weight has fewer singular triplets, as that of a
        shared expert's gate, which has one row, it is their number, noted in `rank_pattern` for this module alone."""
        config = self.config
        key = get_pattern_key(config.rank_pattern.keys(), name)
        rank = config.rank_pattern.get(key, config.r)
        limit = min(getattr(target, "in_features", rank), getattr(target, "out_features", rank))
        if self.narrows and key not in config.rank_pattern and limit < rank:
            config.rank_pattern[f"^{re.escape(name)}"] = rank = limit  # PEFT matches a bare name as an ending, too
            self.narrowed.append(limit)
            say("%s has only %d singular triplets: its rank is %d instead of %d.", name, limit, limit, config.r)
        self.asked += 1
        return rank

    def check(self) -> None:
        """Once all are known.

        Raises:
            RankError: r is more than any of the weights has that "all-linear" chose.
        """
        if self.narrowed and len(self.narrowed) == self.asked:
            raise RankError(
                f"The rank is {self.config.r}, but no adapted weight has as many singular triplets; the most is "
                f"{max(self.narrowed)}. Lower r to that at most."
            )
