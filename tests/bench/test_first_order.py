"""``bench/first_order.py`` on a tiny case, and ``bench/peers.py`` on results: what they hold and refuse, never a time."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def call(script: str, *words: object) -> subprocess.CompletedProcess:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=known)


@pytest.fixture(scope="module")
def bench():
    """Modules of bench/ by name, and no trace of the path afterwards."""
    kept = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path[:] = kept


@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="needs stable-audio-tools")
def test_the_quick_case_is_right_on_all_parameters_and_names_no_folder(tmp_path):
    out = tmp_path / "first_order.json"
    done = call("first_order.py", "--quick", "--no-memory", "--repeat", 2, "--threads", 1, "--out", out,
                "--ways", "engine", "loop")  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = out.read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    found = json.loads(text)
    rows = {row["way"]: row for row in found["rows"]}
    assert found["name"] == "first_order" and {row["case"] for row in found["rows"]} == {"24 tokens"}
    assert set(rows) == {"engine", "loop"}
    for row in rows.values():
        assert row["status"] == "ok" and row["covers"] == "all" and 0 < row["error"] < found["below"]
        assert row["covered"]["parameters"] == row["covered"]["of_parameters"] > 0
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["ratio_to"]["loop"]["median"] > 0 and row["ratio_to"]["vmap"] is None
    table = call("first_order.py", "--table", out)
    assert table.returncode == 0 and table.stdout.count("| 24 tokens |") == 2
    assert len(found["limits"]) == 3 and table.stdout.count("\nLimit, ") == 3
    assert f"product {4 * 24}x64 by 64x256, GFLOP/s" in found["limits"]
    shown = call("peers.py", tmp_path)
    assert (
        shown.returncode == 0 and shown.stdout.count("| gradient dot products, 24 tokens | loop | all |") >= 1
    )


@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="needs stable-audio-tools")
def test_scores_of_a_part_of_the_parameters_are_the_sum_of_what_those_contribute(bench, rng):
    """The engine and the loop against float64 products of whole gradients, on a random choice of parameters."""
    torch = pytest.importorskip("torch")
    ways = bench("first_order_ways")
    size = ways.Size(int(rng.integers(8, 20)), 64, 1, 3, 2, 2)
    wide = ways.Case(size, torch.float64)
    contributions = ways.parts(wide)
    names = sorted(rng.choice(list(contributions), 5, replace=False))
    want = np.zeros((2, 3))
    for q in range(2):
        for i in range(3):
            parameters = [wide.parameters[name] for name in names]
            a, b = (
                torch.autograd.grad(wide.loss(tuple(x[k : k + 1] for x in rows)).sum(), parameters)
                for rows, k in ((wide.queries, q), (wide.tracks, i))
            )
            want[q, i] = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    np.testing.assert_allclose(sum(contributions[name] for name in names), want, rtol=1e-9)
    case = ways.Case(size)
    for way in ("engine", "loop", "vmap"):
        made = ways.WAYS[way](case, names)
        assert list(made.covers) == names
        first, second = (made.read(made.run()) for _ in range(2))
        assert ways.error(first, torch.from_numpy(want)) < 1e-4 and np.array_equal(first, second)
        assert ways.error(first * 1.01, torch.from_numpy(want)) > 5e-3
    with pytest.raises(ValueError, match=r"\(3, 2\), not \(2, 3\)"):
        ways.error(want.T, torch.from_numpy(want))


def row(way: str, seconds: list[float], kind: str = "peer", **more: object) -> dict:
    return {"case": "c", "way": way, "kind": kind, "status": "ok", "error": 1e-7, "covers": "all",
            "seconds": seconds, **more}  # fmt: skip


def test_verdicts_are_of_rounds_and_on_the_same_coverage(bench, rng, tmp_path):
    peers = bench("peers")
    drift = rng.uniform(0.5, 5.0, 5)

    def times(ratios: list[float]) -> list[float]:
        return [float(r * d) for r, d in zip(ratios, drift, strict=True)]

    engine, part = (
        row("engine", times([1] * 5), "ours", peak_mb=2.0),
        row("engine, on what p covers", times([0.5] * 5), "ours"),
    )
    rows = [engine, part, row("slow", times([1.1, 2, 3, 2, 2]), peak_mb=8.0), row("fast", times([0.9, 0.5, 0.5, 0.8, 0.9])),
            row("even", times([0.9, 1.1, 1, 1, 2])), row("p", times([0.6] * 5), same_coverage=part["way"]),
            row("off", [], status="wrong", reason="its error is 1"), row("short", [1.0])]  # fmt: skip
    (tmp_path / "first_order.json").write_text(json.dumps({"rows": rows}))
    found = {line.peer: line for line in peers.lines(tmp_path)}
    assert set(found) == {"slow", "fast", "even", "p", "off", "short"}
    verdicts = {peer: line.verdict for peer, line in found.items()}
    assert verdicts["slow"] == verdicts["p"] == peers.FASTER
    assert (verdicts["fast"], verdicts["even"]) == (peers.SLOWER, peers.EVEN)
    assert verdicts["off"] == "WRONG: its error is 1" and verdicts["short"] == "not measured"
    assert found["slow"].memory == 0.25 and found["p"].time["median"] == pytest.approx(0.5 / 0.6, rel=1e-4)
    text = peers.markdown(list(found.values()))
    assert text.split("### Where a peer is faster")[1].count("| gradient dot products, c |") == 1
    broken = copy.deepcopy(rows)
    broken[0].update(status="wrong", reason="x")
    (tmp_path / "first_order.json").write_text(json.dumps({"rows": broken}))
    found = {line.peer: line for line in peers.lines(tmp_path)}
    assert found["fast"].time is None and found["fast"].verdict == "WRONG: x"


def test_every_source_says_when_and_where_it_was_measured(bench, tmp_path):
    here = {
        "date": "2026-01-02",
        "commit": "0123456789abc",
        "cpu": "P",
        "cores": 2,
        "changed_since_commit": True,
    }
    first = {"environment": here, "rows": [row("engine", [1.0, 1.0], "ours"), row("p", [2.0, 2.0])]}
    (tmp_path / "first_order.json").write_text(json.dumps(first))
    own = {
        "environment": {"commit": "wrong"},
        "speed": {"environment": {"commit": "fedcba9876543"}, "rows": []},
    }
    (tmp_path / "index.json").write_text(json.dumps(own))
    done = call("peers.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| first_order.json | 2026-01-02 | 012345678 and changes | P, 2 |" in done.stdout.splitlines()
    assert "| index.json |  | fedcba987 |  |" in done.stdout.splitlines()


def test_without_rounds_the_most_unlike_repetitions_bound_the_ratio(bench, rng):
    peers = bench("peers")
    a, b = rng.uniform(1, 2, 5), rng.uniform(1, 2, 7)
    pairs = [x / y for x in a for y in b]
    found = peers._time(list(a), list(b), turns=False)
    assert found["min"] == pytest.approx(min(pairs)) and found["max"] == pytest.approx(max(pairs))
    assert found["median"] == pytest.approx(np.median(a) / np.median(b))


def test_a_missing_result_is_left_out_and_none_at_all_is_said(tmp_path):
    done = call("peers.py", tmp_path)
    assert done.returncode == 1 and "make peers" in done.stderr and not done.stdout
    (tmp_path / "fisher.json").write_text((BENCH / "results" / "fisher.json").read_text())
    done = call("peers.py", tmp_path)
    assert done.returncode == 0 and "| Fisher, 512 tokens | vmap |" in done.stdout
    assert "streaming" not in done.stdout and "gradient dot products" not in done.stdout


def test_peers_stands_for_the_parts_with_other_libraries_each_once(bench):
    run = bench("run")
    parts = run.asked(["fisher", "peers"])
    scripts = ["fisher.py", "first_order.py", "stream.py", "index.py", "windows.py"]
    assert [part.script for _, part in parts] == scripts
    assert all("--peers" in part.full and "--peers" in part.peers for _, part in parts)
    assert {Path(part.out).stem for _, part in parts} == set(bench("peers").READERS)
    assert run.asked(["index"])[0] == parts[-2] and len(run.asked(["index"])) == 3
    small = run.asked(["fisher", "peers"], quick=True)
    assert [part.script for _, part in small] == [part.script for _, part in parts]
    assert all("--peers" in part.quick for _, part in small)
    assert "--peers" not in run.asked(["fisher"], quick=True)[0][1].quick
