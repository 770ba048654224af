"""The kinds of base modules that SORSA adapts, one file a kind; `plugins.py` registers them like a stranger's."""

from __future__ import annotations

from . import attention, conv, embedding, linear

KINDS = (linear, embedding, conv, attention)
"""The modules whose `sorsa_layer` hooks are registered. Parameters named by `target_parameters` need no hook: see
`experts.py`."""
