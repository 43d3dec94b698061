"""The table of scores: ranks, look-ups, and the way through Parquet and CSV."""

import csv
import dataclasses
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attr_engine import Attribution, UserError, attribute, read_effects, read_scores
from attr_engine.result import ranks
from attr_engine.scorefile import FORMAT


def naive_ranks(scores: np.ndarray, stage: np.ndarray | None = None) -> list[int]:
    """By stage, then score, then position; what has no score comes last in its stage."""

    def key(i: int) -> tuple:
        missing = math.isnan(scores[i])
        return (0 if stage is None else -int(stage[i]), missing, 0.0 if missing else -scores[i], i)

    order = sorted(range(len(scores)), key=key)
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
    draws = rng.integers(1, 100, shape)
    return Attribution(tracks, updates, values, errors, rng.random(len(tracks)) / 3, meta, draws)


@pytest.fixture
def raced(result, rng) -> Attribution:
    """The same after a cascade: survivors with more draws, tracks that were left behind, tracks that were only ranked."""
    shape = result.draws.shape
    stage = rng.integers(-3, 3, shape)
    draws = np.where(stage < 0, 0, 8 * (stage + 1))
    values, errors = (
        {n: np.where(stage < 0, np.nan, v) for n, v in table.items()}
        for table in (result.values, result.errors)
    )
    base = np.where(np.arange(shape[1]) == 3, np.nan, result.base)
    return dataclasses.replace(result, values=values, errors=errors, draws=draws, stage=stage, base=base)


def test_ranks_are_those_of_a_sorted_list_ties_by_position(rng):
    for shape in ((1,), (7,), (40,)):
        scores = rng.integers(-3, 4, shape).astype(float)
        assert ranks(scores).tolist() == naive_ranks(scores)
        scores = rng.normal(size=shape)
        assert ranks(scores).tolist() == naive_ranks(scores)
    table = rng.integers(0, 5, (3, 4, 9)).astype(float)
    assert ranks(table).shape == table.shape
    assert [[naive_ranks(row) for row in block] for block in table] == ranks(table).tolist()
    table[rng.random(table.shape) < 0.3] = np.nan
    stage = rng.integers(-2, 3, table.shape)
    both = zip(table.reshape(-1, 9), stage.reshape(-1, 9), strict=True)
    assert [naive_ranks(a, b) for a, b in both] == ranks(table, stage).reshape(-1, 9).tolist()
    assert [naive_ranks(row) for row in table.reshape(-1, 9)] == ranks(table).reshape(-1, 9).tolist()


def test_a_track_that_went_on_outranks_every_track_that_was_left_behind(raced):
    for function in raced.values:
        for u in range(len(raced.updates)):
            order = raced.order(function, u)
            stages = raced.stage[u][order]
            assert (np.diff(stages) <= 0).all()
            for i, j in zip(order, order[1:], strict=False):
                a, b = raced.values[function][u][[i, j]]
                assert raced.stage[u, i] > raced.stage[u, j] or math.isnan(b) or a >= b
            assert np.array_equal(raced.ranks(function, u)[order], np.arange(1, len(order) + 1))


