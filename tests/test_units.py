"""Units are computed once, by whichever process is free; workers may be slow, die and come back: the bits are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

import attr_engine
from attr_engine import UserError, attribute, units
from attr_engine.runs import LOCKS
from attr_engine.units import held, once, run_units

HERE = Path(__file__).parent


def test_every_unit_is_computed_once_and_in_any_order(tmp_path, rng):
    paths = [tmp_path / f"{i}" for i in range(7)]
    paths[3].touch()
    seen, shown = [], []
    run_units(paths, lambda i: (seen.append(i), paths[i].touch()), None, tmp_path / "lock", shown.append)
    assert sorted(seen) == [0, 1, 2, 4, 5, 6]
    assert shown[0] == 1 and shown[-1] == 7 and shown == sorted(shown)
    run_units(paths, lambda i: seen.append(i), None, tmp_path / "lock")
    assert len(seen) == 6


def test_what_was_made_of_all_units_ends_the_work(tmp_path):
    finished = tmp_path / "finished"
    finished.touch()
    run_units([tmp_path / "a"], lambda i: pytest.fail("computed"), finished, tmp_path / "lock")
    with once(tmp_path / "once.lock", finished) as mine:
        assert not mine
    with once(tmp_path / "once.lock", tmp_path / "other") as mine:
        assert mine


def test_what_others_finish_is_counted_once(tmp_path, monkeypatch, rng):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(units, "_SECONDS_BETWEEN_COUNTS", -1.0)
    paths, shown = [tmp_path / "units" / f"{i}" for i in range(12)], []
    (tmp_path / "units").mkdir()
    others = iter(rng.permutation(12).tolist())

    def compute(i):
        paths[i].touch()
        paths[next(others)].touch()

    def show(done):
        assert done == sum(p.exists() for p in paths)
        shown.append(done)

    run_units(paths, compute, None, tmp_path / "lock", show)
    assert shown[0] == 0 and shown[-1] == 12 and shown == sorted(shown)


def test_where_others_have_put_the_units_together_all_are_done(tmp_path):
    paths, finished, shown = [tmp_path / "units" / f"{i}" for i in range(3)], tmp_path / "finished", []
    run_units(paths, lambda i: finished.touch(), finished, tmp_path / "lock", shown.append)
    assert shown[0] == 0 and shown[-1] == 3


def test_an_error_leaves_the_unit_to_others(tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]

    def fails(i):
        raise UserError("no")

    with pytest.raises(UserError):
        run_units(paths, fails, None, tmp_path / "lock")
    run_units(paths, lambda i: paths[i].touch(), None, tmp_path / "lock")
    assert all(p.exists() for p in paths)


def test_a_unit_that_is_held_is_left_alone_until_it_is_free(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(attr_engine.__file__).parent.parent)!r})
from pathlib import Path
from attr_engine.units import held
with held(Path({str(tmp_path / "lock-1.lock")!r})) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    paths, seen = [tmp_path / f"{i}" for i in range(3)], []
    with held(tmp_path / "lock-1.lock") as mine:
        assert not mine

    def compute(i):
        seen.append(i)
        paths[i].touch()
        if len(seen) == 2:  # the others are done: the holder dies
            os.kill(other.pid, signal.SIGKILL)
            other.wait()

    run_units(paths, compute, None, tmp_path / "lock")
    assert seen == [0, 2, 1]


class Workers:
    """Several processes of one run."""

    def __init__(self, out, seed, sleeps, **changes) -> None:
        package = str(Path(attr_engine.__file__).parent.parent)
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(out), str(seed), json.dumps(changes), str(sleep)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE,
                env={
                    **os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "RANK": str(i),
                    "WORLD_SIZE": str(len(sleeps)),
                },
            )
            for i, sleep in enumerate(sleeps)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()

    def go(self) -> None:
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()

    def results(self) -> list[dict]:
        """What the processes that were not killed say."""
        out = []
        for process in self.processes:
            line, errors = process.communicate(timeout=120)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                out.append(json.loads(line))
        return out


def alone(seed, out, **changes):
    model, tracks, queries = forks.make(seed)
    attribute(model, tracks, queries, forks.small(**changes), out)
    return forks.bits(out)


def test_several_processes_give_the_bits_of_one(seed, tmp_path):
    workers = Workers(tmp_path / "shared", seed, [0.0, 0.0, 0.0])
    workers.go()
    results = workers.results()
    assert forks.bits(tmp_path / "shared") == alone(seed, tmp_path / "alone")
    assert len(results) == 3 and len({r["first"] for r in results}) == 1
    whole = sum(r["passes"] for r in results)
    # 3 passes of each process compare the first rows; everything else is done once, by somebody.
    model, tracks, queries = forks.make(seed)
    passes, predict = [], model.predict
    model.predict = lambda *a: passes.append(0) or predict(*a)
    attribute(model, tracks, queries, forks.small(), tmp_path / "counted")
    assert whole - 3 * 3 <= len(passes) - 3
    left = {p.name for p in (tmp_path / "shared").iterdir()}
    assert "units" not in left and "fisher" not in left and LOCKS not in left


def test_a_slow_process_holds_nobody_up(seed, tmp_path):
    changes = {"unit_tracks": 1, "rows": 2}
    workers = Workers(tmp_path / "shared", seed, [0.1, 0.0], **changes)
    workers.go()
    slow, fast = workers.results()
    assert slow["passes"] < fast["passes"]
    assert forks.bits(tmp_path / "shared") == alone(seed, tmp_path / "alone", **changes)


def test_killed_workers_are_replaced_and_the_bits_stay(seed, rng, tmp_path):
    reference = alone(seed, tmp_path / "alone")
    out = tmp_path / "shared"
    for _ in range(3):
        workers = Workers(out, seed, [0.01, 0.01, 0.01])
        workers.go()
        time.sleep(float(rng.uniform(0.1, 1.5)))
        for i in rng.choice(3, 2, replace=False):
            workers.processes[i].kill()
        if rng.integers(2):
            workers.processes[0].kill()
            workers.processes[1].kill()
            workers.processes[2].kill()
        workers.results()
    assert Workers(out, seed, [0.0]).processes[0].communicate("go\n", timeout=120)
    assert forks.bits(out) == reference


def test_a_process_that_does_not_belong_to_them_is_refused(seed, tmp_path):
    workers = Workers(tmp_path / "shared", seed, [0.2, 0.2])
    workers.go()
    while not (tmp_path / "shared" / "config.json").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process works in"):
        alone(seed, tmp_path / "shared")
    for process in workers.processes:
        process.kill()
    workers.results()
