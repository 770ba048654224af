"""Measures what training did to the singular values and vectors of a model's weights, as the paper does.

Reads, decomposes and compares one weight at a time, and keeps numbers alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from statistics import fmean, geometric_mean

import torch
from tqdm.auto import tqdm

from ...errors import ForeignAdapterError, SORSAConfigError
from ...files.json_values import json_values
from ...linalg.spectra import DEGENERATE, Spectrum, condition_number, decompose, delta_direction, delta_sigma
from .trained_weights import BaseWeights, Trained, TrainedWeights, complete_checkpoints, open_trained


@dataclass(frozen=True)
class LayerChange:
    """One weight at one point of one run, compared with the pre-trained weight."""

    run: str
    step: int | None
    """Optimizer step of a checkpoint; None for a single adapter or model."""
    module: str
    out_features: int
    in_features: int
    triplets: int
    """Number of singular triplets compared."""
    d_sigma: float
    """mean |s_t - s_0|, in the units of the weight."""
    d_direction: float
    """1 - mean(|<u_t, u_0>| + |<v_t, v_0>|) / 2, in [0, 1]; `spectra.py` explains signs and equal singular values."""
    relative_change: float
    """||W_t - W_0||_F / ||W_0||_F."""
    condition_before: float
    """s_1 / s_n of the pre-trained weight; infinite if it does not have full rank."""
    condition_after: float
    """The same of the merged weight."""
    principal_condition_before: float | None
    """s_1 / s_r of W_p, the product that the adapter trains, at the start; None if there is no such product."""
    principal_condition_after: float | None
    """The same at this point of the run."""

    @property
    def kind(self) -> str:
        """Last part of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def depth(self) -> int | None:
        """First number in the module's name: the index of its block."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(number[1]) if number else None


@dataclass(frozen=True)
class Summary:
    """One point of one run: means over its weights."""

    run: str
    step: int | None
    layers: int
    d_sigma: float
    d_direction: float
    relative_change: float
    condition_before: float
    """Geometric mean, as for the next three."""
    condition_after: float
    principal_condition_before: float | None
    principal_condition_after: float | None


@dataclass(frozen=True)
class Analysis:
    """What `analyze` measured."""

    base: str
    runs: tuple[str, ...]
    top: int | None
    degenerate: float
    changes: tuple[LayerChange, ...]
    spectra: dict[str, dict[str, list[float]]] = field(repr=False)
    """{module: {"pre-trained" or run: singular values}}, a run's at its last step."""

    def last(self, run: str) -> list[LayerChange]:
        """The changes at a run's last step."""
        points = [change for change in self.changes if change.run == run]
        final = max((change.step or 0) for change in points)
        return [change for change in points if (change.step or 0) == final]

    def summaries(self) -> list[Summary]:
        """Means over the weights, one entry per point of each run, in order."""
        points: dict[tuple[str, int | None], list[LayerChange]] = {}
        for change in self.changes:
            points.setdefault((change.run, change.step), []).append(change)
        order = {run: index for index, run in enumerate(self.runs)}
        keys = sorted(points, key=lambda key: (order[key[0]], key[1] or 0))
        return [_summary(run, step, points[run, step]) for run, step in keys]

    def save(self, directory: str | PathLike[str]) -> None:
        """Write layers.csv, summary.csv and analysis.json (with null for infinite numbers) into a directory."""
        path = Path(directory)
        _write_csv(path / "layers.csv", LayerChange, self.changes)
        _write_csv(path / "summary.csv", Summary, self.summaries())
        content = asdict(self) | {"summary": [asdict(summary) for summary in self.summaries()]}
        text = json.dumps(json_values(content), indent=1, allow_nan=False)
        (path / "analysis.json").write_text(text + "\n", encoding="utf-8")


