"""The charts of an analysis, PNG and SVG; imports matplotlib only here, when one is drawn."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MissingPackageError

if TYPE_CHECKING:
    from .analyze import Analysis, LayerChange

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart. They repeat after the last."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sorsa",
}
SIGMA = r"$\Delta\Sigma$ = mean $|\sigma_t - \sigma_0|$  (units of the weight)"
DIRECTION = r"$\Delta D$ = 1 $-$ mean $|\cos|$ of singular vectors"
MOST_RUNS, MOST_SPECTRA = 6, 4
DPI = 150


def require_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'Charts need matplotlib, which is not installed. Run: pip install "sorsa-plugin[plot]", or leave the '
            "charts out (--no-plots)."
        ) from error


def save_plots(analysis: Analysis, directory: str | PathLike[str]) -> list[Path]:
    """Draw every chart, as NAME.png and NAME.svg.

    Returns:
        The files written.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    written = []
    with _style():
        for name, figure in _figures(analysis).items():
            for suffix, metadata in (("png", None), ("svg", {"Date": None})):
                path = Path(directory) / f"{name}.{suffix}"
                figure.savefig(path, dpi=DPI, metadata=metadata)
                written.append(path)
    return written


def png_plots(analysis: Analysis) -> dict[str, bytes]:
    """Every chart as the bytes of a PNG file, by name.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    drawn = {}
    with _style():
        for name, figure in _figures(analysis).items():
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI)
            drawn[name] = buffer.getvalue()
    return drawn


def _style() -> AbstractContextManager[None]:
    require_matplotlib()
    from matplotlib import rc_context

    return rc_context(STYLE)


def _figures(analysis: Analysis) -> dict[str, Any]:
    return {
        "change": change_figure(analysis),
        "layers": layers_figure(analysis),
        "spectra": spectra_figure(analysis),
        "conditions": conditions_figure(analysis),
    }


def colour(analysis: Analysis, run: str) -> str:
    """The colour of a run, as a hexadecimal string."""
    return COLOURS[analysis.runs.index(run) % len(COLOURS)]


def change_figure(analysis: Analysis) -> Any:
    """dSigma against dD, as in the paper. If there are checkpoints, both over the steps too."""
    summaries = analysis.summaries()
    stepped = any(summary.step is not None for summary in summaries)
    figure = _figure(11.5 if stepped else 6.2, 4.3)
    axes = figure.subplots(1, 3 if stepped else 1, squeeze=False)[0]
    for run in analysis.runs:
        points = [summary for summary in summaries if summary.run == run]
        paint = colour(analysis, run)
        layers = analysis.last(run)
        axes[0].scatter(
            [layer.d_sigma for layer in layers],
            [layer.d_direction for layer in layers],
            s=9, color=paint, alpha=0.3, linewidths=0,
        )  # fmt: skip
        start = [0.0] if points[0].step is not None else []
        sigma = start + [point.d_sigma for point in points]
        direction = start + [point.d_direction for point in points]
        axes[0].plot(sigma, direction, color=paint, marker="o", markersize=3, linewidth=1.5)
        axes[0].plot(sigma[-1:], direction[-1:], "D", color=paint, markersize=7, markeredgecolor="white", label=run)
        if start:
            steps = [0, *(point.step or 0 for point in points)]
            for axis, means, name in ((axes[1], sigma, "d_sigma"), (axes[2], direction, "d_direction")):
                axis.plot(steps, means, color=paint, marker="o", markersize=3, label=run)
                low, high = _band(analysis, run, name)
                axis.fill_between(steps, [0, *low], [0, *high], color=paint, alpha=0.12, linewidth=0)
    axes[0].set(xlabel=SIGMA, ylabel=DIRECTION, title="Singular values against vectors")
    if stepped:
        axes[1].set(xlabel="optimizer step", ylabel=SIGMA, title="Singular values")
        axes[2].set(xlabel="optimizer step", ylabel=DIRECTION, title="Singular vectors")
    for axis in axes:
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    axes[0].legend(title="mean over weights")
    figure.suptitle("How far training moved the singular triplets of the weights")
    note = "Diamonds: means at the last step. Dots: single weights."
    _note(figure, note + (" Bands: 10th to 90th percentile of the weights." if stepped else ""))
    return figure


def layers_figure(analysis: Analysis) -> Any:
    """dSigma and dD of each weight at the last step: kind of module against depth, one column per run."""
    runs = analysis.runs[:MOST_RUNS]
    last = {run: analysis.last(run) for run in runs}
    everything = [change for run in runs for change in last[run]]
    kinds = list(dict.fromkeys(change.kind for change in everything))
    depths = sorted({-1 if change.depth is None else change.depth for change in everything})
    width = max(2.2, min(5.0, 0.28 * len(depths) + 1.2))
    figure = _figure(1.6 + width * len(runs), 1.7 + 2 * max(1.3, 0.26 * len(kinds)))
    axes = figure.subplots(2, len(runs), squeeze=False, sharex=True, sharey=True)
    for row, (name, label) in enumerate((("d_sigma", r"$\Delta\Sigma$"), ("d_direction", r"$\Delta D$"))):
        highest = max(getattr(change, name) for change in everything) or 1.0
        for axis, run in zip(axes[row], runs, strict=True):
            grid = [[math.nan] * len(depths) for _ in kinds]
            for change in last[run]:
                depth = -1 if change.depth is None else change.depth
                grid[kinds.index(change.kind)][depths.index(depth)] = getattr(change, name)
            image = axis.imshow(grid, vmin=0, vmax=highest, cmap="viridis", aspect="auto", interpolation="nearest")
            axis.grid(False)
            axis.set_yticks(range(len(kinds)), kinds)
            every = max(1, len(depths) // 8)
            axis.set_xticks(range(0, len(depths), every), ["-" if d < 0 else str(d) for d in depths[::every]])
            if row == 0:
                axis.set_title(run)
            else:
                axis.set_xlabel("block")
        figure.colorbar(image, ax=axes[row], label=label, fraction=0.04, pad=0.02)
    figure.suptitle("Change of each weight at the last step")
    if len(analysis.runs) > MOST_RUNS:
        _note(figure, f"The first {MOST_RUNS} of {len(analysis.runs)} runs; all are in layers.csv.")
    return figure


def spectra_figure(analysis: Analysis) -> Any:
    """Singular values before training, and how far each moved, for the most changed weight of each kind."""
    strongest: dict[str, LayerChange] = {}
    for change in sorted(analysis.changes, key=lambda change: -change.d_sigma):
        strongest.setdefault(change.kind, change)
    modules = [change.module for change in strongest.values()][:MOST_SPECTRA]
    figure = _figure(1.2 + 2.8 * len(modules), 5.4)
    axes = figure.subplots(2, len(modules), squeeze=False, sharex="col")
    for column, module in enumerate(modules):
        values = analysis.spectra[module]
        before = values["pre-trained"]
        index = range(1, len(before) + 1)
        top, bottom = axes[0][column], axes[1][column]
        top.plot(index, before, color="0.35", linewidth=2.5, alpha=0.5, label="pre-trained")
        bottom.axhline(0, color="0.35", linewidth=0.8)
        for run in (run for run in analysis.runs if run in values):
            paint = colour(analysis, run)
            top.plot(index, values[run], color=paint, linewidth=1, label=run)
            moved = [new - old for new, old in zip(values[run], before, strict=True)]
            bottom.plot(index, moved, color=paint, linewidth=1.2)
        _log_scale(top, "y")
        bottom.set_xlabel("index of the singular value")
        top.set_title(_short(module), fontsize=9)
    axes[0][0].set_ylabel(r"$\sigma$  (log scale)")
    axes[1][0].set_ylabel(r"$\sigma_t - \sigma_0$")
    axes[0][0].legend()
    figure.suptitle("Singular values before and after, at the last step: the weight of each kind that changed most")
    return figure


def conditions_figure(analysis: Analysis) -> Any:
    """Condition numbers before and after at the last step: of the merged weights, and of what the adapters train."""
    kinds = list(dict.fromkeys(change.kind for change in analysis.changes))
    panels = {
        r"merged weight, $\sigma_1 / \sigma_n$": ("condition_before", "condition_after"),
        r"trained product $W_p$, $\sigma_1 / \sigma_r$": ("principal_condition_before", "principal_condition_after"),
    }
    known = {
        title: names
        for title, names in panels.items()
        if any(getattr(change, names[1]) is not None for change in analysis.changes)
    }
    figure = _figure(1.5 + 4.6 * len(known), 1.7 + 0.13 * len(kinds) * (len(analysis.runs) + 1))
    axes = figure.subplots(1, len(known), squeeze=False, sharey=True)[0]
    for axis, (title, (before, after)) in zip(axes, known.items(), strict=True):
        for place, kind in enumerate(kinds):
            for offset, run in enumerate(analysis.runs):
                layers = [change for change in analysis.last(run) if change.kind == kind]
                height = place + (offset - (len(analysis.runs) - 1) / 2) * 0.8 / len(analysis.runs)
                old, new = _mean_condition(layers, before), _mean_condition(layers, after)
                paint = colour(analysis, run)
                if old is not None and new is not None:
                    axis.plot([old, new], [height, height], color=paint, linewidth=1.5, alpha=0.6)
                if old is not None:
                    axis.plot([old], [height], "o", color=paint, markerfacecolor="white", markersize=5)
                if new is not None:
                    axis.plot([new], [height], "o", color=paint, markersize=5)
        _log_scale(axis, "x")
        axis.set(xlabel="condition number  (log scale, geometric mean over blocks)", title=title)
    axes[0].set_yticks(range(len(kinds)), kinds)
    axes[0].invert_yaxis()
    handles = [axes[0].plot([], [], "o-", color=colour(analysis, run), label=run)[0] for run in analysis.runs]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    figure.suptitle("Condition numbers at the last step: open circles before, filled circles after training")
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _log_scale(axes: Any, which: str) -> None:
    """Make an axis logarithmic, with plain numbers, and only the decades if there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    ratio = high / low
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 20 else (1, 2, 5) if ratio < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _note(figure: Any, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="0.35")


def _band(analysis: Analysis, run: str, name: str) -> tuple[list[float], list[float]]:
    """10th and 90th percentile over the weights, at each step."""
    by_step: dict[int, list[float]] = {}
    for change in analysis.changes:
        if change.run == run:
            by_step.setdefault(change.step or 0, []).append(getattr(change, name))
    ordered = [sorted(by_step[step]) for step in sorted(by_step)]
    return tuple([values[round(share * (len(values) - 1))] for values in ordered] for share in (0.1, 0.9))  # type: ignore[return-value]


def _mean_condition(layers: list[LayerChange], name: str) -> float | None:
    values = [
        value for value in (getattr(layer, name) for layer in layers) if value is not None and math.isfinite(value)
    ]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _short(module: str) -> str:
    """The last parts of a module's name, from its block on."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] - 1 :] if numbers and numbers[0] else parts[-2:])
