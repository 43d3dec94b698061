"""Units are computed once, by whichever process is free; workers may be slow, die and come back: the bits are the same."""

import errno
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
from attr_engine.index import IndexSettings, build_index
from attr_engine.runs import LOCKS, open_run
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


def holder(lock: Path, then: str) -> subprocess.Popen:
    """A process that holds a lock and does ``then``."""
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(attr_engine.__file__).parent.parent)!r})
from pathlib import Path
from attr_engine.units import held
with held(Path({str(lock)!r})) as mine:
    print(mine, flush=True)
    {then}
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with held(lock) as mine:
        assert not mine
    return other


def test_a_unit_that_is_held_is_left_alone_until_it_is_free(tmp_path):
    other = holder(tmp_path / "lock-1.lock", "time.sleep(60)")
    paths, seen = [tmp_path / f"{i}" for i in range(3)], []

    def compute(i):
        seen.append(i)
        paths[i].touch()
        if len(seen) == 2:  # the others are done: the holder dies
            os.kill(other.pid, signal.SIGKILL)
            other.wait()

    run_units(paths, compute, None, tmp_path / "lock")
    assert seen == [0, 2, 1]


def test_a_stopped_process_keeps_its_unit_and_the_others_wait_for_it(tmp_path):
    paths, seen, shown = [tmp_path / f"{i}" for i in range(3)], [], []
    then = f"os.kill(os.getpid(), signal.SIGSTOP); Path({str(paths[1])!r}).touch()"
    other = holder(tmp_path / "lock-1.lock", then)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED)

    def progress(done):
        shown.append(done)
        if shown.count(2) == 5:  # the others are done, and were looked at again and again
            other.send_signal(signal.SIGCONT)

    run_units(paths, lambda i: (seen.append(i), paths[i].touch()), None, tmp_path / "lock", progress)
    assert seen == [0, 2] and other.wait(600) == 0, "it went on with its unit, and nobody else did that one"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(number, seed, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("attr_engine.units.fcntl.flock", flock)
    with pytest.raises(UserError, match=r"a.lock cannot be locked \(.*\): choose another --out"):
        with held(tmp_path / "a.lock"):
            pass
    model, tracks, queries = forks.make(seed)
    with pytest.raises(UserError, match="cannot be locked"):
        attribute(model, tracks, queries, forks.small(), tmp_path / "run")
    with pytest.raises(UserError, match="cannot be locked"):
        build_index(model, tracks, tmp_path / "index")


def test_a_folder_of_locks_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    opened, tries = os.open, []

    def removed(path, *more):
        tries.append(path)
        if len(tries) < 4:
            os.rmdir(tmp_path / "locks")
        return opened(path, *more)

    monkeypatch.setattr("attr_engine.units.os.open", removed)
    with held(tmp_path / "locks" / "a.lock") as mine:
        assert mine and len(tries) == 4


def as_rank(monkeypatch, rank, world=2):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_a_newcomer_leaves_the_files_of_living_processes_alone(tmp_path, monkeypatch):
    part = tmp_path / "units" / "000000.safetensors.part"
    as_rank(monkeypatch, 0)
    with open_run(tmp_path, forks.small()) as run:
        run.record()
        part.parent.mkdir()
        part.touch()
        as_rank(monkeypatch, 1)
        with open_run(tmp_path, forks.small()):
            assert part.exists()
    with open_run(tmp_path, forks.small()):
        assert not part.exists(), "nobody else is there any more"


def test_two_processes_of_one_rank_or_one_alone_beside_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("attr_engine.runs._SECONDS_TO_WAIT", 0.2)
    as_rank(monkeypatch, 1)
    with open_run(tmp_path, forks.small()):
        with (
            pytest.raises(UserError, match="another process of rank 1 works in"),
            open_run(tmp_path, forks.small()),
        ):
            pass
        as_rank(monkeypatch, 0, 1)
        with pytest.raises(UserError, match="another process works in"), open_run(tmp_path, forks.small()):
            pass
        as_rank(monkeypatch, 0)
        with open_run(tmp_path, forks.small()):
            pass
    as_rank(monkeypatch, 0, 1)
    with open_run(tmp_path, forks.small()):
        as_rank(monkeypatch, 1)
        with pytest.raises(UserError, match="another process works in"), open_run(tmp_path, forks.small()):
            pass


def stopped_at(model, n):
    """The same model, which raises at its n-th pass from now on."""
    predict, passes = type(model).predict, []

    def until(*arguments):
        passes.append(0)
        if len(passes) == n:
            raise KeyboardInterrupt
        return predict(model, *arguments)

    model.predict = until
    return passes


def test_units_of_another_model_are_refused_by_name(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    stopped_at(model, 6)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, tracks, queries, forks.small(), tmp_path)
    assert len(list((tmp_path / "fisher").iterdir())) == 2
    other, _, _ = forks.make(seed + 1)
    with pytest.raises(
        UserError, match=r"fisher/00.safetensors belongs to other settings, another model or other data"
    ):
        attribute(other, tracks, queries, forks.small(), tmp_path)
    assert not (tmp_path / "fisher.safetensors").exists()


def test_an_index_begun_with_other_settings_is_refused_by_name_before_any_work(seed, tmp_path, monkeypatch):
    monkeypatch.setattr("attr_engine.index._UNIT_TRACKS", 1)
    model, tracks, _ = forks.make(seed)
    settings = dict(layers=("all",), draws=2, replicates=2, rank=2)
    stopped_at(model, 8)
    with pytest.raises(KeyboardInterrupt):
        build_index(model, tracks, tmp_path / "index", IndexSettings(**settings))
    there = {p: p.read_bytes() for p in (tmp_path / "index" / "units").iterdir()}
    assert len(there) > 1
    other, others, _ = forks.make(seed + 1)
    for change in ({"rank": 3}, {"ridge": 0.2}):
        name, value = next(iter(change.items()))
        with pytest.raises(UserError, match=rf"\({name}: .* -> {value}\): use the same"):
            build_index(model, tracks, tmp_path / "index", IndexSettings(**settings | change))
    with pytest.raises(UserError, match=r"\(another model; another data\)"):
        build_index(other, others, tmp_path / "index", IndexSettings(**settings))
    assert {p: p.read_bytes() for p in (tmp_path / "index" / "units").iterdir()} == there
    model, _, _ = forks.make(seed)
    passes = stopped_at(model, 0)
    build_index(model, tracks, tmp_path / "index", IndexSettings(**settings))
    model, all_passes = forks.make(seed)[0], []
    predict = model.predict
    model.predict = lambda *a: all_passes.append(0) or predict(*a)
    whole = build_index(model, tracks, tmp_path / "whole", IndexSettings(**settings))
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "index" / path.name).read_bytes()
    assert len(passes) <= len(all_passes) - len(there) + 1, (
        "the units that were there are kept"
    )  # begun.json is none


