"""A process that runs one small attribution in children, which can be killed at any point.

It reads a line of JSON a job on standard input and answers with two: ``{"pid"}`` when the child has
begun and ``{"code", ...}`` when it is gone (``code`` is negative for a signal). It starts no
backward pass of its own, because autograd does not survive a fork.

Fields of a job: ``out``, ``seed``, ``settings``; ``die`` kills the child with SIGKILL: ``["predict", n]`` at its n-th
forward pass, ``["file", n]`` before its n-th change of a file in ``out``, ``["write", n]`` in the middle of the n-th file;
``eager``: checkpoints of the Fisher after every track; ``hold``: waits a minute in the run directory and ends;
``user``: runs as that user id; ``index``: builds an index instead; ``strike``: ``[what, when, bytes]`` takes the disk away
at the forward pass of that number, or when the file of that name is opened: ``limit`` allows files of so many bytes, ``fill``
fills the disk that ``out`` lies on, ``read-only`` makes ``out`` that.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open")


def make(seed: int) -> tuple[Any, Any, Any]:
    """Model, training tracks and queries of a seed."""
    import helpers
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    model = helpers.ToyDenoiser(seed, dtype=torch.float32)
    return model, helpers.make_tracks(rng, 6, 3, 10), helpers.make_tracks(rng, 1, 3, 10, "q")


def small(**changes: Any) -> Any:
    """Settings with something to do in every stage."""
    from attr_engine import SCORE_FUNCTIONS, Settings

    values = {
        "functions": tuple(SCORE_FUNCTIONS),
        "self_influence": ("t1", "t4"),
        "strengths": (1e-2, 1e-3),
        "layers": ("all",),
        "fisher_draws": 2,
        "update_draws": 4,
        "score_draws": 2,
        "replicates": 2,
        "steps": 2,
        "rows": 3,
        "unit_tracks": 2,
    }
    return Settings(**{**values, **changes})


def bits(folder: Path) -> dict[str, bytes]:
    """What has to be the same after any interruption, and whoever shared the work."""
    from attr_engine.pipeline import FISHER, SCORES_CSV, SCORES_PARQUET
    from attr_engine.scoring import EFFECTS

    return {name: (folder / name).read_bytes() for name in (FISHER, EFFECTS, SCORES_PARQUET, SCORES_CSV)}


INDEX = ("features.npy", "solver.safetensors", "tracks.json", "index.json")


def make_index(seed: int, out: Path) -> None:
    """Build a small index, a track a unit."""
    import attr_engine.index

    attr_engine.index._UNIT_TRACKS = 1
    model, tracks, _ = make(seed)
    settings = attr_engine.index.IndexSettings(("all",), draws=4, replicates=2, rank=2, rows=2)
    attr_engine.index.build_index(model, tracks, out, settings)


def strike(what: str, out: Path, size: int = 0) -> None:
    """Take the disk away, for this process or, by ``fill`` and ``read-only``, for all."""
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    elif what == "fill":
        with contextlib.suppress(OSError), open(out.parent / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:  # as it is for all who open a file from now on
        for options in (["--bind", str(out), str(out)], ["-o", "remount,bind,ro", str(out)]):
            subprocess.run(["mount", *options], check=True)


class Forks:
    """Talks to a process that runs this file."""

    def __init__(self) -> None:
        import attr_engine

        self.pid: int | None = None
        here, package = Path(__file__).parent, Path(attr_engine.__file__).parent
        self.process = subprocess.Popen(
            [sys.executable, str(here / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=here,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package.parent)},
        )

    def start(self, **job: Any) -> int:
        """Start a job; returns the child's process id."""
        assert self.process.stdin is not None
        if self.pid is not None:  # a test failed half-way
            os.kill(self.pid, signal.SIGKILL)
            self._line()
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        self.pid = int(self._line()["pid"])
        return self.pid

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> dict[str, Any]:
        """Wait for the job; an exception of any kind but a refusal is the test's."""
        result = self._line()
        self.pid = None
        assert "raised" not in result, result
        return result

    def run(self, **job: Any) -> dict[str, Any]:
        """A job from its start to its end."""
        self.start(**job)
        return self.end()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def check_whole(folder: Path) -> None:
    """Every file under its final name can be read to its end."""
    import numpy as np
    import pyarrow.csv
    import torch
    from safetensors import safe_open

    from attr_engine import Attribution

    for path in folder.rglob("*"):
        if (
            path.is_dir()
            or path.suffix in (".part", ".lock")
            or path.name == ".lock"
            or path.name.startswith(".tmp")
        ):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_bytes().split(b"\n")[:-1])
        elif path.suffix == ".parquet":
            Attribution.from_parquet(path)
        elif path.suffix == ".csv":
            assert pyarrow.csv.read_csv(path).num_rows == 6 * 3 * 2 * 5
        elif path.suffix == ".npy":
            assert np.isfinite(np.load(path, allow_pickle=False)).all()
        else:
            raise AssertionError(f"unexpected file {path}")


