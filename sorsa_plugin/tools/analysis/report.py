"""An analysis as one HTML page that needs no other file: tables, charts, and in words what they mean."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from .analyze import Analysis, LayerChange, Summary
from .charts import png_plots

HEALTHY = (
    "Healthy: condition numbers (before > after) that do not grow much. "
    "dSigma and dD are 0 where nothing was trained, and dD is at most 1."
)


class Column(NamedTuple):
    """One number of a weight, or of the mean over weights."""

    heading: str
    show: Callable[[LayerChange | Summary], str]
    meaning: str


class Chart(NamedTuple):
    """A picture and what is to be seen in it."""

    png: str
    """PNG, in base64."""
    caption: str


COLUMNS = (
    Column(
        "dSigma",
        lambda row: f"{row.d_sigma:.3g}",
        "How far the singular values moved: the mean of |s_t - s_0|, in the units of the weight. It grows with the "
        "length of the training and with the learning rate.",
    ),
    Column(
        "dD",
        lambda row: f"{row.d_direction:.3g}",
        "How far the singular vectors turned: 0 where none did, 1 where all are at right angles to what they were. "
        "A method that keeps the pre-trained directions stays low.",
    ),
    Column(
        "|dW|/|W|",
        lambda row: f"{row.relative_change:.3g}",
        "Size of the whole change, relative to the weight (Frobenius norms).",
    ),
    Column(
        "condition, merged",
        lambda row: _change(row.condition_before, row.condition_after),
        "Largest over smallest singular value of the weight with the change merged. Growth says that the weight came "
        "closer to losing a direction; inf, that it has lost one.",
    ),
    Column(
        "condition, W_p",
        lambda row: _change(row.principal_condition_before, row.principal_condition_after),
        "The same of the product that the adapter trains: U S V^T of SORSA, B A of LoRA. SORSA's regularizer keeps it "
        "low. Full fine-tuning has no such product, and a LoRA that starts from zero has none before.",
    ),
)

CAPTIONS = {
    "change": "How far singular values moved (across) against how far singular vectors turned (up). Near the corner, "
    "the weights are almost the pre-trained ones.",
    "layers": "The same of each weight, by kind and block: bright is a large change. One bright cell among dark ones "
    "is a weight worth a look.",
    "spectra": "Singular values of the most changed weight of each kind: all of them above, how far each moved below.",
    "conditions": "Condition numbers before and after training. A line that runs far to the right is a weight, or a "
    "trained product, that became ill-conditioned.",
}


def html_report(analysis: Analysis, charts: bool = True) -> str:
    """The page, with its charts inside.

    Args:
        analysis: what was measured.
        charts: draw them; needs matplotlib.

    Raises:
        MissingPackageError: matplotlib is not installed, and charts were asked for.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    drawn = png_plots(analysis) if charts else {}
    return page.render(
        analysis=analysis,
        healthy=HEALTHY,
        columns=COLUMNS,
        charts=[Chart(b64encode(png).decode(), CAPTIONS[name]) for name, png in drawn.items()],
        version=version("sorsa-plugin"),
    )


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "-"
    return f"{'-' if before is None else format(before, '.3g')} > {after:.3g}"
