"""A realistic report of sine sweeps, for the tests and for looking at.

``python tests/report/conftest.py report.html [queries [rows]]`` writes it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attr_engine.report import (
    Clip,
    QuerySection,
    Ranking,
    ReportData,
    Row,
    Table,
    TrackInfo,
    encode_clip,
    shares,
    waveform_peaks,
    write_report,
)

RATE = 22050
RELATIONS = ("", "transposed", "", "exact copy", "", "stretched", "", "", "spliced", "")
RANKINGS = (
    ("displacement", "relative size 0.01", False),
    ("loss_change", "relative size 0.01", False),
    ("skew", "relative size 0.01", False),
    ("raw-latent cosine", "", True),
    ("duration", "", True),
    ("random", "", True),
)


def sweep(low: float, high: float, seconds: float, seed: int) -> np.ndarray:
    """Return [2, samples] float32: a sweep from low to high Hz under a slowly moving envelope."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * (low * time + (high - low) * time**2 / (2 * seconds))
    knots = rng.uniform(0.08, 0.9, 24)
    envelope = np.interp(time, np.linspace(0, seconds, 24), knots) * (0.6 + 0.4 * np.cos(8 * time) ** 4)
    return np.stack([np.sin(phase) * envelope, np.cos(phase) * envelope]).astype(np.float32)


def make_clip(seed: int, seconds: float = 4.0) -> Clip:
    audio = sweep(110.0 + 30 * seed, 440.0 + 70 * seed, seconds, seed)
    mime, data = encode_clip(audio, RATE)
    return Clip(mime, data, waveform_peaks(audio, 300))


def make_ranking(kind: tuple[str, str, bool], ids: list[str], rows: int, seed: int) -> Ranking:
    """Rank the tracks by made-up scores; the fourth row has no standard error and the fifth no curve."""
    name, strength, is_control = kind
    rng = np.random.default_rng(seed)
    scores = rng.gamma(0.6, 1.0, len(ids)) * 1e-6
    if name == "loss_change":
        scores -= scores.mean()
    if is_control:
        scores = rng.uniform(0.5, 0.99, len(ids))
    parts = shares(scores)
    top = np.argsort(-scores)[:rows]
    frames = np.linspace(0, 1, 215)
    listed = []
    for place, track in enumerate(top):
        hump = np.exp(-(((frames - rng.uniform(0.1, 0.9)) / 0.08) ** 2))
        curve = scores[track] * (hump + 0.12 * np.cumsum(rng.normal(size=215)) / 8)
        error = (
            None if place == 3 or name == "duration" else float(abs(scores[track]) * rng.uniform(0.02, 0.15))
        )
        hit = "" if is_control else RELATIONS[place % len(RELATIONS)]
        drawn = None if is_control or place == 4 else curve
        listed.append(
            Row(ids[track], place + 1, float(scores[track]), error, float(parts[track]), hit, drawn)
        )
    rest = 1.0 - sum(row.share for row in listed)
    return Ranking(name, strength, is_control, listed, "excess-over-median", rest, len(ids))


def make_track(number: int, clip: Clip | None) -> TrackInfo:
    window = number % 7 == 2
    return TrackInfo(
        id=f"fma-{104200 + 17 * number:06d}" + (f"@{30 * (number % 4)}s" if window else ""),
        title=("Nocturne in D", "Harbour Lights", "Slow Circuit", "Étude no. 4", "")[number % 5],
        artist=("Mara Lindqvist", "The Quiet Engines", "佐藤 健", "", "Orchestre du Nord")[number % 5],
        licence=("CC BY 4.0", "CC BY-NC-SA 4.0", "CC0 1.0")[number % 3],
        seconds=4.0,
        source=f"/data/fma/fma_small/{number:03d}/{104200 + 17 * number:06d}.mp3",
        start=30.0 * (number % 4),
        parent=f"fma-{104200 + 17 * number:06d}" if window else "",
        clip=clip,
    )


def make_report(queries: int = 3, rows: int = 10, tracks: int = 40) -> ReportData:
    """Return a whole report; track 5 has no audio."""
    clips = [None if number == 5 else make_clip(number) for number in range(tracks)]
    infos = [make_track(number, clip) for number, clip in enumerate(clips)]
    ids = [info.id for info in infos]
    kinds = ("generated", "held-out", "training track")
    sections = [
        QuerySection(
            TrackInfo(
                f"query-{q:02d}",
                f"warm analogue pads over a slow pulse, take {q + 1}",
                seconds=4.0,
                source=f"generated/seed-{q}.wav",
                clip=make_clip(100 + q),
            ),
            kinds[q % 3],
            [make_ranking(kind, ids, rows, 100 * q + r) for r, kind in enumerate(RANKINGS)],
            ["planted relatives found: 4 of 6 in the top 10", "precision of the scores: float32"],
        )
        for q in range(queries)
    ]
    results: list[list[str | float | int | None]] = [
        ["displacement", "relative size 0.01", 0.9213, 0.0174, 1],
        ["loss_change", "relative size 0.01", 0.7622, 0.0391, 3],
        ["raw-latent cosine (control)", "", 0.9981, 0.0009, None],
        ["random (control)", "", 0.0312, 0.0102, 20],
    ]
    return ReportData(
        title="Attribution of three generated pieces",
        subtitle="Stable Audio Open 1.0, unlearned one query at a time; 40 tracks of fma_small",
        summary=[
            ("Model", "stable-audio-open-1.0"),
            ("Data set", "fma_small, 40 tracks"),
            ("Queries", str(queries)),
            ("Draws", "4 × 32 per track"),
            ("Layer group", "transformer"),
            ("Masks", "update on, score off"),
            ("Precision", "float32"),
            ("Wall time", "12 min 04 s"),
        ],
        tables=[
            Table(
                "Planted relations",
                ["score function", "strength", "mAP", "standard error", "median rank"],
                results,
                "Mean average precision of the planted relatives, over all queries.",
            )
        ],
        queries=sections,
        tracks={info.id: info for info in infos},
        config={
            "command": "attr-engine run --config demo.json",
            "update": {"size": 0.01, "damping": 0.1},
            "masks": ["update"],
            "seed": 0,
        },
        environment={"python": "3.11.9", "torch": "2.11.0", "device": {"name": "H100", "memory_gib": 78.2}},
        warnings=["The control raw-latent cosine does better than every score function: easy queries."],
    )


@pytest.fixture
def report() -> Callable[..., ReportData]:
    """The maker of reports; small by default, so that a test is quick."""

    def small(queries: int = 2, rows: int = 6, tracks: int = 8) -> ReportData:
        return make_report(queries, rows, tracks)

    return small


@pytest.fixture
def clip() -> Callable[..., Clip]:
    return make_clip


if __name__ == "__main__":
    counts = [int(argument) for argument in sys.argv[2:]]
    write_report(make_report(*counts), Path(sys.argv[1]))
