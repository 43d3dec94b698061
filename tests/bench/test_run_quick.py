"""``bench/run.py --quick``: the benchmarks run, are right about themselves, and say what they were made with. No times."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(BENCH / script), *arguments], capture_output=True, text=True, env=known
    )


def quick(out: Path, *questions: str) -> subprocess.CompletedProcess:
    """Some questions by the dispatcher, without a demo."""
    return run(
        "run.py", *questions, "--quick", "--threads", "1", "--demo", str(out / "no"), "--out", str(out)
    )


@pytest.fixture
def record():
    spec = importlib.util.spec_from_file_location("bench_record", BENCH / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(path: Path, tmp_path: Path) -> dict:
    """What every result of the newer scripts holds."""
    text = path.read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    found = json.loads(text)
    host = found["environment"]
    assert found["name"] and found["question"].endswith("?") and found["threads"] == 1
    assert found["command"].startswith("python bench/") and host["command"] == found["command"]
    assert host["commit"] == found["commit"] and host["cpu"] and host["cores"] >= 1 and "gpu" in host
    assert set(host["versions"]) >= {"torch", "numpy", "attr-engine"}
    assert found["rows"] and {row["status"] for row in found["rows"]} == {"ok"}
    names = [(row["case"], row["way"]) for row in found["rows"]]
    assert len(set(names)) == len(names)
    return found


def test_kernels_from_the_dispatcher(tmp_path):
    done = quick(tmp_path, "kernels", "end_to_end")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "end_to_end | end_to_end.py | skipped:" in done.stdout and "make one with make demo" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["kernels-cpu.json"]
    found = check(tmp_path / "kernels-cpu.json", tmp_path)
    cases: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        cases.setdefault(row["case"], {})[row["way"]] = row
    assert {case[:2] for case in cases} == {"K1", "K2", "K3", "K4", "K5"}
    for rows in cases.values():
        assert {"plain torch", "limit"} < set(rows)
        for way, row in rows.items():
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
            assert (row["error"] is None) == (way == "limit")
            assert (
                row["ratio_to"]["limit"]["min"]
                <= row["ratio_to"]["limit"]["median"]
                <= row["ratio_to"]["limit"]["max"]
            )
    assert len(found["limits"]) == 3 and all(len(v) == 2 and min(v) > 0 for v in found["limits"].values())


@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="needs stable-audio-tools")
def test_unlearning_is_compared_with_float64_before_it_is_timed(tmp_path):
    done = quick(tmp_path, "unlearn")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = check(tmp_path / "unlearn.json", tmp_path)
    rows = {row["way"]: row for row in found["rows"]}
    assert set(rows) == {"forward + backward", "engine", "loop"}
    assert 0 < rows["engine"]["error"] < 1e-4 and 0 < rows["loop"]["error"] < 1e-4
    assert all(row["ratio_to"]["forward + backward"] for row in rows.values())
    together = min(rows["engine"]["rows"], 4)
    assert rows["forward + backward"]["widest"] == [together * 32, 4 * 64, 64]
    assert len(found["limits"][f"product {together * 32}x64 by 64x256, GFLOP/s"]) == 2


@pytest.mark.parametrize("question", ["fisher", "stream", "index", "cold", "scale", "memory"])
@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="needs stable-audio-tools")
def test_every_other_question_runs_and_is_right(question, tmp_path):
    done = quick(tmp_path, question)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(f"| {question} |")]
    assert said and all("| done |" in line or "skipped:" in line for line in said)
    results = list(tmp_path.glob("*.json"))
    assert len(results) == sum("| done |" in line for line in said) > 0
    for path in results:
        text = path.read_text()
        made = json.loads(text)
        for rows, columns, inner in (row["widest"] for row in made.get("rows", ()) if "widest" in row):
            assert f"product {rows}x{inner} by {inner}x{columns}, GFLOP/s" in made["limits"]
        assert path.name not in ("fisher.json", "scale.json") or len(made["limits"]) > 2
        assert (
            str(tmp_path) not in text
            and str(ROOT) not in text
            and '"wrong"' not in text
            and '"failed"' not in text
        )


def test_a_part_that_fails_or_leaves_nothing_is_told(tmp_path):
    done = run("run.py", "unlearned", "--quick")
    assert done.returncode == 2 and "no question 'unlearned'" in done.stderr
    blocked = tmp_path / "kernels-cpu.json"
    blocked.mkdir()
    done = quick(tmp_path, "kernels")
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "Failed: kernels_cpu.py."
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("| kernels | kernels_cpu.py |"))
    assert "exit code 1" in line and line.endswith("kernels-cpu.json is of an earlier run |")


def test_a_wrong_row_is_neither_timed_nor_shown(record, tmp_path, capsys):
    rows = [record.row("a", way) for way in ("limit", "right", "wrong", "nan")]
    for row, error in zip(rows[1:], (1e-7, 1e-3, float("nan")), strict=True):
        record.checked(row, error, 1e-5)
    calls: dict[str, int] = {}
    ways = {row["way"]: lambda w=row["way"]: calls.__setitem__(w, calls.get(w, 0) + 1) for row in rows}
    record.take_turns(rows, ways, 3)
    assert set(calls) == {"limit", "right"} and [len(r["seconds"]) for r in rows] == [3, 3, 0, 0]
    found = record.result("x", "what?", 1, rows, ("limit",), record.environment())
    assert record.finish(found, tmp_path / "x.json") == 1
    shown = capsys.readouterr().out
    assert "| a | wrong | WRONG: its error is 0.001" in shown and "| a | nan | WRONG" in shown
    assert json.loads((tmp_path / "x.json").read_text())["rows"][3]["error"] is None


def test_a_wrong_row_of_a_peer_is_shown_and_is_no_failure(record, tmp_path, capsys):
    rows = [record.row("a", "engine"), record.row("a", "limit", "limit"), record.row("a", "other", "peer")]
    record.checked(rows[2], 1.0, 1e-5)
    record.take_turns(rows, {row["way"]: lambda: None for row in rows}, 2)
    found = record.result("x", "what?", 1, rows, ("limit",), record.environment())
    assert record.finish(found, tmp_path / "x.json") == 0 and "| a | other | WRONG" in capsys.readouterr().out
    for kind, code in (("ours", 1), ("limit", 1), ("peer", 0)):
        for row in rows:
            row.update(status="failed" if row["kind"] == kind else "ok", reason="r")
        assert record.finish(found, tmp_path / "x.json") == code


@pytest.fixture
def bench():
    """Modules of bench/ by name, and no trace of the path afterwards."""
    kept = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path[:] = kept


@pytest.mark.parametrize("numbers", ["float16", "int8"])
def test_scores_of_an_index_are_judged_before_they_are_timed(bench, numbers, tmp_path, monkeypatch, seed):
    """What storing loses is allowed; rows of other tracks, or one score a little further off than its row can lose, are not."""
    speed = bench("index_speed")
    rows = speed.Rows(300, 16, seed)
    index, exact, lost = speed.write(rows, numbers, tmp_path / "index")
    queries = speed.torch.from_numpy(rows.queries())
    right = speed._ours(index, queries, exact, lost, 3)
    assert (
        len(right["seconds"]) == 3
        and 0 < right["error"] < 0.05
        and not speed.wrong([{"way": "ours", **right}])
    )
    off = exact.copy()
    off[3, 7] += 3 * float(queries[3].norm()) * lost[7]
    for truth in (off, exact[:, ::-1]):
        wrong = speed._ours(index, queries, truth, lost, 3)
        assert wrong["failed"].startswith("WRONG: off by") and "seconds" not in wrong
        assert speed.wrong([{"way": "ours, all scores", **wrong}])
    assert not speed.wrong([{"way": "FAISS exact 8 bits", "failed": "no"}])


def test_a_wrong_exact_search_of_windows_is_not_timed_and_faiss_may_fail(bench, tmp_path, monkeypatch):
    windows = bench("windows")
    args = SimpleNamespace(windows=300, tracks=20, threads=1, repeat=2, kinds=[], quick=True)
    (right,) = windows.measure("tracks", args, tmp_path)
    assert right["recall"] == 1.0 and len(right["seconds"]) == 2
    assert not windows.wrong([right, {"way": "ivf", "failed": "not installed"}])
    monkeypatch.setattr(windows, "check", lambda *_: 0.975)
    monkeypatch.setattr(windows, "seconds_of", lambda *_: pytest.fail("what is wrong is not timed"))
    (row,) = windows.measure("tracks", args, tmp_path)
    assert row["failed"] == "WRONG: recall 0.975 against float64" and windows.wrong([row])


@pytest.mark.parametrize("same", [True, False])
def test_scores_whose_bits_differ_are_a_failure(bench, tmp_path, monkeypatch, same):
    score, out = bench("score"), tmp_path / "score.json"
    (tmp_path / "demo" / "model").mkdir(parents=True)
    monkeypatch.setattr(score, "measure_queries", lambda *_: {"same_bits": same})
    monkeypatch.setattr(score.report, "markdown", lambda _: "")
    words = [
        "score.py",
        "--only",
        "queries",
        "--threads",
        "1",
        "--demo",
        str(tmp_path / "demo"),
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert score.main() == int(not same)
    found = json.loads(out.read_text())["queries"]
    assert (
        found["environment"]["command"]
        == "python bench/score.py --only queries --threads 1 --demo DIR --out DIR"
    )


def test_what_earlier_results_lack_is_said_and_what_is_written_now_lacks_nothing(record, tmp_path):
    whole = {**record.environment(), "commit": "c"}
    made = {
        "now": {"environment": whole},
        "parts": {"a": {"environment": whole}, "b": {"environment": {**whole, "cpu": ""}}},
        "said": {
            "command": "python",
            "environment": {k: v for k, v in whole.items() if k not in ("command", "date")},
        },
        "bare": [1],
    }
    for name, found in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert record.lacking(tmp_path).splitlines() == [
        "* no environment: bare",
        "* no cpu: parts",
        "* no date: said",
    ]


def test_parts_of_an_index_keep_their_own_environment(bench, tmp_path, monkeypatch):
    made, out = bench("index"), tmp_path / "index.json"
    monkeypatch.setattr(made, "measure_speed", lambda *_: {"rows": [], "repeat": 1, "peers": {}})
    monkeypatch.setattr(made, "measure_quality", lambda *_: {"quality": 1})
    monkeypatch.setattr(made.report, "markdown", lambda _: "")
    old = {"environment": {"commit": "old"}, "quality": {"tracks": 5}}
    out.write_text(json.dumps(old))

    def call(part: str, rows: list[dict]) -> int:
        monkeypatch.setattr(sys, "argv", ["index.py", "--only", part, "--out", str(out)])
        monkeypatch.setattr(made, "measure_speed", lambda *_: {"rows": rows, "repeat": 1, "peers": {}})
        return made.main()

    assert call("speed", []) == 0
    found = json.loads(out.read_text())
    assert found["environment"] == {"commit": "old"} and found["quality"] == {"tracks": 5}
    assert found["speed"]["environment"]["command"].startswith("python bench/index.py --only speed")
    assert call("quality", []) == 0
    found = json.loads(out.read_text())
    assert "environment" not in found and found["quality"]["environment"] and found["speed"]["environment"]
    wrong = {
        "way": "ours, all scores",
        "tracks": 1,
        "width": 1,
        "numbers": "int8",
        "threads": 2,
        "failed": "WRONG",
    }
    assert call("speed", [wrong]) == 1


def test_a_data_loader_over_npy_files_delivers_what_was_written(bench, rng, tmp_path):
    readers, name = bench("stream_readers"), "DataLoader, .npy a track"
    tracks = [
        rng.standard_normal((int(n), readers.CHANNELS)).astype(np.float16) for n in rng.integers(1, 50, 5)
    ]
    source = SimpleNamespace(
        set=None, count=5, tracks=lambda: iter(tracks), made=lambda _, make: make(tmp_path) or tmp_path
    )
    start = readers.PEERS[name](source, 0)
    for _ in range(2):
        ((ids, batch, valid),) = start()
        assert ids == list(range(5)) and valid == [len(track) for track in tracks]
        for row, track in zip(batch.numpy(), tracks, strict=True):
            assert np.array_equal(row[: len(track)], track) and not row[len(track) :].any()
    asked = bench("stream_client").ALL
    assert {peer.workers for peer in asked if peer.name == name} == {0, 2}
    assert {peer.name for peer in asked} == set(readers.PEERS)


def test_ratios_are_taken_within_rounds(record):
    rows = [record.row("a", "limit"), record.row("a", "ours"), record.row("b", "limit")]
    rows[0]["seconds"], rows[1]["seconds"], rows[2]["seconds"] = (
        [1.0, 10.0, 2.0],
        [2.0, 30.0, 2.0],
        [7.0, 7.0, 7.0],
    )
    record.summarize(rows, ("limit",))
    assert rows[1]["ratio_to"]["limit"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert rows[1]["median_seconds"] == 2.0


def test_commands_name_no_folders(record, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/a/b/bench/x.py", "--out", "here/y", "--work=/tmp/z", "--quick", "/abs/path", "rel"]
    )
    assert record.command() == "python bench/x.py --out DIR --work=DIR --quick DIR rel"
