"""``attr-engine retrain`` and ``attr-engine evaluate``: models trained again, and what they say about scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attr_engine.errors import UserError

if TYPE_CHECKING:
    from attr_engine.counterfactuals import Truth
    from attr_engine.evaluation import Case
    from attr_engine.jobs import Query
    from attr_engine.models.stable_audio import StableAudioDenoiser
    from attr_engine.report.data import Table
    from attr_engine.result import Attribution

_STEPS = 600


def add_judges(commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both commands."""
    _add_retrain(commands, command)
    _add_evaluate(commands, command)


def _add_retrain(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]
) -> None:
    p = command(commands, "retrain", "train models again on parts of the data: the truth that attributions are judged by", """examples:
  attr-engine retrain --model model --data latents --queries held-out generated --out retrained
  attr-engine retrain ... --leave-out family artist --out retrained          # one group left out at a time
  attr-engine retrain ... --remove run/scores.parquet --out retrained        # without the top 10 of a method
  attr-engine evaluate run --retrained retrained

Models are kept: later calls train what is missing, and measure the losses of new queries without training. Stopped at any
moment, the same command carries on.
""")  # fmt: skip
    p.add_argument("--model", required=True, help="model folder; its config is used, not its weights")
    p.add_argument("--data", required=True, help="training tracks: a folder made by attr-engine ingest")
    p.add_argument(
        "--queries", nargs="+", required=True, metavar="FOLDER", help="data sets whose losses are measured"
    )
    p.add_argument("--out", required=True, help="folder for models and losses")
    p.add_argument("--subsets", type=int, default=32, help="random halves of the tracks (default: 32)")
    p.add_argument(
        "--seeds", type=int, default=2, help="trainings of each; two tell the noise ceiling (default: 2)"
    )
    p.add_argument("--leave-out", nargs="+", default=[], metavar="COLUMN",
                   help="columns of the metadata, such as family or artist: train without each of the largest groups")  # fmt: skip
    p.add_argument(
        "--groups", type=int, default=4, help="groups of each column that are left out (default: 4)"
    )
    p.add_argument("--remove", nargs="+", default=[], metavar="[NAME=]FILE",
                   help="tables of scores (scores.parquet): train without the top --k of each for each of --removals queries, and "
                   "without random tracks")  # fmt: skip
    p.add_argument("--k", type=int, default=10, help="tracks that a removal leaves out (default: 10)")
    p.add_argument(
        "--removals", type=int, default=6, help="queries with removals, spread over all (default: 6)"
    )
    p.add_argument(
        "--removal-seeds", type=int, metavar="N", help="trainings of each removal (default: as --seeds)"
    )
    p.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="times the steps of a training: 2 takes twice as long (default: 1)",
    )
    p.add_argument(
        "--steps", type=int, default=_STEPS, help=f"optimiser steps of a training (default: {_STEPS})"
    )
    p.add_argument("--batch", type=int, default=16, help="tracks a step (default: 16)")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    p.add_argument(
        "--draws", type=int, default=32, help="draws that the loss of a query is the mean of (default: 32)"
    )
    p.add_argument("--workers", type=int, default=0, help="processes, one thread each (default: the cores)")


