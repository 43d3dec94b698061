"""``attr-engine grid`` and ``attr-engine figures``: the paper's experiments and its figures."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from attr_engine.cli_index import add_command
from attr_engine.errors import UserError, printable
from attr_engine.grid_settings import CONFIG, Judging, plan_of
from attr_engine.settings import Settings

_PATHS = ("model", "weights", "data", "cache")


def add_grid(commands: Any) -> argparse.ArgumentParser:
    """Add the command; its settings are the caller's to add."""
    p = add_command(commands, "grid", "unlearn training tracks under many settings, and see which of them rank themselves first",
                    """examples:
  attr-engine grid --model model --data latents --layers self_attn transformer --mask-update on off --out grid
  attr-engine grid --model model --data latents --targets 12 --strengths 1e-3 1e-2 1e-1 --damping 0 0.1 --out grid
  attr-engine grid --model model --data latents --self-influence song-1 song-2 --layers cross_attn+self_attn all --pieces 0 --out grid
  attr-engine grid --config grid/grid.json --out again            # replays a grid
  attr-engine figures grid/runs/0123456789ab --out figures        # of one of its runs

Several values of a flag make a cell each (layers joined by + are one group). Stopped at any moment, the same command carries
on. The tables are written anew after every run: table1.md, table1.csv, table1.json.
""")  # fmt: skip
    j = Judging()
    p.add_argument("--out", required=True, help="folder of the grid; the same command carries on there")
    p.add_argument(
        "--config", default="", help=f"{CONFIG} of a grid, or config.json of a run; flags go before it"
    )
    p.add_argument("--order", choices=("best", "grid"), default="best",
                   help="of the table: smallest mean rank first, or as the flags stand (default: best)")  # fmt: skip
    g = p.add_argument_group("how cells are judged")
    for name, kind, text in (
        ("targets", int, "training tracks to unlearn, chosen by k-means; --self-influence names others"),
        ("similar", int, "tracks at either end of a ranking whose similarity is looked at (0: 100, or a quarter of fewer than 400)"),
        ("embedding", str, "latent-statistics (mean and deviation of every channel), a .npy of vectors with ids.json beside it, or "
         "an embedding of audio, such as openl3:checkpoint=FILE"),
        ("pieces", int, "generated pieces a model for the Frechet distance (0: none)"),
        ("piece-targets", int, "after the unlearning of how many targets pieces are generated"),
        ("sampler-steps", int, "of the generated pieces"),
        ("guidance", float, "classifier-free guidance of the generated pieces"),
    ):  # fmt: skip
        default = getattr(j, name.replace("-", "_"))
        g.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    return p


def _from_anywhere(embedding: str) -> str:
    """The name of an embedding, the files in it with their folders."""
    if embedding.endswith(".npy") and "=" not in embedding:
        return str(Path(embedding).resolve())
    return re.sub(r"(?<=[:,])(checkpoint|onnx)=([^,]+)", lambda m: f"{m[1]}={Path(m[2]).resolve()}", embedding)  # fmt: skip


def grid(args: argparse.Namespace) -> None:
    """Run a grid and print its table."""
    from attr_engine import progress
    from attr_engine.grid import Grid
    from attr_engine.grid_table import TABLE
    from attr_engine.load import load_base

    names = {spec.name for spec in (*dataclasses.fields(Settings), *dataclasses.fields(Judging))}
    flags = {name: value for name, value in vars(args).items() if name in names}
    for name in _PATHS:  # a config has to mean the same from any folder
        if flags.get(name):
            flags[name] = str(Path(flags[name]).resolve())
    if "embedding" in flags:
        flags["embedding"] = _from_anywhere(flags["embedding"])
    if "layers" in flags:
        flags["layers"] = [words.split("+") for words in flags["layers"]]
    base, axes, judging = plan_of(Path(args.config) if args.config else None, flags)
    model, tracks = load_base(base)
    made = Grid(model, tracks, base, axes, args.out, judging, args.order)
    cells = len(made.runs) * len(base.strengths) * len(base.functions)
    _say(f"{len(made.runs)} runs, {cells} cells, {len(made.targets)} targets: {', '.join(made.targets)}")
    speed = progress.Speed()

    def say(done: int, total: int, what: str) -> None:
        speed.add(done)
        left = progress.clock_time(speed.seconds_left(total))
        if done < total:
            _say(f"run {done + 1} of {total} ({left} left): {what}")

    rows = made.run(bars=True, say=say)
    print((Path(args.out) / f"{TABLE}.md").read_text(encoding="utf-8"))
    print(f"table: {Path(args.out) / TABLE}.md, .csv and .json")
    failed = {row.run: row.error for row in rows if row.error}
    if failed:
        raise UserError(
            f"{len(failed)} of {len(made.runs)} runs could not be computed, the first one because {next(iter(failed.values()))}"
        )


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)


def add_figures(commands: Any) -> None:
    """Add the command."""
    p = add_command(commands, "figures", "the paper's figures 1 and 2: methods over sorted tracks, and their correlations",
                    """examples:
  attr-engine figures run --out figures
  attr-engine figures run index.parquet other-run --out figures       # further methods, same tracks and queries
  attr-engine figures run --methods "loss_change, 0.01" "raw-latent cosine" --out figures

Figure 1 sorts the tracks of each query by the first method. Both figures are written as PNG and SVG, the numbers of figure 2
as figures.json.
""")  # fmt: skip
    p.add_argument("run", help="run directory, or a Parquet file of scores")
    p.add_argument(
        "more", nargs="*", help="further runs or Parquet files of scores, of the same tracks and queries"
    )
    p.add_argument("--out", required=True, help="folder of the figures")
    p.add_argument("--methods", nargs="+", default=[], metavar="NAME",
                   help="methods by name, the first one sorts (default: all of them)")  # fmt: skip
    p.add_argument(
        "--no-controls",
        action="store_true",
        help="without random, duration, training loss and raw-latent cosine",
    )
    p.add_argument("--data", default="", help="the training tracks (default: where the run found them)")


def figures(args: argparse.Namespace) -> None:
    """Draw both figures."""
    from attr_engine import figures as f

    methods = f.collect(Path(args.run), [Path(x) for x in args.more], not args.no_controls, args.data)
    for path in f.draw(f.chosen(methods, args.methods), Path(args.out)):
        print(path)
