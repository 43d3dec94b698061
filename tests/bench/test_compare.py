"""``bench/compare.py`` on made-up results: what is flagged, what is not, what is refused."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def compare():
    path = list(sys.path)
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_compare", BENCH / "compare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_compare"] = module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def result(ratios: dict[str, list[float]], drift: list[float] | None = None) -> dict:
    """A result of record.py whose rows took so many times as long as the limit, on a machine that drifts."""
    drift = drift or [1.0] * len(next(iter(ratios.values())))
    rows = [
        {"case": "c", "way": "limit", "kind": "limit", "status": "ok", "error": None, "seconds": list(drift)}
    ]
    for way, values in ratios.items():
        seconds = [r * d for r, d in zip(values, drift, strict=True)]
        rows.append(
            {"case": "c", "way": way, "kind": "ours", "status": "ok", "error": 1e-7, "seconds": seconds}
        )
    return {"name": "unlearn", "question": "what?", "bases": ["limit"], "measure": "seconds", "threads": 2, "rows": rows,
            "environment": {"cpu": "x", "cores": 2, "memory_gb": 8.0, "gpu": None}}  # fmt: skip


def verdicts(compare, old, new, **more) -> dict[str, str]:
    return {line.name: line.verdict for line in compare.compare(old, new, **more)}


def test_no_change_within_the_spread_whatever_the_machine_does(compare, rng):
    drift = list(rng.uniform(0.5, 5.0, 7))
    base = rng.uniform(1.9, 2.1, 7)
    old, new = result({"engine": list(base)}), result({"engine": list(rng.permutation(base) + 0.01)}, drift)
    assert verdicts(compare, old, new) == {"c: engine, of limit": "same"}
    assert not any(line.bad for line in compare.compare(old, new))


def test_worse_and_better_beyond_the_spread(compare, rng):
    # Both ends are there, so that the spread is 0.04, which no two medians between them are apart.
    noise = lambda: list(rng.permutation([1.98, *rng.uniform(1.985, 2.015, 3), 2.02]))  # noqa: E731
    shifted = lambda by: [x + by for x in noise()]  # noqa: E731
    old = result({"a": noise(), "b": noise(), "c": noise()})
    new = result({"a": shifted(0.2), "b": shifted(-0.2), "c": noise()}, list(rng.uniform(0.5, 5.0, 5)))
    found = verdicts(compare, old, new)
    assert [found[f"c: {w}, of limit"] for w in "abc"] == ["worse", "better", "same"]
    assert [line.bad for line in compare.compare(old, new)] == [True, False, False]


def test_the_spread_of_either_side_excuses(compare):
    narrow, wide = [2.0, 2.0, 2.01], [1.9, 2.2, 2.5]
    for old, new in ((narrow, wide), ([2.0 - (x - 2.2) for x in wide], [x + 0.25 for x in narrow])):
        assert verdicts(compare, result({"e": old}), result({"e": new})) == {"c: e, of limit": "same"}
    assert verdicts(compare, result({"e": narrow}), result({"e": [2.2, 2.21, 2.22]})) == {
        "c: e, of limit": "worse"
    }


def test_two_runs_of_one_state_are_counted_by_whether_they_moved(compare):
    once = result({"a": [2.0, 2.01], "b": [3.0, 3.01], "c": [4.0, 4.5]})
    again = result({"a": [2.5, 2.51], "b": [2.5, 2.51], "c": [4.4, 4.6]})
    table = compare.moved([("unlearn", compare.compare(once, again))]).splitlines()
    assert table[2] == "| unlearn | 3 | 1 | 2 | 0 |"
    assert [line.split(" | ")[0] for line in table[6:]] == [
        "| unlearn: c: a, of limit",
        "| unlearn: c: b, of limit",
    ]


def test_what_was_not_repeated_is_counted_and_listed(compare):
    once = result({"a": [2.0, 2.01], "b": [3.0, 3.01], "c": [4.0, 4.5]})
    again = copy.deepcopy(once)
    again["rows"] = [row for row in again["rows"] if row["way"] != "b"]
    again["rows"][-1]["seconds"] = []
    table = compare.moved([("unlearn", compare.compare(once, again))]).splitlines()
    assert table[2] == "| unlearn | 1 | 1 | 0 | 2 |"
    assert [(line.split(" | ")[0], "**not repeated**" in line) for line in table[6:]] == [
        ("| unlearn: c: b, of limit", True),
        ("| unlearn: c: c, of limit", True),
    ]


def test_an_index_is_judged_beside_faiss_on_rows_of_the_same_numbers(compare):
    def row(way, numbers, seconds):
        return {"tracks": 5, "width": 2, "threads": 1, "way": way, "numbers": numbers, "seconds": seconds,
                "recall_10": 1.0, "recall_50": 1.0}  # fmt: skip

    rows = [row("ours, all scores", "float16", [2.0, 2.0]), row("ours, all scores", "int8", [1.0, 1.0]),
            row("FAISS exact 8 bits", "int8", [1.0, 1.0])]  # fmt: skip
    found = {"speed": {"rows": rows, "environment": {"cpu": "x"}}, "environment": {"cpu": "y"}}
    names = [name for name in compare.measures(found) if "FAISS" in name]
    assert names == ["5 x 2 int8, 1 threads: a query, of FAISS exact 8 bits"]
    broken = copy.deepcopy(found)
    broken["speed"]["rows"][1] = {
        **{k: rows[1][k] for k in ("tracks", "width", "threads", "way", "numbers")},
        "failed": "WRONG",
    }
    bad = [line for line in compare.compare(found, broken) if line.bad]
    assert len(bad) == 3 and {line.verdict for line in bad} == {"FAILED in NEW"}
    elsewhere = copy.deepcopy(found)
    elsewhere["speed"]["environment"]["cpu"] = "z"
    assert compare.unlike(found, elsewhere) == ["cpu"]


def test_a_row_that_is_missing_or_wrong_is_bad_and_shows_no_figure(compare):
    old = result({"a": [2.0, 2.1], "b": [3.0, 3.1]})
    without = result({"a": [2.0, 2.1]})
    (same, lost) = compare.compare(old, without)
    assert (same.verdict, lost.verdict, lost.bad) == ("same", "missing in NEW", True)
    assert [line.verdict for line in compare.compare(without, old)] == ["same", "only in NEW"]
    wrong = copy.deepcopy(old)
    wrong["rows"][2].update(status="wrong", seconds=[0.001, 0.001])
    line = compare.compare(old, wrong)[1]
    assert (line.verdict, line.bad) == ("WRONG in NEW", True) and "0.001" not in compare.markdown([line])
    unmeasured = copy.deepcopy(old)
    unmeasured["rows"][2]["seconds"] = []
    assert compare.compare(old, unmeasured)[1].bad and not compare.compare(unmeasured, old)[1].bad


def test_one_repetition_is_not_judged_and_a_peer_never_is(compare):
    assert verdicts(compare, result({"a": [2.0]}), result({"a": [9.0]})) == {
        "c: a, of limit": "one repetition: not judged"
    }
    old, new = result({"a": [2.0, 2.0]}), result({"a": [9.0, 9.0]})
    for one in (old, new):
        one["rows"][1]["kind"] = "peer"
    with pytest.raises(ValueError, match="neither"):
        compare.compare(old, new)


def test_other_questions_and_times_of_other_machines_are_refused(compare):
    old = result({"a": [2.0, 2.0]})
    other = {**old, "name": "scale"}
    with pytest.raises(ValueError, match="one question"):
        compare.compare(old, other)
    elsewhere = copy.deepcopy(old)
    elsewhere["environment"]["cpu"] = "y"
    assert verdicts(compare, old, elsewhere) == {"c: a, of limit": "same"}
    with pytest.raises(ValueError, match="differ in cpu"):
        compare.compare(old, elsewhere, seconds=True)
    slower = result({"a": [2.0, 2.0]}, [3.0, 3.0])
    assert verdicts(compare, old, slower) == {"c: a, of limit": "same"}
    assert verdicts(compare, old, slower, seconds=True) == {"c, a: seconds": "worse"}


EXISTING = ("fisher", "stream", "score", "index", "processes")


@pytest.mark.parametrize("name", EXISTING)
def test_results_that_are_kept_have_figures_and_are_the_same_as_themselves(compare, name):
    found = json.loads((BENCH / "results" / f"{name}.json").read_text())
    assert compare.question(found) == name
    lines = compare.compare(found, found)
    assert lines and {line.verdict for line in lines} == {"same"}
    values = np.array([v for line in lines for v in line.new.values])
    assert np.isfinite(values).all() and (values > 0).all()


def test_slower_results_that_are_kept_are_flagged(compare):
    found = json.loads((BENCH / "results" / "fisher.json").read_text())
    slower = copy.deepcopy(found)
    for case in slower["cases"]:
        for row in case["rows"]:
            if row["way"] == "engine":
                row["seconds"] = [2 * s for s in row["seconds"]]
    flagged = [line.name for line in compare.compare(found, slower) if line.bad]
    assert flagged and all(": engine, of" in name for name in flagged)
    assert sum(name.endswith((", of backward", ", of loop")) for name in flagged) == 2 * len(found["cases"])
    stream = json.loads((BENCH / "results" / "stream.json").read_text())
    slower = copy.deepcopy(stream)
    for row in slower["rows"]:
        if (row["kind"], row["name"]) == ("ours", "default"):
            row["seconds"] = [2 * s for s in row["seconds"]]
    flagged = [line for line in compare.compare(stream, slower) if line.bad]
    assert flagged and all(line.name.startswith("default") and line.new.higher for line in flagged)


def test_exit_codes_and_folders(tmp_path):
    def call(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(BENCH / "compare.py"), *map(str, words)], capture_output=True, text=True
        )

    for folder, ratio in (("old", 2.0), ("same", 2.0), ("worse", 4.0)):
        (tmp_path / folder).mkdir()
        text = json.dumps(result({"engine": [ratio, ratio + 0.01]}))
        (tmp_path / folder / "unlearn.json").write_text(text)
        (tmp_path / folder / "evidence.json").write_text('{"lds": 1}')
    assert call(tmp_path / "old", tmp_path / "same").returncode == 0
    (tmp_path / "old" / "scale.json").write_text(
        json.dumps(result({"engine": [1.0, 1.0]}) | {"name": "scale"})
    )
    alone = call(tmp_path / "old", tmp_path / "same", "--moved")
    assert alone.returncode == 0 and alone.stdout.splitlines()[-1] == "Not run again: scale."
    done = call(tmp_path / "old", tmp_path / "worse")
    assert done.returncode == 1 and "## unlearn" in done.stdout and "**worse**" in done.stdout
    assert "evidence" not in done.stdout
    refused = call(tmp_path / "old" / "unlearn.json", tmp_path / "old" / "evidence.json")
    assert refused.returncode == 2 and "NEW holds no ratios" in refused.stderr
    assert call(tmp_path / "old", tmp_path / "worse" / "unlearn.json").returncode == 2
    assert call(tmp_path / "old", tmp_path / "nowhere").returncode == 2