def retrain(args: argparse.Namespace) -> None:
    """Train what is missing, measure, and write the table."""
    from attr_engine import counterfactuals as c
    from attr_engine import progress
    from attr_engine.judge import LEAST_MODELS
    from attr_engine.latents import LatentDataset
    from attr_engine.retrain import Recipe, Retrainer, default_workers, train_all

    out, steps = Path(args.out), round(args.steps * args.scale)
    queries = [str(Path(q).resolve()) for q in args.queries]
    removal_seeds = args.seeds if args.removal_seeds is None else args.removal_seeds
    if removal_seeds > args.seeds:
        raise UserError(
            f"--removal-seeds {removal_seeds} is above --seeds {args.seeds}: a removal is compared with a training of its own seed"
        )
    if (
        min(args.subsets, args.seeds, removal_seeds, args.groups, args.removals, args.draws, args.k) < 1
        or steps < 1
    ):
        raise UserError(
            "--subsets, --seeds, --removal-seeds, --groups, --removals, --draws, --k and --steps must be at least 1"
        )
    tables = named_tables(args.remove)
    recipe = Recipe(
        str(Path(args.model).resolve()), str(Path(args.data).resolve()), steps, args.batch, args.lr
    )
    retrainer = Retrainer(recipe, out)
    models = c.halves(len(retrainer.tracks), args.subsets, args.seeds)
    if args.leave_out or tables:
        models += c.whole(args.seeds)
    for column in args.leave_out:
        models += c.without_groups(retrainer.tracks, column, args.groups, args.seeds)
    if tables:
        names = [name for path in queries for name in LatentDataset(path).ids]
        asked = [name for name in names if all(any(name == q for q, _ in t.updates) for t in tables.values())]
        if not asked:
            raise UserError(
                "no query of --queries is in every table of --remove: score the same queries by each method"
            )
        step = max(1, len(asked) // args.removals)
        models += c.removals(tables, asked[::step][: args.removals], args.k, removal_seeds, retrainer.tracks)
    trainings = list(dict.fromkeys(m.training for m in models))
    show = progress.bar("training models again", "model")
    there = sum(retrainer.path(t).exists() for t in trainings)
    print(f"{len(trainings)} models of {steps} steps, {there} of them there", file=sys.stderr)
    if args.subsets < LEAST_MODELS:
        print(f"note: an LDS needs --subsets {LEAST_MODELS} or more", file=sys.stderr)
    for done in train_all(retrainer, trainings, queries, args.draws, args.workers or default_workers()):
        show(done, len(trainings))
    truth = c.truth_of(retrainer, models, queries, args.draws)
    gone = c.dropped(out, truth)
    if gone:
        print(
            f"note: the table no longer has {gone[0]!r}{f' and {len(gone) - 1} more' * (len(gone) > 1)}: it is of this call; the models "
            "are kept, so ask for everything together to have it again",
            file=sys.stderr,
        )
    truth.save(out)
    _print_ceiling(truth)
    print(f"losses of {len(truth.queries)} queries under {len(models)} models: {out / c.LOSSES_FILE}")


def _print_ceiling(truth: Truth) -> None:
    from attr_engine import judge

    kept, losses = truth.halves()
    if len(losses) > 1 and len(kept) > 2:
        top = judge.ceiling(losses)
        print(f"noise ceiling of the LDS over {len(kept)} halves: another seed {judge.bootstrap(top.seeds)}, "
              f"attainable {judge.bootstrap(top.attainable)}")  # fmt: skip


def named_tables(given: Sequence[str]) -> dict[str, Attribution]:
    """Tables of scores by name: ``NAME=FILE``, or a file or run directory, whose name is that of its folder."""
    from attr_engine.pipeline import SCORES_PARQUET
    from attr_engine.result import Attribution

    found: dict[str, Attribution] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        file = Path(path) / SCORES_PARQUET if Path(path).is_dir() else Path(path)
        name = name or (file.resolve().parent.name if file.name == SCORES_PARQUET else file.stem)
        if name in found:
            raise UserError(f"two tables of scores are called {name!r}: name them, NAME=FILE")
        found[name] = Attribution.from_parquet(file)
    return found


def _add_evaluate(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]
) -> None:
    p = command(commands, "evaluate", "judge scores: rank of itself, planted relations, collapse, and retraining", """examples:
  attr-engine evaluate run
  attr-engine evaluate run --retrained retrained
  attr-engine evaluate run other=scores-of-another-method.parquet --retrained retrained --where part=judge

The first method is compared with all others, query by query. Every table has 95 % bootstrap intervals over queries (rates:
Wilson) and the controls: random, duration only, training loss only, cosine of the raw latents.
""")  # fmt: skip
    p.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="run directories, or tables of scores over the same tracks and queries",
    )
    p.add_argument("--retrained", default="", metavar="FOLDER", help="what attr-engine retrain wrote")
    p.add_argument("--model", default="", help="model folder (default: that of the first run)")
    p.add_argument("--data", default="", help="training tracks (default: those of the first run)")
    p.add_argument(
        "--queries", nargs="+", default=[], metavar="FOLDER", help="queries (default: those of the first run)"
    )
    p.add_argument(
        "--where",
        default="",
        metavar="COLUMN=VALUE",
        help="only queries whose metadata say so, and training tracks",
    )
    p.add_argument(
        "--out", default="", help="folder for evaluation.json and evaluation.md (default: the first run)"
    )
    p.add_argument("--tail-patch", type=int, default=None, metavar="K",
                   help="also take one training step on each of the top K tracks of every query and method, and see whether the query's "
                   "loss falls (default: off)")  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    """Judge, print and write."""
    from attr_engine.counterfactuals import Truth
    from attr_engine.evaluation import tables
    from attr_engine.files import write_json, write_text
    from attr_engine.report.tables import markdown

    out = Path(args.out or args.runs[0].rpartition("=")[2])
    if not out.is_dir() and not args.out:
        raise UserError(f"{out} is no folder: say with --out where evaluation.json is to be written")
    case, model = _case(args)
    truth = Truth.open(Path(args.retrained)) if args.retrained else None
    found: list[Table] = tables(case, truth)
    if args.tail_patch is not None:
        from attr_engine import progress, tailpatch

        found.append(
            tailpatch.tail_table(case, model, args.tail_patch, progress=progress.bar("tail patch", "track"))
        )
    text = markdown(found)
    write_json(out / "evaluation.json", [vars(t) for t in found])
    write_text(out / "evaluation.md", text)
    print(text)
    print(f"written: {out / 'evaluation.md'} and .json")


