"""`sorsa analyze` shows every number whole in a terminal of 80 columns."""

from __future__ import annotations

import pytest

from sorsa_cli.analyze import _show
from sorsa_plugin.tools.analysis.analyze import Analysis, LayerChange

CHANGE = LayerChange(
    "a-run-of-weeks", 1234567, "q_proj", 8, 8, 8, 1.23e-05, 2.34e-05, 3.45e-05, 4.56e05, 5.67e05, 6.78e05, 7.89e05
)
NUMBERS = ("1234567", "1.23e-05", "2.34e-05", "3.45e-05", "4.56e+05", "5.67e+05", "6.78e+05", "7.89e+05")


@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_shows_every_number_and_heading(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    _show(Analysis("base", ("a-run-of-weeks",), None, 1e-6, (CHANGE,), {}))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert all(shown.split().count(number) == 1 for number in NUMBERS)
    assert all(heading in shown for heading in ("step", "dSigma", "dD", "|dW|/|W|", "merged", "W_p"))
    assert "Healthy: condition numbers" in shown
