"""Does a race find the top k that exhaustive scoring finds, and at what part of its cost?

    python bench/race.py --demo demo-run --tracks 5000 --work race      5,000 tracks, truth of 256 draws: hours on two cores
    python bench/race.py --demo demo-run --top 10 --draws 64 --work race-demo               the demo's own 256 tracks
    python bench/race.py --model M --data D --queries Q --top 10 --draws 64 --work race-mine   a model of one's own
    python bench/race.py --table bench/results/race.json

Truth are scores from draws that no race has (draws D to 2 D; the race has 0 to D - 1), under the same updates. How far two halves
of the truth agree is the most that can be asked. A second start carries on; ``--truth-draws`` takes less of it. With
``--tracks`` above the demo's 256 a corpus of other families is composed and encoded with the demo's autoencoder. One result a name
(``--name``) stands in bench/results/race.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402 - needs the path

FUNCTIONS = ("displacement", "loss_change")
CHUNK = 16  # draws of the truth in a file


def main() -> int:
    """Measure, write, print."""
    args = _arguments()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    import fisher_report
    import stream_report
    import torch

    torch.set_num_threads(args.threads)
    environment = fisher_report.environment()
    prepare(args)
    if args.prepare:
        truth_of(args)
        return 0
    found = measure(args)
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    result[args.name] = {"environment": environment, "threads": args.threads, **found}
    stream_report.write(result, args.out)
    print(markdown(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo", type=Path, help="folder of the demo, in place of --model, --data, --queries"
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="ids of the queries to use (all)")
    parser.add_argument("--tracks", type=int, default=0, help="training tracks, with the demo (its own 256)")
    parser.add_argument("--top", type=int, default=100, help="k (100)")
    parser.add_argument("--draws", type=int, default=256, help="draws of exhaustive scoring (256)")
    parser.add_argument("--truth-draws", type=int, default=0, help="draws of the truth (as many)")
    parser.add_argument(
        "--share", type=float, default=0.05, help="of exhaustive scoring that a race may take (0.05)"
    )
    parser.add_argument("--work", type=Path, help="folder for data, truth and runs; kept")
    parser.add_argument("--name", default="", help="of the result (that of --work)")
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=FUNCTIONS, help="scores (both)")
    parser.add_argument("--plan", choices=("shared", "track"), default="shared", help="of the draws (shared)")
    parser.add_argument("--compile", choices=("off", "forward"), default="off", help="forward passes (off)")
    parser.add_argument("--prepare", action="store_true", help="data, updates and truth only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "race.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the table of earlier runs, and no more"
    )
    args = parser.parse_args()
    if args.table:
        return args
    if args.demo:
        args.model, args.data = args.demo / "model", args.demo / "latents"
        args.queries = args.queries or args.demo / "held-out"
    if not (args.work and args.model and args.data and args.queries):
        parser.error("give --work, and --demo or --model, --data and --queries")
    args.truth_draws, args.name = args.truth_draws or args.draws, args.name or args.work.name
    if args.draws % CHUNK or args.truth_draws % (2 * CHUNK) or args.truth_draws > args.draws:
        parser.error(
            f"draws must be a multiple of {CHUNK}, those of the truth of {2 * CHUNK}, and no more than --draws"
        )
    return args


def prepare(args: argparse.Namespace) -> None:
    """Compose, encode and add tracks, where more are asked for than the demo has."""
    from attr_engine import LatentDataset, LatentWriter
    from attr_engine.demo.corpus import write_corpus
    from attr_engine.demo.run import SAMPLE_RATE, _ingest
    from attr_engine.models.autoencoder import load_autoencoder

    own = LatentDataset(args.data)
    if not args.demo or args.tracks <= len(own):
        return
    whole = args.work / "all"
    args.data = whole
    if (whole / "manifest.parquet").exists():
        return
    audio, folder = args.work / "audio", args.work / "latents"
    if not (folder / "manifest.parquet").exists():
        write_corpus(audio, seed=1, tracks=args.tracks - len(own), sample_rate=SAMPLE_RATE)
    more = _ingest(audio / "train", folder, load_autoencoder(args.demo / "autoencoder"))
    with LatentWriter(whole, padding=own.padding, extra=own.extra) as writer:
        for tracks in (own, more):
            for i, name in enumerate(tracks.ids):
                one = tracks.batch([i], int(tracks.lengths.max()))
                writer.add(
                    name, one.latents[0, :, : int(one.valid[0])], tracks.conditioning[i], tracks.info[i]
                )


def _job(args: argparse.Namespace, folder: str, **settings: Any) -> Any:
    from attr_engine import LatentDataset, Settings, load_model
    from attr_engine.jobs import Job, make_queries
    from attr_engine.runs import Run

    out = args.work / folder
    out.mkdir(parents=True, exist_ok=True)
    model, tracks = load_model(args.model, compiled=args.compile), LatentDataset(args.data)
    queries = make_queries(tracks, [LatentDataset(args.queries)])
    if args.only:
        queries = tuple(q for q in queries if q.id in args.only)
    return Job(
        Run(out, Settings(rows=16, threads=args.threads, plan=args.plan, **settings)), model, tracks, queries
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Truth, its halves, the races, and as many draws for every track as the race took on the mean."""
    job, truth = truth_of(args)
    rows = []
    for function in args.functions:
        means, draws, seconds = _race(args, job, function)
        values = truth[function]  # [U, N, D]
        half = values.shape[2] // 2
        taken = draws.mean(axis=1)
        for u, query in enumerate(job.queries):
            best = values[u].mean(axis=1)
            even = max(4, int(taken[u]) // 4 * 4)
            rows.append({
                "function": function, "query": query.id,
                "recall": recall(means[u], best, args.top),
                "halves": recall(values[u, :, :half].mean(axis=1), values[u, :, half:].mean(axis=1), args.top),
                "same draws for all": recall(values[u, :, :even].mean(axis=1), values[u, :, even:].mean(axis=1), args.top),
                "draws": float(taken[u]), "share": float(taken[u] / args.draws), "most": int(draws[u].max()),
                "seconds": seconds,
            })  # fmt: skip
    return {
        "tracks": len(job.tracks),
        "top": args.top,
        "draws": args.draws,
        "truth_draws": args.truth_draws,
        "plan": args.plan,
        "rows": rows,
    }


def truth_of(args: argparse.Namespace) -> tuple[Any, dict[str, np.ndarray]]:
    """The job with its updates made, and the truth."""
    from attr_engine.pipeline import fisher_stage, update_stage

    job = _job(args, "run")
    update_stage(job, fisher_stage(job))
    return job, _truth(args, job)


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Part of the k largest of the truth that are among the k largest that were found."""
    return len({*np.argsort(-found, kind="stable")[:k]} & {*np.argsort(-truth, kind="stable")[:k]}) / k


def _truth(args: argparse.Namespace, job: Any) -> dict[str, np.ndarray]:
    """Per-draw scores ``[U, N, D]`` by function, a file a few draws."""
    from attr_engine.effects import Effects
    from attr_engine.score import score_function
    from attr_engine.scoring import Scorer, whole_units

    folder, parts = args.work / "truth", []
    folder.mkdir(exist_ok=True)
    scorer = Scorer(job)
    for first in range(args.draws, args.draws + args.truth_draws, CHUNK):
        path = folder / f"{first}.npz"
        if not path.exists():
            started = time.perf_counter()
            units = [scorer(unit) for unit in whole_units(job, range(first, first + CHUNK))]
            part = path.with_suffix(".part.npz")
            np.savez(
                part, base=np.concatenate([e.base for e in units]),
                un=np.concatenate([e.unlearned for e in units], 1), dis=np.concatenate([e.displacement for e in units], 1),
            )  # fmt: skip
            part.rename(path)
            print(f"truth, draw {first}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        with np.load(path) as kept:
            parts.append(Effects(kept["base"], kept["un"], kept["dis"]))
    return {name: np.concatenate([score_function(name)(e) for e in parts], axis=2) for name in FUNCTIONS}


def _race(args: argparse.Namespace, truth: Any, function: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores ``[U, N]``, draws ``[U, N]`` and seconds of a race under the truth's updates."""
    from attr_engine.race import Tally
    from attr_engine.scoring import score_stage

    job = _job(
        args,
        f"race-{function}",
        functions=(function,),
        top=args.top,
        score_draws=args.draws,
        race_share=args.share,
    )
    (job.run.path / "updates").mkdir(exist_ok=True)
    for query in job.queries:
        path, strength = job.update_path(query, job.run.settings.strengths[0]), job.run.settings.strengths[0]
        if not path.exists():
            path.hardlink_to(truth.update_path(query, strength))
    started = time.perf_counter()
    parts = score_stage(job)
    tally = Tally.of(parts, function, job.updates, len(job.tracks), job.run.settings.replicates)
    scores = np.stack([tally.adjusted(u, args.top)[0] for u in range(job.updates)])
    return scores, tally.draws, time.perf_counter() - started


def markdown(result: dict[str, Any]) -> str:
    """All results as a table, and the criterion."""
    lines = [
        "| tracks, k | score | query | draws a track (share) | recall@k | two halves of the truth | same draws for all |",
        "|---|---|---|---|---|---|---|",
    ]
    said = []
    for name, case in result.items():
        for row in case["rows"]:
            lines.append(
                f"| {name}: {case['tracks']}, {case['top']} | {row['function']} | {row['query']} | {row['draws']:.1f} "
                f"({row['share']:.3f}) | {row['recall']:.2f} | {row['halves']:.2f} | {row['same draws for all']:.2f} |"
            )
        for function in dict.fromkeys(r["function"] for r in case["rows"]):
            some = [r for r in case["rows"] if r["function"] == function]
            found, ceiling = (float(np.mean([r[k] for r in some])) for k in ("recall", "halves"))
            bar = 0.95 if ceiling >= 0.95 else 0.98 * ceiling
            said.append(
                f"* {name}, {function}: recall@{case['top']} {found:.3f}, asked {bar:.3f} (halves of the truth agree by {ceiling:.3f}): "
                f"{'met' if found >= bar else 'NOT met'}. Truth: {case['truth_draws']} draws that no race has; plan {case['plan']}."
            )
    return "\n".join([*lines, "", *said])


if __name__ == "__main__":
    sys.exit(main())
