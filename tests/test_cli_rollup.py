"""Groups of tracks by the command line: what is printed and written, and what is refused."""

import csv
from pathlib import Path

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import make_tracks

from attr_engine import Attribution, Settings, attribute, roll_up
from attr_engine.cli import main
from attr_engine.grouping import make_levels
from attr_engine.latents import LatentDataset, LatentWriter


@pytest.fixture
def world(seed, rng, tmp_path) -> tuple[Path, LatentDataset, Attribution]:
    """A finished run over a data set with artists, as the command line leaves it."""
    model, _, queries = forks.make(seed)
    tracks = make_tracks(rng, 6, 3, 10)
    artists = ["Ann", "Bob\x1b[2J", "Ann", None, 7, "B" * 500]
    writer = LatentWriter(tmp_path / "latents", padding=tracks.silence)
    for i, artist in enumerate(artists):
        parent = {"parent": "long"} if i in (0, 2) else {}
        writer.add(f"t{i}", tracks.raw[i], tracks.conditioning[i], {"artist": artist, **parent})
    writer.close()
    data = LatentDataset(tmp_path / "latents")
    settings = forks.small(data=str(tmp_path / "latents"), plan="track")
    return tmp_path, data, attribute(model, data, queries, settings, tmp_path / "run")


def test_the_command_writes_and_prints_the_groups(world, capsys):
    folder, data, result = world
    assert (
        main(["rollup", str(folder / "run"), "--by", "track", "artist", "--how", "max", "sum", "--top", "9"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\x1b[2J" in out
    assert "B" * 59 + "…" in out and "B" * 60 not in out
    assert "(unknown)" in out and "1 tracks have no artist" in err and "GUDA" in err
    assert all(query in out for query in ("q0", "t1", "t4"))
    levels = make_levels(["track", "artist"], ["max", "sum"], data.ids, list(data.info))
    roll_up(result, levels).to_parquet(folder / "mine.parquet")
    assert (folder / "run" / "rollup.parquet").read_bytes() == (folder / "mine.parquet").read_bytes()
    with (folder / "run" / "rollup.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 6 * (5 + 5) and {row["how"] for row in rows} == {"max", "sum of max"}


def test_the_command_takes_groups_from_a_csv_and_another_place_for_data_and_out(world, capsys):
    folder, _, result = world
    (folder / "latents").rename(folder / "moved")
    (folder / "owners.csv").write_text("track,owner\nlong,Label\nt5,Label\n")
    words = ["rollup", str(folder / "run"), "--by", "owner", "--groups", str(folder / "owners.csv")]
    assert main(words) == 2
    assert str(folder / "latents") in capsys.readouterr().err
    assert main([*words, "--data", str(folder / "moved"), "--out", str(folder / "owners.parquet")]) == 0
    table = pq.read_table(folder / "owners.parquet").to_pylist()
    value = result.values["loss_change"][0]
    mine = [
        r for r in table if (r["function"], r["query"], r["strength"]) == ("loss_change", *result.updates[0])
    ]
    assert {r["group"]: r["tracks"] for r in mine} == {"Label": 3, "(unknown)": 3}
    assert np.isclose(next(r["score"] for r in mine if r["group"] == "Label"), value[0] + value[2] + value[5])
    assert (folder / "owners.csv").read_text().startswith('"query"'), "the CSV beside it"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--by", "label"], "'label'"), (["--by", "artist", "--out", "x.txt"], "x.txt"),
        (["--by", "artist", "--groups", "no.csv"], "no.csv"),
        (["--by", "artist", "--how", "sum", "max"], "1 levels"), (["--by", "artist", "--data", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_is_refused_in_one_line(words, named, world, capsys):
    folder, _, _ = world
    capsys.readouterr()
    assert main(["rollup", str(folder / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
    assert not list((folder / "run").glob("rollup*"))


def test_data_of_another_run_and_runs_without_data_are_refused(world, seed, capsys, rng):
    folder, data, _ = world
    writer = LatentWriter(folder / "other", padding=None)
    writer.add("x", torch.zeros(3, 4).numpy(), {}, {"artist": "Ann"})
    writer.close()
    assert main(["rollup", str(folder / "run"), "--by", "artist", "--data", str(folder / "other")]) == 2
    assert "'t0'" in capsys.readouterr().err
    model, tracks, queries = forks.make(seed)
    attribute(model, tracks, queries, forks.small(), folder / "memory")
    assert Settings().data == ""
    assert main(["rollup", str(folder / "memory"), "--by", "artist"]) == 2
    assert "--data" in capsys.readouterr().err
    assert main(["rollup", str(folder / "nothing"), "--by", "artist"]) == 2
    assert "scores.parquet does not exist" in capsys.readouterr().err