def _die_at(what: str, count: int, counts: dict[str, int]) -> None:
    if counts[what] == count:
        os.kill(os.getpid(), signal.SIGKILL)


def _count_writes(write: Callable[[Path], None]) -> None:
    """Call ``write`` with every file that a writer has just filled and that is about to get its final name."""
    chmod = os.chmod  # what whole_file calls in between

    def wrapped(path: Any, *arguments: Any, **more: Any) -> None:
        chmod(path, *arguments, **more)
        if str(path).endswith(".part"):
            write(Path(path))

    os.chmod = wrapped


def _child(job: dict[str, Any], answer: int) -> None:
    import helpers

    import attr_engine.fisher
    from attr_engine import UserError, attribute

    out, counts = Path(job["out"]), {"predict": 0, "file": 0, "write": 0}
    removals: list[int] = []
    what, at = job.get("die") or ("predict", -1)
    taken, when, size = job.get("strike") or ("", "", 0)
    if "user" in job:
        os.setgid(job["user"])
        os.setuid(job["user"])
    if job.get("eager"):
        attr_engine.fisher._SECONDS_BETWEEN_CHECKPOINTS = -1.0

    def changes(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event in CHANGES
            and isinstance(arguments[0], str | Path)
            and str(arguments[0]).startswith(str(out))
        ):
            reading = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if not reading:
                if when and Path(arguments[0]).name == f"{when}.part":
                    strike(taken, out, size)
                counts["file"] += 1
                removals.extend([counts["file"]] if event == "shutil.rmtree" else [])
                _die_at(what, at, counts) if what == "file" else None

    predict = helpers.ToyDenoiser.predict

    def counted(*arguments: Any) -> Any:
        counts["predict"] += 1
        strike(taken, out, size) if counts["predict"] == when else None
        _die_at(what, at, counts) if what == "predict" else None
        if job.get("hold"):
            time.sleep(60)
            os._exit(2)
        return predict(*arguments)

    helpers.ToyDenoiser.predict = counted
    sys.addaudithook(changes)

    def torn(path: Path) -> None:
        counts["write"] += 1
        if what == "write" and counts["write"] == at:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            _die_at(what, at, counts)

    _count_writes(torn)
    result: dict[str, Any] = {}
    try:
        if job.get("index"):
            make_index(job["seed"], out)
        else:
            model, tracks, queries = make(job["seed"])
            attribute(model, tracks, queries, small(**job.get("settings", {})), out)
    except UserError as error:
        result["refused"] = str(error)
    os.write(answer, json.dumps({**counts, "removals": removals, **result}).encode())


def main() -> None:
    import numpy  # noqa: F401
    import pyarrow.csv  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    import attr_engine.index
    import attr_engine.pipeline  # noqa: F401

    torch.set_num_threads(1)
    pid = 0
    for line in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read)
                _child(json.loads(line), write)
                code = 0
            except BaseException as error:
                os.write(write, json.dumps({"raised": repr(error)}).encode())
            finally:
                os._exit(code)
        os.close(write)
        print(json.dumps({"pid": pid}), flush=True)
        # The child is kept until the next job, so that its process id cannot become another's.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with os.fdopen(read) as file:
            text = file.read()
        print(json.dumps({"code": code, **json.loads(text or "{}")}), flush=True)


if __name__ == "__main__":
    main()
