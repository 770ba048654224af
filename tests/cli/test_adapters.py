"""`sorsa adapters` lists every word of `adapter:`, and the options beside it."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import registered_adapters
from sorsa_plugin.recipes.setup_adapter import VOCABULARY


def test_it_lists_every_word_and_option_on_80_columns():
    run = CliRunner().invoke(build_app(), ["adapters"], env={"COLUMNS": "80"})
    assert run.exit_code == 0, run.output
    words = {*registered_adapters(), *VOCABULARY}
    assert {"sorsa", "qsorsa", "lora", "full", "r", "target_modules"} <= words
    assert all(re.search(rf"^  {word} ", run.output, re.MULTILINE) for word in words)
    assert max(map(len, run.output.splitlines())) <= 80