def analyze(
    base: str | PathLike[str],
    trained: Sequence[str | PathLike[str]] = (),
    *,
    runs: Sequence[str | PathLike[str]] = (),
    modules: str | None = None,
    top: int | None = None,
    degenerate: float = DEGENERATE,
    task_type: str | None = "CAUSAL_LM",
    revision: str | None = None,
    progress: bool = True,
) -> Analysis:
    """Compare trained weights with the pre-trained ones.

    Args:
        base: directory of the pre-trained model, or an id on the hub.
        trained: directories of PEFT adapters of any type, and of fully fine-tuned (or merged) models.
        runs: output directories of training runs. All complete checkpoint-N directories of one are points of one run.
        modules: a regular expression; only modules whose names contain a match are compared. None for all that were
            trained.
        top: compare this many triplets of each weight; None for all.
        degenerate: see `spectra.py`.
        task_type: one of PEFT's, for the class the base was trained as; None for the class that its config names.
        revision: of the base, on the hub.
        progress: show a progress bar.

    Raises:
        BaseFilesError, ForeignAdapterError, IncompleteAdapterError, BaseMismatchError: files cannot be read, or do not
            belong to the base.
        SORSAConfigError: there is nothing to compare, or `degenerate` or `modules` cannot be honoured.
        RankError: top is below 1.
        DecompositionError: a weight holds NaN or infinity.
    """
    if not trained and not runs:
        raise SORSAConfigError("Nothing to compare with the base; give an adapter, a model or a run with checkpoints.")
    if degenerate < 0:
        raise SORSAConfigError(f"degenerate is {degenerate}; expected a number >= 0.")
    start = BaseWeights(base, task_type, revision)
    points = _points(trained, runs, start)
    names = _modules(points, modules)
    changes: list[LayerChange] = []
    spectra: dict[str, dict[str, list[float]]] = {}
    for name in tqdm(names, desc="SORSA: singular values", unit="weight", disable=not progress):
        before = start.read(name).flatten(1)
        spectrum = decompose(before, top, name)
        spectra[name] = {"pre-trained": spectrum.S.tolist()}
        for (run, step), weights in points.items():
            if name in weights.modules:
                read = weights.read(name)
                after = read.weight.flatten(1)
                merged = spectrum if torch.equal(before, after) else decompose(after, top, f"{name} of {run}")
                change = _compare(run, step, name, before, read, spectrum, merged, degenerate)
                changes.append(change)
                spectra[name][run] = merged.S.tolist()
    return Analysis(str(base), tuple(dict.fromkeys(run for run, _ in points)), top, degenerate, tuple(changes), spectra)


def _compare(
    run: str,
    step: int | None,
    module: str,
    before: torch.Tensor,
    read: Trained,
    old: Spectrum,
    new: Spectrum,
    degenerate: float,
) -> LayerChange:
    moved = (read.weight.flatten(1).double() - before.double()).norm() / before.double().norm()
    return LayerChange(
        run=run,
        step=step,
        module=module,
        out_features=before.shape[0],
        in_features=before.shape[1],
        triplets=old.U.shape[1],
        d_sigma=delta_sigma(old, new),
        d_direction=0.0 if old is new else delta_direction(old, new, degenerate),
        relative_change=float(moved),
        condition_before=condition_number(old.S),
        condition_after=condition_number(new.S),
        principal_condition_before=read.principal_before,
        principal_condition_after=read.principal_after,
    )


def _points(
    trained: Sequence[str | PathLike[str]], runs: Sequence[str | PathLike[str]], base: BaseWeights
) -> dict[tuple[str, int | None], TrainedWeights]:
    """Every run and step to compare. A run's name is the shortest end of its path that tells it apart."""
    entries: list[tuple[Path, int | None, Path]] = [(_real(path), None, Path(path)) for path in trained]
    for run in runs:
        entries += [(_real(run), step, path) for step, path in complete_checkpoints(run).items()]
    names = _labels(list(dict.fromkeys(source for source, _, _ in entries)))
    return {(names[source], step): open_trained(path, base) for source, step, path in entries}


def _real(path: str | PathLike[str]) -> Path:
    """Without links; one that leads back to itself stays, and is refused where it is opened."""
    return Path(os.path.realpath(path))


def _labels(paths: list[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that differ. For a checkpoint, its run's name too."""
    more = {path: int(path.name.startswith("checkpoint-")) for path in paths}
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = {path: "/".join(path.parts[-length - more[path] :]) for path in paths}
        if len(set(labels.values())) == len(paths):
            break
    return labels


def _modules(points: dict[tuple[str, int | None], TrainedWeights], pattern: str | None) -> list[str]:
    """The modules of all adapters; those of the models if there are only whole models."""
    adapted = [weights.modules for weights in points.values() if weights.partial]
    found = dict.fromkeys(name for names in adapted or [w.modules for w in points.values()] for name in names)
    try:
        chosen = [name for name in found if pattern is None or re.search(pattern, name)]
    except re.error as error:
        raise SORSAConfigError(f"modules is {pattern!r}, which is no regular expression ({error}).") from error
    if not chosen:
        raise ForeignAdapterError(
            f"No trained module has a name that contains {pattern!r}; there are {', '.join(list(found)[:3])} and so on."
        )
    return chosen


def _summary(run: str, step: int | None, changes: list[LayerChange]) -> Summary:
    def mean_condition(name: str) -> float | None:
        values = [getattr(change, name) for change in changes]
        known = [value for value in values if value is not None]
        if not known:
            return None
        return geometric_mean(known) if all(map(math.isfinite, known)) else math.inf

    return Summary(
        run=run,
        step=step,
        layers=len(changes),
        d_sigma=fmean(change.d_sigma for change in changes),
        d_direction=fmean(change.d_direction for change in changes),
        relative_change=fmean(change.relative_change for change in changes),
        condition_before=mean_condition("condition_before") or math.inf,
        condition_after=mean_condition("condition_after") or math.inf,
        principal_condition_before=mean_condition("principal_condition_before"),
        principal_condition_after=mean_condition("principal_condition_after"),
    )


def _write_csv(path: Path, kind: type, rows: Sequence[object]) -> None:
    names = [entry.name for entry in fields(kind)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