class Workers:
    """Several processes of one run."""

    def __init__(self, out, seed, sleeps, more=(), **changes) -> None:
        package = str(Path(attr_engine.__file__).parent.parent)
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(out), str(seed), json.dumps(changes), str(sleep),
                 *(more if i == 0 else ())],
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

    def go(self, *which: int) -> None:
        """Start some of them, or all."""
        for process in [self.processes[i] for i in which] or self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()

    def results(self, failed="") -> list[dict]:
        """What the processes that were not killed say, but for one that ends with the error ``failed``."""
        out = []
        for process in self.processes:
            line, errors = process.communicate(timeout=600)
            if failed and failed in errors:
                assert process.returncode == 1
                failed = ""
            elif process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                out.append(json.loads(line))
        assert not failed
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
    changes, start = {"unit_tracks": 1, "rows": 2}, time.monotonic()
    expected = alone(seed, tmp_path / "alone", **changes)
    # A pass of the slow one takes five times as long as one of these 99, however busy the machine is.
    workers = Workers(
        tmp_path / "shared", seed, [max(0.1, 4 * (time.monotonic() - start) / 99), 0.0], **changes
    )
    workers.go()
    slow, fast = workers.results()
    assert slow["passes"] < fast["passes"]
    assert forks.bits(tmp_path / "shared") == expected


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
    assert Workers(out, seed, [0.0]).processes[0].communicate("go\n", timeout=600)
    assert forks.bits(out) == reference


def test_a_process_that_does_not_belong_to_them_is_refused(seed, tmp_path):
    workers = Workers(tmp_path / "shared", seed, [600.0, 600.0])  # they are there until they are killed
    workers.go()
    while not (tmp_path / "shared" / "config.json").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process works in"):
        alone(seed, tmp_path / "shared")
    for process in workers.processes:
        process.kill()
    workers.results()


def test_a_unit_that_failed_in_one_process_is_done_by_another(seed, rng, tmp_path):
    flag = tmp_path / "flag"
    workers = Workers(
        tmp_path / "shared", seed, [0.0, 0.0], more=("fail", str(rng.integers(6, 30)), str(flag))
    )
    # Both at once, the other might leave the first one fewer passes than it takes to fail.
    workers.go(0)
    while not flag.exists() and workers.processes[0].poll() is None:
        time.sleep(0.01)
    workers.go(1)
    (other,) = workers.results(failed="this process had enough")
    # Rank 0 writes the tables; the same command does what is left.
    assert (
        attribute(*forks.make(seed), forks.small(), tmp_path / "shared").top(1, "q0")[0].track
        == other["first"]
    )
    assert forks.bits(tmp_path / "shared") == alone(seed, tmp_path / "alone")


@pytest.mark.slow
def test_torchrun_starts_killed_workers_again(seed, rng, tmp_path):
    """Elastic restart: one worker is killed, torchrun starts the group anew, and nothing is lost."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
    ]
    command += [str(HERE / "worker.py"), str(tmp_path / "shared"), str(seed), "{}", "0.01"]
    command += ["kill", str(rng.integers(5, 40)), str(tmp_path / "flag")]
    package = str(Path(attr_engine.__file__).parent.parent)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=HERE,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the two makes 40 of the 99 passes. The other may be ended before it is ready.
    assert (tmp_path / "flag").exists() and done.stdout.count("ready") in (3, 4)
    assert forks.bits(tmp_path / "shared") == alone(seed, tmp_path / "alone")
