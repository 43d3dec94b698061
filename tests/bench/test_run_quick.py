"""``bench/run.py --quick``: the benchmarks run, are right about themselves, and say what they were made with. No times."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    assert done.returncode == 1 and "exit code 1" in done.stdout.splitlines()[-1]


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
