"""The demo: compose a corpus, encode it, train a model on it, attribute, report. No network, no other files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine import jobs, pipeline, progress, train
from attr_engine.cli_options import print_top
from attr_engine.demo.corpus import write_corpus
from attr_engine.generate import generate
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import read_folder
from attr_engine.latents.ingest import ingest_audio
from attr_engine.latents.manifest import MANIFEST
from attr_engine.load import load_job
from attr_engine.models.autoencoder import BLOCK_NAME, Autoencoder, load_autoencoder
from attr_engine.models.stable_audio import CONFIG_NAME, load_model
from attr_engine.models.vocoder import fit_autoencoder
from attr_engine.report.build import TABLES, build_report
from attr_engine.runs import open_run
from attr_engine.score import RIDGE
from attr_engine.settings import UNLEARNING, Settings

SAMPLE_RATE, FRAMES, PATCH = 16000, 188, 4
CONDITION = ("lead", "style", "tempo")


@dataclass(frozen=True)
class Scale:
    """How much the demo does."""

    tracks: int = 256
    steps: int = 2500
    generated: int = 4
    targets: int = 8
    strengths: tuple[float, ...] = (1e-2, 1e-3)
    score_draws: int = 8


FULL = Scale(targets=40, strengths=(1e-2, 1e-4, 1e-3, 3e-2, 1e-1))


def _corpus(audio: Path, scale: Scale) -> None:
    if not (audio / "queries" / "metadata.csv").exists():
        write_corpus(
            audio, tracks=scale.tracks, sample_rate=SAMPLE_RATE, progress=progress.bar("composing", "track")
        )


def _autoencoder(out: Path, source: Path) -> Autoencoder:
    if not (out / BLOCK_NAME).exists():
        clips = read_folder(source, SAMPLE_RATE, 1, progress.bar("reading", "file"))
        fit_autoencoder(clips, SAMPLE_RATE, out)
    return load_autoencoder(out)


def _ingest(source: Path, out: Path, encoder: Autoencoder, kind: str = "") -> LatentDataset:
    if not (out / MANIFEST).exists():
        ingest_audio(
            source, out, encoder, FRAMES, source / "metadata.csv", CONDITION, "error", kind=kind,
            progress=progress.bar(f"encoding {source.name}", "file"),
        )  # fmt: skip
    return LatentDataset(out)


def _train(out: Path, tracks: LatentDataset, encoder: Autoencoder, scale: Scale) -> None:
    if (out / CONFIG_NAME).exists():
        return
    names = ("seconds_total", *CONDITION)
    config = train.diffusion_config(
        encoder, FRAMES, train.conditioning_values(tracks, names, tracks.conditioning)
    )
    train.train_diffusion(
        config, tracks, out, scale.steps, encoder, lr=2e-3, progress=progress.bar("training", "step")
    )


def _generate(out: Path, model_path: Path, tracks: LatentDataset, scale: Scale) -> None:
    if not (out / MANIFEST).exists():
        generate(load_model(model_path), tracks, scale.generated, out, seed=7)


def _targets(tracks: LatentDataset, count: int) -> tuple[str, ...]:
    """Training tracks to unlearn: a quarter of them shorter than 4 s, spread evenly, one of a family at most."""
    order = np.random.default_rng(40).permutation(len(tracks))
    short = [i for i in order if float(tracks.info[i]["seconds"]) < 4.0][: max(1, count // 4)]
    chosen, families = list(short), set[str]()
    for i in order:
        family = str(tracks.info[i].get("family") or tracks.ids[i])
        if len(chosen) < count and i not in chosen and family not in families:
            chosen.append(i)
            families.add(family)
    chosen += [i for i in order if i not in chosen][: count - len(chosen)]
    return tuple(tracks.ids[int(i)] for i in sorted(chosen))


def _say(start: float, text: str) -> None:
    print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)


def run_demo(out: Path, full: bool = False, scale: Scale | None = None) -> Path:
    """Run the demo, or carry on where it was stopped.

    Args:
        out: folder for everything; ``out/run`` (or ``out/run-full``) is the run directory.
        full: 40 self-influence targets and five strengths.
        scale: sizes, for tests.

    Returns:
        Path of the report.
    """
    out = out.resolve()
    scale, start = scale or (FULL if full else Scale()), time.perf_counter()
    _say(start, f"1/6 composing {scale.tracks} tracks and 14 held-out pieces (about 40 s)")
    _corpus(out / "audio", scale)
    _say(start, "2/6 fitting a small autoencoder to them and encoding them (about 40 s)")
    encoder = _autoencoder(out / "autoencoder", out / "audio" / "train")
    tracks = _ingest(out / "audio" / "train", out / "latents", encoder)
    _ingest(out / "audio" / "queries", out / "held-out", encoder, kind="held-out")
    _say(start, f"3/6 training a stable-audio-tools DiT, {scale.steps} steps (about 3 min)")
    _train(out / "model", tracks, encoder, scale)
    _say(start, f"4/6 generating {scale.generated} pieces with the model's own sampler (about 20 s)")
    _generate(out / "generated", out / "model", tracks, scale)
    settings = Settings(
        model=str(out / "model"),
        data=str(out / "latents"),
        queries=(str(out / "generated"), str(out / "held-out")),
        self_influence=_targets(tracks, scale.targets),
        functions=(RIDGE, *UNLEARNING),
        strengths=scale.strengths,
        score_draws=scale.score_draws,
        title="attr_engine demo",
    )
    report = _attribute(out / ("run-full" if full else "run"), settings, start)
    _say(start, f"done; open {report} in a browser")
    return report


def _attribute(folder: Path, settings: Settings, start: float) -> Path:
    with open_run(folder, settings, bars=True) as run:
        job = load_job(run)
        jobs.check(job)
        _say(start, f"5/6 attributing: {jobs.plan_of(job)} (about 3 min)")
        result = pipeline.run_job(job)
        _say(start, "6/6 writing the report")
        report = build_report(
            job, result, subtitle="A corpus composed for the occasion, with known relations"
        )
        pipeline.drop_updates(job)
        print_top(job, result)
        _print_tables(run.path / TABLES)
    return report


def _print_tables(path: Path) -> None:
    for table in json.loads(path.read_text(encoding="utf-8")):
        print(f"\n{table['title']}\n{table['note']}")
        print("  ".join(table["columns"]))
        for row in table["rows"]:
            print(
                "  ".join(
                    "-" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell)
                    for cell in row
                )
            )