@pytest.mark.parametrize("kind", ["result", "raced"])
def test_it_comes_back_from_parquet_bit_for_bit(kind, request, tmp_path):
    result = request.getfixturevalue(kind)
    path = tmp_path / "scores.parquet"
    result.to_parquet(path)
    again = Attribution.from_parquet(path)
    assert list(again.tracks) == list(result.tracks)
    assert list(again.updates) == list(result.updates)
    assert list(again.values) == list(again.errors) == list(result.values)
    for name in result.values:
        assert again.values[name].dtype == np.float64
        known = ~np.isnan(result.values[name])
        assert np.array_equal(known, ~np.isnan(again.values[name]))
        assert again.values[name][known].tobytes() == result.values[name][known].tobytes()
        assert np.array_equal(again.errors[name], result.errors[name], equal_nan=True)
    assert np.array_equal(again.base, result.base, equal_nan=True)
    assert again.draws.dtype == np.int64 and np.array_equal(again.draws, result.draws)
    assert (again.stage is None) == (result.stage is None)
    assert result.stage is None or np.array_equal(again.stage, result.stage)
    assert again.meta == result.meta
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]
    again.to_parquet(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def expected_rows(result: Attribution) -> list[tuple]:
    """The rows of a file in their order, from the arrays, None for what is not known."""
    rows = []
    for function, values in result.values.items():
        for u, (query, strength) in enumerate(result.updates):
            stage = None if result.stage is None else result.stage[u]
            place = naive_ranks(values[u], stage)
            for i, track in enumerate(result.tracks):
                numbers = (
                    None if math.isnan(x) else float(x) for x in (values[u, i], result.errors[function][u, i])
                )
                rows.append((query, strength, function, track, place[i], *numbers, int(result.draws[u, i]),
                             0 if stage is None else int(stage[i])))  # fmt: skip
    return rows


COLUMNS = ("query", "strength", "function", "track", "rank", "score", "standard_error", "draws", "stage")


@pytest.mark.parametrize("kind", ["result", "raced"])
def test_csv_holds_the_same_rows(kind, request, tmp_path):
    result = request.getfixturevalue(kind)
    path = tmp_path / "scores.csv"
    result.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    assert tuple(names) == COLUMNS
    kinds = (str, float, str, str, int, float, float, int, int)
    found = [
        tuple(None if x == "" and kind is float else kind(x) for kind, x in zip(kinds, row, strict=True))
        for row in rows
    ]
    assert found == expected_rows(result)


@pytest.mark.parametrize("kind", ["result", "raced"])
def test_top_is_the_head_of_the_ranking(kind, request):
    result = request.getfixturevalue(kind)
    for function, values in result.values.items():
        for u, (query, strength) in enumerate(result.updates):
            for k in (1, 3, 8, 100):
                top = result.top(k, query, function, strength)
                assert [s.rank for s in top] == list(range(1, min(k, 8) + 1))
                place = naive_ranks(values[u], None if result.stage is None else result.stage[u])
                assert [s.track for s in top] == [result.tracks[place.index(r + 1)] for r in range(min(k, 8))]
                for s in top:
                    i = list(result.tracks).index(s.track)
                    assert s.score == values[u, i] or math.isnan(s.score) and math.isnan(values[u, i])
                    assert s.draws == result.draws[u, i]
                    assert s.standard_error == result.errors[function][u, i] or math.isnan(s.standard_error)
    assert repr(result.top(2, "q 1")) == repr(result.top(2, "q 1", "skew", 1e-2)), (
        "the first function, the first strength"
    )


def test_the_query_may_be_left_out_only_where_there_is_one(result):
    with pytest.raises(UserError, match="2 queries"):
        result.top()
    one = dataclasses.replace(
        result,
        updates=result.updates[:2],
        values={n: v[:2] for n, v in result.values.items()},
        draws=result.draws[:2],
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
    header = json.loads(pq.read_metadata(path).metadata[b"attr_engine"])

    def write(table: pa.Table, **changes: object) -> None:
        changed = json.dumps({**header, **changes})
        schema = table.schema.with_metadata({"attr_engine": changed})
        pq.write_table(table.cast(schema), path)

    write(table)
    assert Attribution.from_parquet(path).draws.tolist() == result.draws.tolist(), (
        "other row groups are no fault"
    )
    for format_ in ("attr_engine.scores/9", "attr_engine.scores/1", None, ["x"]):
        write(table, format=format_)
        for read in (Attribution.from_parquet, read_scores):
            with pytest.raises(UserError, match=f"{path} .*{re.escape(repr(format_))}"):
                read(path)
    swapped = table.take([1, 0, *range(2, 48)])
    turned = table.take(list(range(8, 48)) + list(range(8)))
    one_function = table.set_column(2, table.schema.field(2), pa.array(["skew"] * 48))
    other_draws = table.set_column(
        7, table.schema.field(7), pa.array([*range(24), *range(1, 25)], pa.int32())
    )
    as_text = table.set_column(5, pa.field("score", pa.string()), table.column("score").cast(pa.string()))
    for moved in (table.slice(1), swapped, turned, one_function, other_draws, as_text, table.drop(["draws"])):
        write(moved)
        with pytest.raises(UserError, match=str(path)):
            Attribution.from_parquet(path)
    for base in ([], [1.0], "x", None):
        write(table, base=base)
        with pytest.raises(UserError, match=str(path)):
            Attribution.from_parquet(path)


def test_a_failed_write_leaves_the_old_file(result, tmp_path):
    path = tmp_path / "scores.parquet"
    result.to_parquet(path)
    whole = path.read_bytes()
    broken = dataclasses.replace(result, errors={})
    with pytest.raises(KeyError):
        broken.to_parquet(path)
    assert path.read_bytes() == whole


def test_draws_and_stages_are_integers_a_track_and_update(result):
    for change in ({"draws": result.draws[:1]}, {"draws": result.draws / 2}, {"stage": result.draws.T}):
        with pytest.raises(UserError, match=next(iter(change))):
            dataclasses.replace(result, **change)


# -- parts of a file ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["result", "raced"])
def test_a_part_of_a_file_has_the_rows_that_a_loop_finds(kind, request, rng, tmp_path):
    result = request.getfixturevalue(kind)
    path = tmp_path / "a=b" / "scores.parquet"
    result.to_parquet(path)
    rows = expected_rows(result)
    assert read_scores(path).to_pylist() == [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    for _ in range(20):
        query, strength = result.updates[rng.integers(3)]
        wanted = {"query": query, "strength": strength, "function": str(rng.choice(list(result.values)))}
        wanted = {n: v for n, v in wanted.items() if rng.random() < 0.6}
        columns = [str(x) for x in rng.permutation(COLUMNS)[: rng.integers(1, 9)]]
        table = read_scores(path, columns=columns, **wanted)
        kept = [r for r in rows if all(r[COLUMNS.index(n)] == v for n, v in wanted.items())]
        assert table.column_names == columns
        assert [tuple(row[c] for c in columns) for row in table.to_pylist()] == [
            tuple(r[COLUMNS.index(c)] for c in columns) for r in kept
        ]
    for wanted, named in (
        ({"query": "nobody"}, "nobody"),
        ({"strength": 7.0}, "7.0"),
        ({"columns": ["x"]}, "'x'"),
    ):
        with pytest.raises(UserError, match=named):
            read_scores(path, **wanted)


def test_every_function_and_update_is_a_row_group_and_only_the_one_asked_for_is_read(result, tmp_path):
    path = tmp_path / "scores.parquet"
    result.to_parquet(path)
    file = pq.ParquetFile(path).metadata
    assert [file.row_group(g).num_rows for g in range(file.num_row_groups)] == [8] * 6
    wanted = read_scores(path, query="plain", function="displacement")
    octets = bytearray(path.read_bytes())
    first = file.row_group(5).column(0)
    start = min(x for x in (first.dictionary_page_offset, first.data_page_offset) if x)
    octets[4:start] = b"\xff" * (start - 4)  # the other five row groups
    path.write_bytes(octets)
    assert read_scores(path, query="plain", function="displacement") == wanted
    with pytest.raises(UserError, match=str(path)):
        Attribution.from_parquet(path)


def test_ids_too_long_for_statistics_are_found(result, tmp_path):
    path, long = tmp_path / "scores.parquet", "q" * 10_000
    updates = [(long + "1", 0.5), (long + "2", 0.5), ("q", 0.5)]
    dataclasses.replace(result, updates=updates).to_parquet(path)
    for query, _ in updates:
        assert read_scores(path, query=query, columns=["query"]).to_pylist() == [{"query": query}] * 16


def test_any_number_of_threads_may_read_one_file_and_one_result(raced, tmp_path):
    path = tmp_path / "scores.parquet"
    raced.to_parquet(path)
    jobs = [(q, s, f) for q, s in raced.updates for f in raced.values] * 8

    def look(job: tuple[str, float, str]) -> tuple:
        query, strength, function = job
        whole = Attribution.from_parquet(path)
        part = read_scores(path, query, function, strength)
        tops = [r.top(8, query, function, strength) for r in (raced, whole)]
        return repr(tops[0]), repr(tops[1]), part.to_pylist(), whole.draws.tobytes()

    expected = [look(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(look, jobs)) == expected
    assert all(a == b for a, b, *_ in expected)


# -- other readers --------------------------------------------------------------------------------


def same_rows(found: list[tuple], result: Attribution) -> None:
    plain = [tuple(None if isinstance(x, float) and math.isnan(x) else x for x in row) for row in found]
    assert plain == expected_rows(result)


def test_pandas_reads_it(raced, tmp_path):
    pandas = pytest.importorskip("pandas")
    raced.to_parquet(tmp_path / "s.parquet")
    frame = pandas.read_parquet(tmp_path / "s.parquet")
    assert tuple(frame.columns) == COLUMNS
    same_rows(list(frame.itertuples(index=False, name=None)), raced)


def test_polars_reads_it(raced, tmp_path):
    polars = pytest.importorskip("polars")
    raced.to_parquet(tmp_path / "s.parquet")
    frame = polars.read_parquet(tmp_path / "s.parquet")
    kinds = [polars.String, polars.Float64, *[polars.String] * 2, polars.Int32, *[polars.Float64] * 2]
    assert dict(zip(COLUMNS, [*kinds, *[polars.Int32] * 2], strict=True)) == dict(frame.schema)
    same_rows(frame.rows(), raced)
    query, strength = raced.updates[1]
    lazy = polars.scan_parquet(tmp_path / "s.parquet")
    part = lazy.filter(polars.col("query") == query, polars.col("strength") == strength).collect()
    assert part.rows() == [row for row in frame.rows() if row[:2] == (query, strength)]


def test_duckdb_reads_it(raced, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    raced.to_parquet(tmp_path / "s.parquet")
    with duckdb.connect() as base:
        same_rows(
            base.execute("SELECT * FROM read_parquet(?)", [str(tmp_path / "s.parquet")]).fetchall(), raced
        )


DOCS = Path(__file__).parent.parent / "docs" / "results.md"


def documented(heading: str) -> list[tuple[str, str, str]]:
    """(column, type, null) of the table under a heading of the docs that has these columns."""
    text = DOCS.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    table = text[text.index("| column |") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(cell.strip(" `") for cell in line.split("|")[1:4]) for line in table]


def stored(path: Path) -> list[tuple[str, str, str]]:
    """The same of a file, as any reader sees it that knows nothing of Arrow."""
    return [(f.name, str(f.type), "yes" if f.nullable else "no") for f in pq.read_schema(path)]


def test_the_schema_is_the_one_in_the_docs(result, tmp_path):
    result.to_parquet(tmp_path / "scores.parquet")
    assert stored(tmp_path / "scores.parquet") == documented("scores.parquet")
    assert set(pq.read_metadata(tmp_path / "scores.parquet").metadata) == {b"attr_engine"}
    assert FORMAT in DOCS.read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Attribution]:
    folder = tmp_path_factory.mktemp("docs")
    model, tracks, queries = forks.make(int(os.environ["ATTR_TEST_SEED"]))
    return folder, attribute(model, tracks, queries, forks.small(), folder / "run")


@pytest.mark.parametrize("k", range(len(blocks())))
def test_the_examples_in_the_docs_run_and_say_what_the_library_says(k, run, monkeypatch, capsys):
    folder, result = run
    code = blocks()[k]
    for name in ("pandas", "polars", "duckdb"):
        if f"import {name}" in code:
            pytest.importorskip(name)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(code, f"{DOCS.name} block {k}", "exec"), names)
    assert capsys.readouterr().out
    if "top" in names:
        top = names["top"]
        rows = (
            top
            if isinstance(top, list)
            else top.to_dict("records")
            if hasattr(top, "iloc")
            else top.to_dicts()
        )
        tracks = [row[3] if isinstance(row, tuple) else row["track"] for row in rows]
        assert tracks == [
            s.track for q, x in sorted(result.updates) for s in result.top(10, q, "loss_change", x)
        ]
    if "error" in names:
        assert np.allclose(names["score"], result.values["loss_change"], rtol=1e-12)
        assert np.allclose(names["error"], result.errors["loss_change"], rtol=1e-9)
        assert names["header"]["tracks"] == list(result.tracks)
        assert [tuple(pair) for pair in names["header"]["updates"]] == list(result.updates)


def test_the_docs_have_an_example_for_every_reader():
    text = "".join(blocks())
    readers = (
        "import pandas",
        "import polars",
        "import duckdb",
        "import pyarrow",
        "from safetensors",
        "read_scores",
    )
    assert all(reader in text for reader in readers)


# -- what a run says of itself, and its per-draw numbers ------------------------------------------


def test_a_run_says_what_it_was_made_of_and_gives_the_same_bytes_again(seed, tmp_path):
    import importlib.metadata

    model, tracks, queries = forks.make(seed)
    first = attribute(model, tracks, queries, forks.small(), tmp_path / "a")
    attribute(model, tracks, queries, forks.small(), tmp_path / "b")
    assert forks.bits(tmp_path / "a") == forks.bits(tmp_path / "b")
    meta = first.meta
    assert (meta["model"], meta["data"]) == (model.fingerprint, tracks.fingerprint)
    assert meta["queries"] == [queries.fingerprint, tracks.fingerprint]
    assert meta["precision"] == {"model": "float32", "losses": "float64"}
    assert all(
        meta["versions"][name] == importlib.metadata.version(name) for name in ("torch", "numpy", "pyarrow")
    )
    assert (first.draws == forks.small().score_draws).all() and first.stage is None
    other = attribute(model, tracks, queries, forks.small(mask_fisher=True), tmp_path / "c").meta
    assert {n for n in meta if meta[n] != other[n]} == {"settings", "config", "fisher"}
    more = attribute(model, tracks, queries, forks.small(score_draws=4), tmp_path / "d")
    assert {n for n in meta if meta[n] != more.meta[n]} == {"settings", "config"}
    assert (more.draws == 4).all()


def test_scores_to_first_order_alone_have_draws_too(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    result = attribute(model, tracks, queries, forks.small(functions=("influence",)), tmp_path)
    assert (result.draws == forks.small().score_draws).all() and result.draws.shape == (6, 6)
    effects = read_effects(tmp_path / "effects.safetensors")
    assert effects.unlearned.shape == (0, 6, 2) and effects.influence["loss"].shape == (6, 6, 2)
    assert np.array_equal(effects.influence["loss"].mean(axis=-1), result.values["influence"])


def test_effects_that_are_none_are_refused_by_path(seed, tmp_path):
    import torch

    from attr_engine.tensorfile import load_tensors, save_tensors

    model, tracks, queries = forks.make(seed)
    attribute(model, tracks, queries, forks.small(), tmp_path / "run")
    path = tmp_path / "run" / "effects.safetensors"
    tensors, header = load_tensors(path)
    with pytest.raises(UserError, match=f"{path} belongs to other settings"):
        read_effects(path, "another key")
    other = tmp_path / "other.safetensors"
    for changed, meta in (
        (tensors, {k: v for k, v in header.items() if k != "format"}),
        (tensors, {**header, "format": "attr_engine.effects/9"}),
        ({n: t for n, t in tensors.items() if n != "base"}, header),
        ({**tensors, "base": torch.zeros(5, 3)}, header),
    ):
        save_tensors(other, changed, meta)
        with pytest.raises(UserError, match=str(other)):
            read_effects(other)
