"""``bench/kills.py`` with few kills: nothing is lost, and the benchmark would see it if it were."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "kills.py"


@pytest.fixture(scope="module")
def kills():
    spec = importlib.util.spec_from_file_location("bench_kills", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.slow
def test_killed_at_random_moments_every_result_is_the_same(tmp_path, seed):
    out, work = tmp_path / "kills.json", tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--results", "4", "--seed", str(seed), "--out", str(out), "--work", str(work)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["passed"] and result["identical"] == result["results"] == len(result["jobs"]) == 4
    moments = [kill for job in result["jobs"] for kill in job["kills"]]
    assert result["kills"] == len(moments) == sum(result["by_stage"].values()) >= 4
    assert all(job["kills"] and job["units"] == 18 for job in result["jobs"])
    assert result["units_begun_again"] <= result["processes_killed"] and result["units_finished_twice"] == 0
    assert "identical results | 4" in done.stdout and not list(work.iterdir())
    assert str(tmp_path) not in out.read_text() and str(ROOT) not in out.read_text()


def test_a_difference_or_work_done_twice_does_not_pass(kills, tmp_path):
    (tmp_path / "run" / "updates").mkdir(parents=True)
    for name in ("a", ".lock", "timings-1.json", "environment.json", "updates/b"):
        (tmp_path / "run" / name).write_bytes(b"1")
    before = kills.contents("run", tmp_path / "run")
    assert before == {"a": b"1", "updates/b": b"1"}
    (tmp_path / "run" / "left.part").touch()
    assert kills.contents("run", tmp_path / "run") != before

    log = tmp_path / "log"
    log.write_text("begin score 1\nbegin score 1\nend score 1\nbegin fisher 0\nend fisher 0\n")
    assert kills.units(log) == {"units": 2, "begun": 3, "twice": 0}
    log.write_text("begin score 1\nend score 1\nbegin score 1\nend score 1\n")
    assert kills.units(log) == {"units": 1, "begun": 2, "twice": 1}

    job = {"kind": "run", "processes": 2, "error": "", "identical": True, "units": 9, "begun": 10, "twice": 0,
           "kills": [{"seconds": 0.1, "stage": "fisher", "killed": 1}]}  # fmt: skip
    assert kills.summary([job])["passed"]
    for worse in ({"identical": False}, {"error": "x"}, {"begun": 11}, {"twice": 1}):
        assert not kills.summary([{**job, **worse}])["passed"]


def test_a_kill_that_comes_too_late_does_not_count_and_a_failure_is_told(kills, tmp_path, monkeypatch):
    begun = []

    def start(kind, out, seed, rank, world):
        """A process that ends at once; of the first two jobs ``stays``, that of rank 1 stays until it is killed."""
        begun.append((kind, rank))
        pid = os.fork()
        if pid == 0:
            if kind == "stays" and rank == 1 and begun.count(("stays", 1)) == 1:
                signal.pause()
            os._exit(3 if kind == "fails" else 0)
        return pid

    monkeypatch.setattr(kills, "start", start)
    late = kills.play("run", tmp_path / "x", 0, 2, iter([(60.0, [0, 1])]).__next__)
    assert late["kills"] == [] and late["error"] == ""
    plan = iter([(0.05, [1]), None])
    hit = kills.play("stays", tmp_path / "x", 0, 2, lambda: next(plan))
    assert [kill["killed"] for kill in hit["kills"]] == [1] and hit["error"] == ""
    assert "exit code 3" in kills.play("fails", tmp_path / "x", 0, 2, lambda: None)["error"]
    monkeypatch.setattr(kills, "PATIENCE", 0.05)
    begun.clear()
    assert "did not end" in kills.play("stays", tmp_path / "x", 0, 2, lambda: None)["error"]
