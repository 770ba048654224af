"""What every process of the arithmetic test runs: factors cut anywhere, against the whole factors in float64.

torchrun --nproc_per_node N shares_worker.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import distributed

from sorsa_plugin.regularizer.engines import Share
from sorsa_plugin.regularizer.gaps import all_gaps, deviations

CASES = 60


def cut(rows: int, rank: int, world: int, choose: random.Random) -> list[int]:
    """Boundaries of the processes' parts, anywhere, empty parts included."""
    size = rows * rank
    kind = choose.choice(["anywhere", "one process", "equal"])
    if kind == "one process":
        owner = choose.randrange(world)
        return [0] * (owner + 1) + [size] * (world - owner)
    if kind == "equal":
        part = -(-size // world)
        return [min(size, part * process) for process in range(world + 1)]
    return [0, *sorted(choose.randrange(size + 1) for _ in range(world - 1)), size]


def main() -> None:
    distributed.init_process_group("gloo")
    me, world = distributed.get_rank(), distributed.get_world_size()
    choose, generator = random.Random(0), torch.Generator().manual_seed(0)  # alike on every process
    worst = {"gap": 0.0, "product": 0.0}
    cuts_seen, shared_rows = 0, 0
    for _ in range(CASES):
        shares, wholes, bounds = [], [], []
        shapes = [(choose.randrange(1, 12), choose.choice([1, 3, 4])) for _ in range(choose.randrange(1, 6))]
        for rows, rank in shapes:
            whole = torch.randn(rows, rank, generator=generator)
            initial = torch.randn(rows, rank, generator=generator)
            edges = cut(rows, rank, world, choose)
            start, stop = edges[me], edges[me + 1]
            parts = [(a, b) for a, b in pairwise(edges) if b > a]
            starts = [a for a, _ in parts]
            cuts = tuple(sorted({a // rank for a in starts if a % rank}))
            offset = (whole - initial).flatten()[start:stop].clone()
            shares.append(
                Share(
                    f"{len(shares)}",
                    initial.flatten()[start:stop],
                    offset,
                    torch.zeros(stop - start),
                    rank,
                    None,
                    (distributed.group.WORLD,),
                    start,
                    cuts,
                )
            )
            wholes.append((initial + (whole - initial)).double())
            bounds.append((start, stop))
            cuts_seen += len(cuts)
            shared_rows += sum(sum(a // rank <= row <= (b - 1) // rank for a, b in parts) > 2 for row in cuts)
        exact = [P.T @ P - torch.eye(P.shape[1], dtype=torch.float64) for P in wholes]
        gaps = all_gaps(shares)
        for gap, E in zip(gaps.tolist(), exact, strict=True):
            worst["gap"] = max(worst["gap"], abs(gap - float(E.norm())))
        for batch in deviations(shares):
            batch.add_product_to([share.gradient for share in batch.shares])
        for share, P, E, (start, stop) in zip(shares, wholes, exact, bounds, strict=True):
            error = (share.gradient - (P @ E).flatten()[start:stop]).abs()
            worst["product"] = max([worst["product"], *error.tolist()])
    found: list = [None] * world
    distributed.all_gather_object(found, worst)
    if me == 0:
        report = {name: max(other[name] for other in found) for name in worst}
        report |= {"cuts": cuts_seen, "rows_over_three_processes": shared_rows}
        (Path(sys.argv[1]) / "report.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
