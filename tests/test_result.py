"""The table of scores: ranks, look-ups, and the way through Parquet and CSV."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from attr_engine import Attribution, UserError
from attr_engine.result import ranks


def naive_ranks(scores: np.ndarray) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [order.index(i) + 1 for i in range(len(scores))]


@pytest.fixture
def result(rng) -> Attribution:
    """Numbers of every size, ids of every kind, ties, and a standard error that is not known."""
    tracks = ["plain", "with, comma", 'with "quotes"', "ünïcode ☃", "a/b;c", " ", "0", "nan"]
    updates = [("q 1", 1e-2), ("q 1", 0.1 + 0.2), ("plain", 1e-300)]
    shape = (len(updates), len(tracks))
    values = {
        n: rng.normal(size=shape) * 10.0 ** rng.integers(-200, 200, shape) for n in ("skew", "displacement")
    }
    values["skew"][0, 2:5] = values["skew"][0, 6]
    values["skew"][1, :2] = 0.0, -0.0
    errors = {n: np.abs(v) / 3 for n, v in values.items()}
    errors["displacement"][:] = np.nan
    meta = {"settings": {"seed": 1, "strengths": [0.01]}, "model": "ab", "note": "é"}
    return Attribution(tracks, updates, values, errors, rng.random(len(tracks)) / 3, meta)


def test_ranks_are_those_of_a_sorted_list_ties_by_position(rng):
    for shape in ((1,), (7,), (40,)):
        scores = rng.integers(-3, 4, shape).astype(float)
        assert ranks(scores).tolist() == naive_ranks(scores)
        scores = rng.normal(size=shape)
        assert ranks(scores).tolist() == naive_ranks(scores)
    table = rng.integers(0, 5, (3, 4, 9)).astype(float)
    assert ranks(table).shape == table.shape
    assert [[naive_ranks(row) for row in block] for block in table] == ranks(table).tolist()


def test_it_comes_back_from_parquet_bit_for_bit(result, tmp_path):
    path = tmp_path / "scores.parquet"
    result.to_parquet(path)
    again = Attribution.from_parquet(path)
    assert list(again.tracks) == list(result.tracks)
    assert list(again.updates) == list(result.updates)
    assert list(again.values) == list(again.errors) == list(result.values)
    for name in result.values:
        assert again.values[name].dtype == np.float64
        assert again.values[name].tobytes() == result.values[name].tobytes()
        assert np.array_equal(again.errors[name], result.errors[name], equal_nan=True)
    assert again.base.tobytes() == result.base.tobytes()
    assert again.meta == result.meta
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]
    again.to_parquet(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_csv_holds_the_same_rows(result, tmp_path):
    path = tmp_path / "scores.csv"
    result.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 8
    for k, row in enumerate(rows):
        function, (u, i) = list(result.values)[k // 24], divmod(k % 24, 8)
        assert (row["query"], row["function"], row["track"]) == (
            result.updates[u][0],
            function,
            result.tracks[i],
        )
        assert float(row["strength"]) == result.updates[u][1]
        assert float(row["score"]) == result.values[function][u, i]
        assert int(row["rank"]) == naive_ranks(result.values[function][u])[i]
        error = result.errors[function][u, i]
        assert float(row["standard_error"]) == error or math.isnan(error)


def test_top_is_the_head_of_the_ranking(result):
    for function, values in result.values.items():
        for u, (query, strength) in enumerate(result.updates):
            for k in (1, 3, 8, 100):
                top = result.top(k, query, function, strength)
                assert [s.rank for s in top] == list(range(1, min(k, 8) + 1))
                place = naive_ranks(values[u])
                assert [s.track for s in top] == [result.tracks[place.index(r + 1)] for r in range(min(k, 8))]
                for s in top:
                    i = list(result.tracks).index(s.track)
                    assert s.score == values[u, i]
                    assert s.standard_error == result.errors[function][u, i] or math.isnan(s.standard_error)
    assert result.top(2, "q 1") == result.top(2, "q 1", "skew", 1e-2), (
        "the first function, the first strength"
    )


def test_the_query_may_be_left_out_only_where_there_is_one(result):
    with pytest.raises(UserError, match="2 queries"):
        result.top()
    one = dataclasses.replace(
        result, updates=result.updates[:2], values={n: v[:2] for n, v in result.values.items()}
    )
    assert one.top(1) == result.top(1, "q 1")


def test_unknown_names_are_refused_by_name(result):
    for arguments, named in (
        ({"query": "nobody"}, "nobody"),
        ({"query": "q 1", "function": "cosine"}, "cosine"),
        ({"query": "q 1", "strength": 0.5}, "0.5"),
    ):
        with pytest.raises(UserError, match=named):
            result.top(**arguments)


def test_files_that_are_no_results_are_refused_by_path(result, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "scores.parquet"
    with pytest.raises(UserError, match=f"{path} does not exist"):
        Attribution.from_parquet(path)
    result.to_parquet(path)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], b"{}" + whole[2:-4] + b"xxxx"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=str(path)):
            Attribution.from_parquet(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match=str(path)):
        Attribution.from_parquet(path)
    path.write_bytes(whole)
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"attr_engine"])
    pq.write_table(
        table.replace_schema_metadata(
            {"attr_engine": json.dumps({**header, "format": "attr_engine.scores/9"})}
        ),
        path,
    )
    with pytest.raises(UserError, match="attr_engine.scores/9"):
        Attribution.from_parquet(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(UserError, match="47 rows"):
        Attribution.from_parquet(path)


def test_a_failed_write_leaves_the_old_file(result, tmp_path):
    path = tmp_path / "scores.parquet"
    result.to_parquet(path)
    whole = path.read_bytes()
    broken = dataclasses.replace(result, errors={})
    with pytest.raises(KeyError):
        broken.to_parquet(path)
    assert path.read_bytes() == whole
