"""``attr-engine rollup``: the scores of a run, added up over groups of tracks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError, printable

_WIDTH = 60  # characters of a group's name that are printed


def add_rollup(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the flags of the command."""
    p = command(commands, "rollup", "add up the scores of a run over recordings, copies, artists, owners", """examples:
  attr-engine rollup run --by artist
  attr-engine rollup run --by track artist --how max sum            # windows to recordings to artists
  attr-engine rollup run --by owner --groups owners.csv --out owners.parquet

Sums of single scores are known to fail for groups: what a group did is found by unlearning it jointly (docs/results.md).
""")  # fmt: skip
    p.add_argument("run", help="run directory, with its scores")
    p.add_argument("--by", nargs="+", required=True, metavar="LEVEL",
                   help="levels from the lowest to the highest: track (windows of one recording), duplicates (exact copies), "
                   "or any column of the metadata or of --groups, such as artist")  # fmt: skip
    p.add_argument("--how", nargs="+", default=["sum"], choices=("sum", "mean", "max", "count"),
                   help="aggregate, one for all levels or one each (default: sum)")  # fmt: skip
    p.add_argument("--groups", default="", metavar="CSV",
                   help="columns: track (id of a track or recording), and one for each level that it gives")  # fmt: skip
    p.add_argument("--data", default="", help="the training tracks (default: where the run found them)")
    p.add_argument("--top", type=int, default=10, help="groups to print a query (default: 10)")
    p.add_argument("--out", default="", metavar="FILE",
                   help="Parquet file, a CSV is put beside it (default: rollup.parquet in the run)")  # fmt: skip


def rollup(args: argparse.Namespace) -> None:
    """Roll up, write and print."""
    from attr_engine import pipeline
    from attr_engine.effectfile import read_effects
    from attr_engine.grouping import make_levels, read_groups
    from attr_engine.latents import LatentDataset
    from attr_engine.result import Attribution
    from attr_engine.rollup import roll_up

    run = Path(args.run)
    out = Path(args.out or run / "rollup.parquet")
    if out.suffix != ".parquet":
        raise UserError(f"--out {out} is not a .parquet file: call it {out.name}.parquet")
    result = Attribution.from_parquet(run / pipeline.SCORES_PARQUET)
    settings = result.meta.get("settings") or {}
    data = LatentDataset(args.data or settings.get("data") or _no_data(run))
    where = {name: i for i, name in enumerate(data.ids)}
    missing = [name for name in result.tracks if name not in where]
    if missing:
        raise UserError(
            f"the track {missing[0]!r} of {run} is not in {data.path}: give the run's own data with --data"
        )
    info = [data.info[where[name]] for name in result.tracks]
    given = read_groups(Path(args.groups)) if args.groups else None
    levels = make_levels(args.by, args.how, result.tracks, info, given)
    effects = run / pipeline.EFFECTS
    per_draw = read_effects(effects) if settings.get("plan") != "track" and effects.exists() else None
    rolled = roll_up(result, levels, per_draw)
    rolled.to_parquet(out)
    rolled.to_csv(out.with_suffix(".csv"))
    for note in rolled.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    function, (_, first) = next(iter(result.values)), result.updates[0]
    last = rolled.levels[-1]
    print(
        printable(
            f"top {args.top} of {len(last.names)} groups by {last.level}: {last.how} of {function} at {first:g}"
        )
    )
    for u, (query, strength) in enumerate(result.updates):
        if strength == first:
            print(printable(query))
            for rank, name, score, error, tracks, unmeasured in rolled.top(args.top, u, function):
                short = name if len(name) <= _WIDTH else name[: _WIDTH - 1] + "…"
                without = f", {unmeasured} not measured" if unmeasured else ""
                print(
                    printable(f"  {rank:2d}. {short}  {score:.4g} +- {error:.2g}  ({tracks} tracks{without})")
                )
    print(f"groups: {out} and .csv")


def _no_data(run: Path) -> str:
    raise UserError(
        f"{run} does not name its training tracks: give --data, a folder made by attr-engine ingest"
    )
