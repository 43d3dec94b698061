"""Curves: a rank is that of the obvious way, for every method, source and change; the command carries on and names what fails."""

import csv
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ToyDenoiser

import attr_engine
from attr_engine import Settings
from attr_engine import curves as c
from attr_engine.cli import main
from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import read_audio
from attr_engine.latents.ingest import encode_piece, file_hash, ingest_audio
from attr_engine.methods import METHODS
from attr_engine.methods.base import Entry, option

soundfile = pytest.importorskip("soundfile")

RATE, FRAME, FRAMES, N = 16000, 1000, 10, 9
LEVELS = {"crop": ["0.75", "0.5", "0.25"], "mixing": ["12 dB", "6 dB", "0 dB"], "none": ["as it is"]}


class Frames:
    """An encoder: mean, spread and peak of every frame."""

    sample_rate, audio_channels, samples_per_frame, fingerprint = RATE, 1, FRAME, "frames"

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        frames = audio.reshape(len(audio), -1, FRAME)
        return torch.stack([frames.mean(-1), frames.std(-1), frames.amax(-1)], dim=1)


def make_tracks(folder: Path, rng: np.random.Generator) -> LatentDataset:
    """Nine pieces; ``t0`` and ``t1`` are exact copies, ``t2`` is of their family."""
    source = folder / "audio"
    source.mkdir(parents=True)
    rows = [["path", "id", "lead", "family", "relation"]]
    for i in range(N):
        if i != 1:
            samples = 0.2 * rng.standard_normal(round(rng.uniform(0.3, 0.6) * RATE)) * rng.uniform(0.3, 1)
        soundfile.write(source / f"{i}.wav", samples, RATE, subtype="FLOAT")
        family = ("f", ("original", "exact copy", "gain")[i]) if i < 3 else ("", "")
        rows.append([f"{i}.wav", f"t{i}", 1 + i % 3, *family])
    with (source / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    ingest_audio(source, folder / "set", Frames(), FRAMES, source / "metadata.csv", ["lead"])
    return LatentDataset(folder / "set")


def mean_frame(tracks, index) -> np.ndarray:
    return tracks.batch([index], int(tracks.lengths[index])).latents[0].double().numpy().mean(axis=1)


@dataclass(frozen=True)
class Near:
    """Tracks whose mean frame is near that of the query; writes down what it was asked."""

    broken: str = option("", "fit, score, shape or change")
    asked = []  # noqa: RUF012 - no field

    def fit(self, model, tracks, work):
        if self.broken == "fit":
            raise UserError("it needs weights")
        assert work.folder.is_dir()
        self.asked.append("fit")
        return _FittedNear(self, np.stack([mean_frame(tracks, i) for i in range(len(tracks))]))


@dataclass(frozen=True)
class _FittedNear:
    method: Near
    tracks: np.ndarray

    def score(self, queries):
        change = queries[0].tracks.info[0]["perturbation"]
        if self.method.broken == "score" and change == "mixing":
            raise UserError("it has no ears")
        self.method.asked.append((change, len(queries)))
        rows = [-np.linalg.norm(self.tracks - mean_frame(q.tracks, q.index), axis=1) for q in queries]
        return np.stack(rows)[:, :-1] if self.method.broken == "shape" else np.stack(rows)


@pytest.fixture
def near(monkeypatch):
    monkeypatch.setitem(METHODS, "near", Entry(Near, "black box", "mean frames"))
    Near.asked.clear()
    return Near.asked


def settings(**more) -> Settings:
    few = {"fisher_draws": 2, "score_draws": 4, "update_draws": 4, "replicates": 2, "rows": 4}
    return Settings(**{"dtype": "float64", "layers": ("*.cross_attn.*",), **few,
                       **more})  # fmt: skip


def measure(tmp_path, rng, seed, methods=("near",), only=("crop", "mixing"), sources=(0, 3, 5), **more):
    folder = tmp_path / "world"
    tracks = LatentDataset(folder / "set") if folder.exists() else make_tracks(folder, rng)
    s = settings(seed=seed % 1000)
    return tracks, c.curves(
        ToyDenoiser(seed), tracks, Frames(), methods, s, tmp_path / "out", sources, only, **more
    )


def naive_rank(scores, tracks, source) -> float:
    """One, and one for every track that is no copy and has more; half for the same."""
    own = {"t0", "t1"} if source in ("t0", "t1") else {source}
    best = max(s for s, name in zip(scores, tracks.ids, strict=True) if name in own)
    others = [s for s, name in zip(scores, tracks.ids, strict=True) if name not in own]
    return 1 + sum(s > best for s in others) + sum(s == best for s in others) / 2


def test_ranks_are_those_of_the_obvious_way(tmp_path, rng, seed, near):
    tracks, found = measure(tmp_path, rng, seed, ("near", "ridge"))
    assert found.sources == ["t0", "t3", "t5"] and found.tracks == N and not found.failed
    assert list(found.changes) == [
        (name, level) for name in ("none", "crop", "mixing") for level in LEVELS[name]
    ]
    assert found.ranks.shape == found.scores.shape == (2, 3, 7)
    assert (found.column(0, ("none", "as it is")) == 1).all()
    mean_frames = np.stack([mean_frame(tracks, i) for i in range(N)])
    sets = [LatentDataset(tmp_path / "out" / "versions" / name) for name in LEVELS]
    asked = settings(seed=seed % 1000, functions=("ridge",))
    run = attr_engine.attribute(ToyDenoiser(seed), tracks, sets, asked)
    for versions in sets:
        for i, label in enumerate(versions.ids):
            info = versions.info[i]
            s, v = (
                found.sources.index(info["query"]),
                found.changes.index((info["perturbation"], info["level"])),
            )
            rows = [
                -np.linalg.norm(mean_frames - mean_frame(versions, i), axis=1),
                run.values["ridge"][run.row(label)],
            ]
            for m, row in enumerate(rows):
                assert found.ranks[m, s, v] == naive_rank(row, tracks, info["query"])
                own = [0, 1] if s == 0 else [int(info["query"][1:])]
                assert found.scores[m, s, v] == pytest.approx(
                    row[own].max(), rel=1e-6, abs=1e-9 * abs(row).max()
                )


def test_versions_have_audio_where_any_other_query_has_it(tmp_path, rng, seed, near):
    tracks, _ = measure(tmp_path, rng, seed)
    for name in LEVELS:
        versions = LatentDataset(tmp_path / "out" / "versions" / name)
        for i in range(len(versions)):
            info = versions.info[i]
            path = Path(versions.extra["root"]) / info["source"]
            assert file_hash(path) == info["sha256"] and not info.get("parent")
            latent = encode_piece(Frames(), read_audio(path, RATE, 1), FRAMES)
            assert torch.equal(latent, versions.batch([i], latent.shape[1]).latents[0])
            if name == "mixing":
                other = info["mixed_with"]
                related = {"t0", "t1", "t2"} if info["query"] == "t0" else {info["query"]}
                assert other in tracks.ids and other not in related


def test_what_was_measured_is_not_measured_again(tmp_path, rng, seed, near):
    _, first = measure(tmp_path, rng, seed)
    assert near == ["fit", ("none", 3), ("crop", 9), ("mixing", 9)]
    near.clear()
    _, again = measure(tmp_path, rng, seed)
    assert near == ["fit"], "which says what the method is of, and does nothing twice"
    np.testing.assert_array_equal(first.ranks, again.ranks)
    np.testing.assert_array_equal(first.scores, again.scores)
    near.clear()
    _, more = measure(tmp_path, rng, seed, only=("gain", "mixing"))
    assert near == ["fit", ("gain", 9)]
    np.testing.assert_array_equal(more.column(0, ("mixing", "6 dB")), first.column(0, ("mixing", "6 dB")))
    measure(
        tmp_path, rng, seed, ("near:broken=change",), only=("mixing",)
    )  # other options are another method
    assert near == ["fit", ("gain", 9), "fit", ("none", 3), ("mixing", 9)]
    with pytest.raises(UserError, match="another only: choose another folder"):
        measure(tmp_path, rng, seed, sources=(3, 5))


def test_a_method_that_was_stopped_goes_on_with_the_next_perturbation(tmp_path, rng, seed, near, monkeypatch):
    score = _FittedNear.score

    def stop(self, queries):
        if queries[0].tracks.info[0]["perturbation"] == "mixing":
            raise KeyboardInterrupt
        return score(self, queries)

    monkeypatch.setattr(_FittedNear, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, rng, seed)
    monkeypatch.setattr(_FittedNear, "score", score)
    near.clear()
    _, found = measure(tmp_path, rng, seed)
    assert near == ["fit", ("mixing", 9)]
    assert np.isfinite(found.ranks).all()


def test_a_method_that_fails_is_named_and_the_others_are_measured(tmp_path, rng, seed, near):
    methods = ["near:broken=fit", "near", "near:broken=score", "near:broken=shape"]
    _, found = measure(tmp_path, rng, seed, methods)
    assert found.methods == ["near"] and found.ranks.shape == (1, 3, 7)
    assert found.failed == {
        "near:broken=fit": "it needs weights",
        "near:broken=score": "it has no ears",
        "near:broken=shape": "it gave scores [3, 8] for 'none', expected [3, 9]",
    }
    assert "Without near:broken=fit: it needs weights." in c.tables(found)[0].note
    with pytest.raises(UserError, match="method 'near:broken=fit': it needs weights"):
        measure(tmp_path, rng, seed, methods[:1])


def test_what_cannot_be_done_is_refused_before_anything_is(tmp_path, rng, seed, near):
    tracks = make_tracks(tmp_path / "world", rng)
    for more, message in (
        ({"methods": ("far",)}, "no method 'far'"),
        ({"methods": ("near", "near")}, "one of them twice"),
        ({"only": ("louder",)}, "'louder' does not exist: choose from pitch, tempo"),
        ({"only": ("crop", "crop")}, "'crop' stands twice"),
    ):
        with pytest.raises(UserError, match=message):
            measure(tmp_path, rng, seed, **more)
    other = Frames()
    other.fingerprint = "other"
    with pytest.raises(UserError, match="encoded by another autoencoder"):
        c.curves(ToyDenoiser(seed), tracks, other, ["near"], settings(), tmp_path / "out", [3])
    assert not (tmp_path / "out").exists()


def test_sources_are_drawn_among_tracks_without_exact_copies(tmp_path, rng, seed):
    tracks = make_tracks(tmp_path, rng)
    # One of 7 is left out of all with 7 (3 / 7)^40, which is 1e-14.
    drawn = [c.choose_sources(tracks, 4, seed + i) for i in range(40)]
    assert all(sorted(set(x)) == x and len(x) == 4 and min(x) >= 2 for x in drawn)
    assert set().union(*drawn) == set(range(2, N))
    assert c.choose_sources(tracks, 4, seed) == drawn[0]
    assert c.choose_sources(tracks, 7, seed) == list(range(2, N))
    assert c.choose_sources(tracks, 99, seed, ["t5", "t0"]) == [0, 5]
    for count, named, message in ((8, [], "7 training tracks have no exact copy"), (0, [], "0 sources"),
                                  (1, ["t5", "x"], "'x' is not a training"), (1, ["t5", "t5"], "'t5' stands twice")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            c.choose_sources(tracks, count, seed, named)


def test_chance_is_that_of_every_order():
    for tracks, m in ((5, 1), (5, 2), (6, 3), (4, 4)):
        counts = np.zeros(tracks)
        for order in itertools.permutations(range(tracks)):
            counts[min(order[:m])] += 1  # places of the first m tracks
        np.testing.assert_allclose(c.chance([m], tracks), counts / counts.sum(), atol=1e-12)
    np.testing.assert_allclose(c.chance([1, 3], 6), (c.chance([1], 6) + c.chance([3], 6)) / 2, atol=1e-15)


def made(rng, methods=3, sources=8) -> c.Curves:
    changes = [("none", "as it is"), *(("pitch", x) for x in ("-2", "-1", "+1")), ("noise", "0 dB")]
    ranks = rng.integers(1, 40, (methods, sources, len(changes))).astype(float)
    ranks[0, :, 0] = 1
    names = [f"m{i}" for i in range(methods)]
    return c.Curves(
        names, [f"s{i}" for i in range(sources)], changes, ranks, -ranks, 40, c.chance([1] * sources, 40)
    )


def test_the_tables_hold_the_numbers_of_the_obvious_way(rng):
    found = made(rng)
    overview, numbers = c.tables(found)
    assert overview.columns == ["perturbation", "level", "m0", "m1", "m2", "chance"]
    assert overview.rows[0][:3] == ["none", "as it is", "1 (1 to 1)"] and overview.rows[0][-1] == 20
    assert len(numbers.rows) == 3 * 5 + 1
    for row in numbers.rows[:-1]:
        ranks = found.column(found.methods.index(row[0]), (row[1], row[2]))
        for at, value in ((3, np.median(ranks)), (6, np.mean(1 / ranks)), (9, np.mean(ranks == 1))):
            assert row[at] == pytest.approx(value, abs=1e-4)
            assert row[at + 1] <= row[at] <= row[at + 2]
            assert row[at + 1] < row[at + 2] or (row[0] == "m0" and row[1] == "none" and at < 9) or at == 3
    assert numbers.rows[-1][::3][1:] == [20, round(np.mean(1 / np.arange(1, 41)), 4), 1 / 40]
    assert json.loads(json.dumps(vars(numbers)))["rows"][0] == numbers.rows[0]


def test_the_interval_of_a_median_is_as_wide_as_it_should_be(rng):
    """The median of 11 numbers drawn again is at most the j-th of them where six draws or more are of the first j."""
    below = [
        sum(math.comb(11, k) * (j / 11) ** k * (1 - j / 11) ** (11 - k) for k in range(6, 12))
        for j in range(1, 12)
    ]
    low, high = (next(j for j, p in enumerate(below) if p > end) for end in (0.025, 0.975))
    for _ in range(10):  # the ends are 7 deviations of 4000 resamples away from the next number
        values = rng.normal(size=11)
        found, ordered = c.median(values), np.sort(values)
        assert (found.value, found.low, found.high) == (ordered[5], ordered[low], ordered[high])
    assert c.median(np.full(5, 3.0)) == c.Estimate(3.0, 3.0, 3.0, 5)


def test_every_point_is_written_as_parquet_and_csv(tmp_path, rng):
    found = made(rng)
    found.scores[1, 2, 3] = np.nan
    c.write_points(found, tmp_path / "curves.parquet")
    rows = pq.read_table(tmp_path / "curves.parquet").to_pylist()
    assert len(rows) == 3 * 8 * 5
    for row in rows:
        at = (
            found.methods.index(row["method"]), found.sources.index(row["source"]),
            found.changes.index((row["perturbation"], row["level"])),
        )  # fmt: skip
        assert row["rank"] == found.ranks[at]
        assert row["score"] == (None if at == (1, 2, 3) else found.scores[at])
    with (tmp_path / "curves.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    assert [row["level"] for row in texts] == [row["level"] for row in rows]
    assert [float(row["rank"]) for row in texts] == [row["rank"] for row in rows]


def test_the_figure_has_a_panel_a_perturbation_and_a_line_a_method(tmp_path, rng, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    kept = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **o: (kept.append(self), save(self, *a, **o))
    )
    found = made(rng, methods=12)
    c.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    panels = [panel for panel in kept[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == ["pitch", "noise"]
    labels = [[x.get_text() for x in panel.get_xticklabels()] for panel in panels]
    assert labels == [["-2", "-1", "none", "+1"], ["none", "0 dB"]]
    for panel in panels:
        lines = [line for line in panel.containers if len(line[0].get_xdata())]
        assert len(lines) == 12 and panel.get_yscale() == "log" and panel.yaxis_inverted()
    medians = [np.median(found.column(3, change)) for change in (found.changes[i] for i in (1, 2, 0, 3))]
    assert panels[0].containers[3][0].get_ydata().tolist() == medians
    legend = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert legend == [*found.methods, "chance"]


def test_the_command_writes_everything_and_ends_with_code_2_where_a_method_fails(
    tmp_path, rng, seed, near, monkeypatch, capsys
):
    tracks = make_tracks(tmp_path / "world", rng)
    monkeypatch.setattr("attr_engine.load.load_base", lambda s: (ToyDenoiser(seed), tracks))
    monkeypatch.setattr("attr_engine.models.autoencoder.load_autoencoder", lambda *a: Frames())
    out = tmp_path / "out"
    command = [
        "curves",
        "--methods",
        "near",
        "near:broken=score",
        "--count",
        "3",
        "--only",
        "crop",
        "mixing",
        "--out",
        str(out),
    ]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == "attr-engine: 1 of 2 methods could not be measured: method 'near:broken=score': it has no ears"
    )
    about = json.loads((out / "curves.json").read_text())
    assert len(about["sources"]) == 3 and about["settings"]["seed"] == 0
    assert about["failed"] == {"near:broken=score": "it has no ears"}
    assert main([x for x in command if x != "near:broken=score"]) == 0
    text = capsys.readouterr().out
    assert "| crop | 0.5 |" in text and text.startswith("### Perturbation curves: median rank")
    assert (out / "curves.md").read_text() in text
    assert len(pq.read_table(out / "curves.parquet")) == 3 * 7
    for flags, message in (
        (["--only", "louder"], "'louder' does not exist"), (["--methods", "far"], "no method 'far'"),
        (["--sources", "x"], "'x' is not a training track"), (["--count", "40"], "40 sources were asked for"),
    ):  # fmt: skip
        assert main(["curves", *flags, "--out", str(tmp_path / "none")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "none").exists()
    (tmp_path / "world" / "audio" / "5.wav").unlink()
    assert main(["curves", "--methods", "near", "--sources", "t5", "--out", str(tmp_path / "silent")]) == 2
    assert "'t5' has no audio at" in capsys.readouterr().err
