"""``retrain`` and ``evaluate`` from end to end, and the sentences for what they cannot use."""

import json
from dataclasses import replace

import pytest
import torch

from attr_engine import Settings
from attr_engine.cli import main

pytest.importorskip("stable_audio_tools")

from test_retrain import write_set  # noqa: E402
from test_train import make_config  # noqa: E402

from attr_engine import train  # noqa: E402
from attr_engine.latents import LatentDataset  # noqa: E402
from attr_engine.result import Attribution  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path, rng):
    """A tiny trained model, its tracks in two families, and queries that have parents."""
    info = {
        i: {"artist": "ab"[i % 2], "family": "fg"[i % 2], "relation": "original", "seconds": 3.0}
        for i in range(8)
    }
    data = write_set(tmp_path / "data", rng, 8, info=info)
    asked = {i: {"parents": "t0;t2", "relation": "gain"} for i in range(3)}
    write_set(tmp_path / "queries", rng, 3, "q", asked)
    train.train_diffusion(make_config(), LatentDataset(tmp_path / "data"), tmp_path / "model", 4, batch=2)
    assert len(data) == 8
    return tmp_path


def run(place, *more):
    return main([
        "score", "--model", str(place / "model"), "--data", str(place / "data"), "--queries", str(place / "queries"),
        "--self-influence", "t1", "--out", str(place / "run"), "--update-draws", "4", "--score-draws", "4", *more,
    ])  # fmt: skip


def retrain(place, *more):
    return main([
        "retrain", "--model", str(place / "model"), "--data", str(place / "data"), "--queries", str(place / "queries"), "--steps", "3",
        "--batch", "2", "--subsets", "3", "--draws", "2", "--workers", "2", "--out", str(place / "retrained"), *more,
    ])  # fmt: skip


def test_scores_are_judged_by_models_trained_again(place, capsys):
    assert run(place) == 0
    remove = ("--remove", f"mine={place / 'run' / 'scores.parquet'}", "--k", "2", "--removals", "2")
    assert retrain(place, *remove, "--leave-out", "artist") == 0
    assert "noise ceiling" in capsys.readouterr().out
    trained = sorted(p.name for p in (place / "retrained" / "models").iterdir())
    assert {name.rpartition("-")[2][:5] for name in trained if name.startswith("top")} == {"seed1", "seed2"}
    assert retrain(place, *remove, "--leave-out", "artist") == 0
    assert sorted(p.name for p in (place / "retrained" / "models").iterdir()) == trained
    assert main(["evaluate", str(place / "run"), "--retrained", str(place / "retrained")]) == 0
    out = capsys.readouterr().out
    for title in (
        "Linear datamodelling score",
        "Removal of the top 2",
        "Leave one group out",
        "Planted relations",
        "Rank of a training",
        "Collapse",
    ):
        assert title in out
    found = json.loads((place / "run" / "evaluation.json").read_text())
    table = next(t for t in found if "LDS" in t["title"])
    assert [row[0] for row in table["rows"]][0] == Settings().functions[0]
    assert "random (control)" in [row[0] for row in table["rows"]]


def test_removals_may_have_fewer_seeds_than_halves(place, capsys):
    assert run(place) == 0
    remove = ("--remove", f"mine={place / 'run' / 'scores.parquet'}", "--k", "2", "--removals", "2")
    assert retrain(place, *remove, "--removal-seeds", "1") == 0
    names = [p.name for p in (place / "retrained" / "models").iterdir()]
    assert {n.rpartition("-")[2][:5] for n in names if n.startswith(("top", "random"))} == {"seed1"}
    assert {n.rpartition("-")[2][:5] for n in names if n.startswith(("half", "whole"))} == {"seed1", "seed2"}
    assert main(["evaluate", str(place / "run"), "--retrained", str(place / "retrained")]) == 0
    assert "Removal of the top 2" in capsys.readouterr().out
    assert retrain(place, *remove, "--removal-seeds", "3") == 2
    assert "--removal-seeds 3 is above --seeds 2" in capsys.readouterr().err


def test_tables_of_other_queries_are_judged_on_those_that_all_have(place, capsys):
    assert run(place) == 0
    found = Attribution.from_parquet(place / "run" / "scores.parquet")
    keep = [u for u, (name, _) in enumerate(found.updates) if name in ("q0", "q2")]
    some = replace(
        found, updates=[found.updates[u] for u in keep], values={k: v[keep] for k, v in found.values.items()},
        errors={k: v[keep] for k, v in found.errors.items()}, draws=found.draws[keep],
    )  # fmt: skip
    some.to_parquet(place / "some.parquet")
    assert (
        main(["evaluate", str(place / "run"), str(place / "some.parquet"), "--out", str(place / "both")]) == 0
    )
    tables = json.loads((place / "both" / "evaluation.json").read_text())
    assert {row[2] for t in tables if t["title"].startswith("Planted") for row in t["rows"]} == {2}


def test_controls_refuse_what_stands_out_no_more(place, capsys):
    assert run(place) == 0
    assert (
        main(
            [
                "report",
                "--out",
                str(place / "run"),
                "--controls",
                str(place / "run"),
                "--false-accepts",
                "0.5",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "refused" in out or "stand out" in out
    page = (place / "run" / "report.html").read_text()
    assert "refused: no track stands out" in page or "unattributable" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "nowhere"], "nowhere"),
        (
            ["retrain", "--model", "m", "--data", "d", "--queries", "q", "--out", "o", "--subsets", "0"],
            "at least 1",
        ),
    ],
)
def test_what_cannot_be_used_gets_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_groups_that_do_not_exist_are_told(place, capsys):
    assert retrain(place, "--leave-out", "label") == 2
    assert "share a 'label'" in capsys.readouterr().err


def test_too_few_halves_for_a_correlation_are_told_before_training(place, capsys):
    assert retrain(place, "--subsets", "2", "--seeds", "1") == 0
    assert "an LDS needs --subsets 3 or more" in capsys.readouterr().err
