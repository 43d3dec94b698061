"""The command line: it parses, calls and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_engine import (
    cli_compare,
    cli_curves,
    cli_forget,
    cli_grid,
    cli_judge,
    cli_listening,
    cli_musicgen,
    cli_options,
    cli_robustness,
    cli_rollup,
)
from attr_engine.errors import UserError, printable

if TYPE_CHECKING:
    from attr_engine.fisher import Fisher
    from attr_engine.latents.ingest import Report
    from attr_engine.result import Attribution
    from attr_engine.settings import Settings


def _ingest(args: argparse.Namespace) -> None:
    from attr_engine import progress
    from attr_engine.latents import convert

    source, out = Path(args.source), Path(args.out)
    kind = convert.guess_kind(source) if args.kind == "auto" else args.kind
    metadata = Path(args.metadata) if args.metadata else None
    common: dict[str, Any] = {"condition": args.condition, "workers": args.workers, "append": args.append}
    if kind in ("pre-encoded", "webdataset") and metadata is not None:
        raise UserError(f"--metadata is for audio and arrays, a {kind} source has its own: leave it out")
    if kind == "audio":
        report = _ingest_audio(args, source, out, metadata, common)
    elif kind == "arrays":
        report = convert.ingest_arrays(source, out, metadata, scale=args.scale, dtype=args.store_dtype,
                                       progress=progress.bar("reading", "array"), **common)  # fmt: skip
    else:
        take, unit = (
            (convert.ingest_webdataset, "MB")
            if kind == "webdataset"
            else (convert.ingest_pre_encoded, "file")
        )
        report = take(source, out, scale=args.scale, dtype=args.store_dtype, progress=progress.bar("reading", unit),
                      **common)  # fmt: skip
    for note in report.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    there = f", {report.there} were there already" if report.there else ""
    print(f"{report.tracks} tracks written to {out}{there}")


def _ingest_audio(
    args: argparse.Namespace, source: Path, out: Path, metadata: Path | None, common: dict[str, Any]
) -> Report:
    from attr_engine import progress
    from attr_engine.latents import ingest
    from attr_engine.models import musicgen
    from attr_engine.models.autoencoder import load_autoencoder

    if not args.autoencoder:
        raise UserError(
            "audio needs an autoencoder: give --autoencoder, a model folder or an autoencoder folder"
        )
    if args.scale != 1:
        raise UserError("--scale is for latents that exist, an autoencoder has its own: leave it out")
    encoder: ingest.Encoder
    if musicgen.is_musicgen(Path(args.autoencoder)):
        encoder = musicgen.load_musicgen(args.autoencoder).encoder
    else:
        encoder = load_autoencoder(args.autoencoder, args.weights or None)
    if not encoder.samples_per_frame / encoder.sample_rate <= args.seconds < math.inf:
        raise UserError(
            f"--seconds {args.seconds} is less than one latent frame, or endless: use another length"
        )
    frames = int(args.seconds * encoder.sample_rate) // encoder.samples_per_frame
    return ingest.ingest_audio(
        source, out, encoder, frames, metadata, long=args.long, hop=args.hop or None,
        dtype=args.store_dtype or "float32", progress=progress.bar("encoding", "file"), **common,
    )  # fmt: skip


def _shards(args: argparse.Namespace) -> None:
    from attr_engine import progress
    from attr_engine.latents import check

    folder = Path(args.data)
    if (args.drop and args.action != "repair") or (args.json and args.action == "repair"):
        raise UserError(
            f"{'--drop' if args.drop else '--json'} means nothing to shards {args.action}: leave it out"
        )
    if args.action == "info":
        found = check.info(folder)
        print(json.dumps(found, indent=2) if args.json else printable_table(found))
    elif args.action == "repair":
        for sentence in check.repair(folder, args.drop, progress.bar("checking", "shard")):
            print(printable(sentence))
    else:
        verdict = check.verify(folder, progress.bar("checking", "shard"))
        if args.json:
            print(verdict.to_json())
        else:
            for finding in verdict.findings:
                print(printable(f"{finding.kind}: {finding.file}: {finding.sentence}"))
        summary = f"{verdict.tracks} tracks in {verdict.shards} shards, {verdict.bytes / 1e9:.3f} GB"
        if verdict.harmful:
            raise UserError(f"{folder}: {len(verdict.harmful)} of {summary} are not right: see the list")
        print(f"{summary}: every byte is as it was written", file=sys.stderr if args.json else sys.stdout)


def printable_table(values: dict[str, Any]) -> str:
    """Names and values, a line each."""
    return "\n".join(printable(f"{name:22s}{value}") for name, value in values.items())


def _train(args: argparse.Namespace) -> None:
    from attr_engine import progress, train
    from attr_engine.latents import LatentDataset
    from attr_engine.latents.audio import read_folder
    from attr_engine.models.autoencoder import BLOCK_NAME, load_autoencoder
    from attr_engine.models.stable_audio import CONFIG_NAME
    from attr_engine.models.vocoder import fit_autoencoder

    out = Path(args.out)
    if (out / (BLOCK_NAME if args.what == "autoencoder" else CONFIG_NAME)).exists():
        raise UserError(f"{out} already holds a trained model: use it, or choose another --out")
    if args.sample_rate < 1 or args.patch < 1:
        raise UserError(
            f"the sample rate {args.sample_rate} and the patch {args.patch} must be at least 1: use the defaults"
        )
    if args.what == "autoencoder":
        clips = read_folder(Path(args.source), args.sample_rate, 1, progress.bar("reading", "file"))
        made = fit_autoencoder(clips, args.sample_rate, out, args.hop)
        print(
            f"written to {out}: {made['frames_per_second']:g} frames a second of {made['channels']:g} channels"
        )
    else:
        tracks = LatentDataset(args.source)
        autoencoder = load_autoencoder(args.autoencoder) if args.autoencoder else None
        if args.config:
            config = train.read_config(Path(args.config))
        elif autoencoder is not None:
            patch = args.patch
            frames = args.frames or -(-int(tracks.lengths.max()) // patch) * patch
            values = train.conditioning_values(tracks, args.condition, tracks.conditioning)
            config = train.diffusion_config(
                autoencoder, frames, values, args.width, args.depth, patch, args.objective
            )
        else:
            raise UserError("a diffusion model needs --autoencoder (a config is made for it) or --config")
        loss = train.train_diffusion(
            config,
            tracks,
            out,
            args.steps,
            autoencoder,
            args.batch,
            args.lr,
            args.seed,
            progress.bar("training", "step"),
        )
        print(f"written to {out}; mean loss of the last tenth of {args.steps} steps: {loss:.4f}")


def _generate(args: argparse.Namespace) -> None:
    from attr_engine.generate import generate
    from attr_engine.latents import LatentDataset
    from attr_engine.models.stable_audio import load_model

    model = load_model(args.model, args.weights or None, device=args.device)
    generate(
        model, LatentDataset(args.data), args.count, Path(args.out), args.seed, args.steps, args.guidance
    )
    print(f"{args.count} pieces written to {args.out}, their audio to {Path(args.out) / 'audio'}")


def _index(args: argparse.Namespace) -> None:
    from attr_engine.index import IndexSettings, build_index
    from attr_engine.index_recall import sentences
    from attr_engine.latents import LatentDataset
    from attr_engine.load import open_model
    from attr_engine.units import rank

    settings = IndexSettings(
        tuple(args.layers), args.function, args.draws, args.averaging, args.projection, args.rank, args.width,
        args.ridge, args.normalised, numbers=args.numbers, seed=args.seed, rows=args.rows,
    )  # fmt: skip
    settings.check()
    model = open_model(args.model, args.weights, args.dtype, args.device)
    index = build_index(model, LatentDataset(args.data), args.out, settings)
    if rank() == 0:
        tracks, width = index.features.shape
        print(f"{tracks} tracks of {width} numbers ({index.features.nbytes / 1e6:.3g} MB) in {args.out}")
        recall = index.meta.get("recall")
        print(
            "\n".join(sentences(recall, settings.numbers))
            if recall
            else "its recall was not measured when it was built"
        )


def _search(args: argparse.Namespace) -> None:
    from attr_engine.index import Index
    from attr_engine.latents import LatentDataset
    from attr_engine.load import open_model

    index, queries = Index.open(args.index), LatentDataset(args.queries)
    model = open_model(args.model, args.weights, args.dtype, args.device)
    result = index.attribute(model, queries)
    for query in queries.ids:
        print(printable(query))
        for row in result.top(args.top, query):
            print(printable(f"  {row.rank:2d}. {row.track}  {row.score:.4g}"))
    if args.out:
        result.to_parquet(Path(args.out))
        print(f"scores: {args.out}")
    if args.against:
        _print_recall(args, result)


def _print_recall(args: argparse.Namespace, found: Attribution) -> None:
    """How many of the best tracks of an exhaustive run are among the best of an index."""
    import numpy as np

    from attr_engine.index import Index
    from attr_engine.index_recall import recall_against
    from attr_engine.result import Attribution

    index, queries = Index.open(args.index), list(dict.fromkeys(name for name, _ in found.updates))
    best = np.stack([found.order("index", u)[: args.within] for u in range(len(queries))])
    run = Attribution.from_parquet(Path(args.against) / "scores.parquet")
    for function in run.values:
        for k in (k for k in (1, 10, 50) if k <= len(found.tracks)):
            part = recall_against(index, best, queries, run, k, function)
            print(
                f"of the best {k} by {function} in {args.against}, {part.mean():.3f} are among the best {best.shape[1]} of the index "
                f"(worst query {part.min():.3f})"
            )


def _run(args: argparse.Namespace) -> None:
    """``fisher``, ``unlearn``, ``score``, ``attribute`` and ``report``: how far to go in a run directory."""
    from attr_engine import jobs, pipeline
    from attr_engine.load import load_job
    from attr_engine.report.build import build_report
    from attr_engine.runs import open_run
    from attr_engine.units import rank

    settings, out = cli_options.settings_of(args), Path(args.out)
    first = rank() == 0  # of several processes one speaks for all
    if getattr(args, "dry_run", None):
        return _dry_run(args, settings, first)
    if cli_listening.wanted(args):
        return cli_listening.write(args, settings)
    with open_run(out, settings, bars=True) as run:
        job = load_job(run)
        pipeline.check_all(job)
        if first:
            print(jobs.plan_of(job), file=sys.stderr)
        if args.command == "fisher":
            fisher = pipeline.fisher_stage(job)
            if first:
                _print_fisher(fisher, out / pipeline.FISHER)
            return
        if args.command == "unlearn":
            pipeline.update_stage(job, pipeline.fisher_stage(job))
            if first:
                print(f"{len(job.queries) * len(settings.strengths)} updates in {out / 'updates'}")
                cli_options.print_sizes(pipeline.sizes(job))
            return
        result = pipeline.run_job(job)
        if not first:
            return
        cli_options.print_top(job, result)
        print(f"scores: {out / pipeline.SCORES_PARQUET} and .csv")
        if args.command == "score":
            return
        if not settings.groups:  # a report is of single tracks
            print(f"report: {build_report(job, result)}")
        pipeline.drop_updates(job)


def _dry_run(args: argparse.Namespace, settings: Settings, first: bool) -> None:
    from attr_engine.estimate import STAGES, estimate, mirrored
    from attr_engine.load import load_job

    until = STAGES.index(args.command) + 1 if args.command in ("fisher", "unlearn") else len(STAGES)
    with mirrored(args.out, settings, bars=True) as run:
        found = estimate(load_job(run), STAGES[:until])
    if first:
        print(json.dumps(found.to_json()) if args.dry_run == "json" else found.text())


def _print_fisher(fisher: Fisher, path: Path) -> None:
    print(f"Fisher of {fisher.pairs} (track, draw) pairs, mean {fisher.mean():.4g}: {path}")
    if fisher.unused:
        print(f"note: the prediction does not use {', '.join(fisher.unused)}; their Fisher is exactly 0")


def _demo(args: argparse.Namespace) -> None:
    from attr_engine.demo.run import run_demo

    run_demo(Path(args.out), full=args.full)


def _doctor(args: argparse.Namespace) -> None:
    from attr_engine.doctor import examine

    del args
    print(examine())


_COMMANDS: dict[str, Any] = {
    "ingest": _ingest, "shards": _shards, "train": _train, "generate": _generate, "index": _index, "search": _search,
    "fisher": _run, "unlearn": _run,
    "score": _run, "attribute": _run, "report": _run, "rollup": cli_rollup.rollup,
    "retrain": cli_judge.retrain, "evaluate": cli_judge.evaluate, "grid": cli_grid.grid, "figures": cli_grid.figures,
    "robustness": cli_robustness.robustness, "compare": cli_compare.compare,
    "listening": cli_listening.listening,
    "curves": cli_curves.curves,
    "musicgen-forget": cli_musicgen.musicgen_forget,
    "forget": cli_forget.forget,
    "demo": _demo, "doctor": _doctor,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``attr-engine``.

    Returns:
        0; 2 for what the user can put right (one sentence on standard error); 130 when interrupted, 143 when
        terminated (SIGTERM).
    """
    args = cli_options.parser().parse_args(argv)
    if args.log_level is not None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("attr_engine").setLevel(args.log_level)
    try:
        with _terminable():
            _COMMANDS[args.command](args)
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:  # a full disk, a folder without permission, a file that went away
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except _Terminated:
        return _fail("terminated; the same command carries on", 143)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command carries on", 130)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would have been."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, for as long as the block runs."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    from attr_engine import progress

    progress.close_all()
    print(f"attr-engine: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
