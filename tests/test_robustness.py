"""Robustness: the same ranking agrees with itself, another one as much as the obvious way says."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine import perturb
from attr_engine.cli import main
from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.robustness import agreement, check_robustness, robustness, robustness_table
from attr_engine.settings import Settings

RATE, FRAME, FRAMES = 16000, 1600, 10
LEVELS = {
    "noise": (("none", lambda audio, rate, rng: audio.copy()), ("0 dB", dict(perturb.PERTURBATIONS["noise"])["0 dB"])),
    "gain": perturb.PERTURBATIONS["gain"],
}  # fmt: skip


class Frames:
    """An encoder: mean, spread and peak of every frame."""

    sample_rate, audio_channels, samples_per_frame, fingerprint = RATE, 1, FRAME, "frames"

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        frames = audio.reshape(len(audio), -1, FRAME)
        return torch.stack([frames.mean(-1), frames.std(-1), frames.amax(-1)], dim=1)


def make_queries(folder, rng, count=3):
    soundfile = pytest.importorskip("soundfile")
    from attr_engine.latents.ingest import ingest_audio

    source = folder / "audio"
    source.mkdir(parents=True)
    for i in range(count):
        samples = 2 * rng.standard_normal(round(rng.uniform(0.6, 1.0) * RATE))
        soundfile.write(source / f"{i}.wav", samples, RATE, subtype="FLOAT")
    with (source / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "id", "lead"], *([f"{i}.wav", f"q{i}", 1 + i] for i in range(count))])  # fmt: skip
    ingest_audio(source, folder / "set", Frames(), FRAMES, source / "metadata.csv", ["lead"])
    return LatentDataset(folder / "set")


def settings(**more):
    return Settings(
        **{"functions": ("ridge", "loss_change"), "dtype": "float64", "fisher_draws": 2, "score_draws": 4, "update_draws": 4,
           "replicates": 2, "rows": 4, "strengths": (1e-2, 1e-1), **more}
    )  # fmt: skip


def test_agreement_is_what_the_obvious_way_says(rng):
    a, b = rng.normal(size=(2, 5, 17))
    found = agreement(a, b, 4)
    for q in range(5):
        first, second = (np.argsort(np.argsort(-x[q])) for x in (a, b))
        assert found.correlation[q] == pytest.approx(np.corrcoef(first, second)[0, 1])
        assert found.shared[q] == sum(first[i] < 4 and second[i] < 4 for i in range(17)) / 4
        assert found.place[q] == 1 + second[a[q].argmax()]
    same = agreement(a, 3 * a - 1)
    assert same.correlation == pytest.approx(1.0) and (same.shared == 1).all() and (same.place == 1).all()
    assert agreement(a, -a, 40).shared.tolist() == [1.0] * 5  # all tracks there are
    assert (agreement(a, -a).place == 17).all()


def test_another_query_is_the_mean_over_all_pairs(rng):
    scores = rng.normal(size=(4, 9))
    rows = robustness_table({("ridge", 0.01): scores}, {}).rows
    pairs = [agreement(scores[[a]], scores[[b]]) for a in range(4) for b in range(4) if a != b]
    assert rows[0][:3] == ["ridge", "another query", ""]
    for at, name in ((3, "correlation"), (6, "shared"), (9, "place")):
        assert rows[0][at] == pytest.approx(np.mean([getattr(p, name)[0] for p in pairs]), abs=1e-4)
        assert rows[0][at + 1] <= rows[0][at] <= rows[0][at + 2]


def test_a_perturbation_that_changes_nothing_changes_no_ranking(seed, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(perturb, "PERTURBATIONS", LEVELS)
    monkeypatch.setattr("attr_engine.robustness.PERTURBATIONS", LEVELS)
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 12, 3, FRAMES)
    for given in tracks.conditioning:
        given["lead"] += 1
    queries = make_queries(tmp_path, rng)
    asked = (model, tracks, [queries], Frames(), settings(), tmp_path / "out")
    table = robustness(*asked, checkpoint=ToyDenoiser(seed + 1))
    found = {tuple(row[:3]): row[3:] for row in table.rows}
    labels = ("ridge at 0.01", "ridge at 0.1", "loss_change at 0.01", "loss_change at 0.1")
    changes = [("noise", "none"), ("noise", "0 dB"), *(("gain", x) for x, _ in LEVELS["gain"]), ("another seed", ""),
               ("half the draws", ""), ("another checkpoint", ""), ("another query", "")]  # fmt: skip
    assert list(found) == [(label, *change) for label in labels for change in changes]
    for label in labels:
        assert found[label, "noise", "none"] == [1.0] * 9
        # A small change may leave the ranks of a dozen tracks as they are.
        assert any(found[(label, *change)][0] < 1 for change in changes[1:])
    for row in found.values():
        assert all(low <= value <= high for value, low, high in (row[0:3], row[3:6], row[6:9]))
    # The same call again takes what is there, and one perturbation more or less is not another folder.
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    again = robustness(*asked, perturbations=["gain"])
    assert {tuple(row[:3]): row[3:] for row in again.rows}.items() <= found.items()
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    monkeypatch.setattr(Frames, "fingerprint", "other")
    with pytest.raises(UserError, match="encoded by another autoencoder"):
        robustness(*asked)


@pytest.mark.parametrize(
    ("more", "names", "message"),
    [
        ({}, ["louder"], "no perturbation 'louder': choose from pitch"),
        ({"groups": "artist"}, [], "groups is set"),
        ({"top": 3}, [], "top is set"),
        ({"score_draws": 6, "replicates": 6}, [], "half the number of score draws is 3"),
        ({"update_draws": 2}, [], "half the number of update draws is 1"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(more, names, message):
    with pytest.raises(UserError, match=message):
        check_robustness(settings(**more), names)


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["robustness", "--out", out, "--only", "louder"]) == 2
    assert "no perturbation 'louder'" in capsys.readouterr().err
    assert main(["robustness", "--out", out]) == 2
    assert "give --queries" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_can_be_written_as_json(rng):
    a, b = rng.normal(size=(2, 2, 5))
    table = robustness_table({("ridge", 0.01): a}, {("gain", "-6 dB"): {("ridge", 0.01): b}})
    assert json.loads(json.dumps(vars(table)))["rows"][0][:3] == ["ridge", "gain", "-6 dB"]