def only_where(queries: Sequence[Query], where: str) -> list[Query]:
    """Queries whose metadata say ``COLUMN=VALUE``, and training tracks; all of them where nothing is asked."""
    column, _, value = where.partition("=")
    return [
        q for q in queries
        if not column or q.kind == "training track" or str(q.tracks.info[q.index].get(column)) == value
    ]  # fmt: skip


def _case(args: argparse.Namespace) -> tuple[Case, StableAudioDenoiser]:
    """Scores of all methods for the queries that all of them have, with the controls; and the model."""
    import numpy as np

    from attr_engine.evaluation import Case, with_controls
    from attr_engine.jobs import make_queries
    from attr_engine.latents import LatentDataset
    from attr_engine.models.stable_audio import load_model

    given = named_tables(args.runs)
    first = next(iter(given.values()))
    settings = first.meta.get("settings") or {}
    paths = {"model": args.model or settings.get("model"), "data": args.data or settings.get("data")}
    for flag, path in paths.items():
        if not path:
            raise UserError(f"the first table does not name its {flag}: give --{flag}")
    tracks = LatentDataset(str(paths["data"]))
    if list(tracks.ids) != list(first.tracks):
        raise UserError(f"{paths['data']} does not hold the tracks of the first table: give them with --data")
    sets = [LatentDataset(q) for q in args.queries or settings.get("queries") or ()]
    asked = set.intersection(*({name for name, _ in table.updates} for table in given.values()))
    own = [name for name in tracks.ids if name in asked]
    queries = [q for q in only_where(make_queries(tracks, sets, own), args.where) if q.id in asked]
    methods: dict[str, np.ndarray] = {}
    for name, table in given.items():
        if list(table.tracks) != list(first.tracks):
            raise UserError(f"{name} is of other tracks than the first table: score the same data")
        strengths = list(dict.fromkeys(x for _, x in table.updates))
        for function in table.values:
            for x in strengths:
                label = function + (f" at {x:g}" if len(strengths) > 1 else "")
                rows = np.stack([-table.ranks(function, table.row(q.id, x)) if table.stage is not None
                                 else table.values[function][table.row(q.id, x)] for q in queries])  # fmt: skip
                methods[label if len(given) == 1 else f"{name}: {label}"] = np.asarray(rows, dtype=np.float64)
    if not queries:
        raise UserError("no query is left to be judged: check --queries and --where")
    model = load_model(str(paths["model"]))
    return with_controls(Case(tracks, queries, methods), first.base, model.frames), model
