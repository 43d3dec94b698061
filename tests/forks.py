"""A process that runs one small attribution in children, which can be killed at any point.

It reads a line of JSON a job on standard input and answers with two: ``{"pid"}`` when the child has
begun and ``{"code", ...}`` when it is gone (``code`` is negative for a signal). It starts no
backward pass of its own, because autograd does not survive a fork.

Fields of a job: ``out``, ``seed``, ``settings``; ``die`` kills the child with SIGKILL: ``["predict", n]`` at its n-th
forward pass, ``["file", n]`` before its n-th change of a file in ``out``, ``["write", n]`` in the middle of the n-th file;
``eager``: checkpoints of the Fisher after every track; ``hold``: waits a minute in the run directory and ends;
``user``: runs as that user id.
"""

import json
import os
import signal
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
    import attr_engine.fisher
    from attr_engine import UserError, attribute

    out, counts = Path(job["out"]), {"predict": 0, "file": 0, "write": 0}
    removals: list[int] = []
    what, at = job.get("die") or ("predict", -1)
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
                counts["file"] += 1
                removals.extend([counts["file"]] if event == "shutil.rmtree" else [])
                _die_at(what, at, counts) if what == "file" else None

    model, tracks, queries = make(job["seed"])
    predict = model.predict

    def counted(*arguments: Any) -> Any:
        counts["predict"] += 1
        _die_at(what, at, counts) if what == "predict" else None
        if job.get("hold"):
            time.sleep(60)
            os._exit(2)
        return predict(*arguments)

    model.predict = counted
    sys.addaudithook(changes)

    def torn(path: Path) -> None:
        counts["write"] += 1
        if what == "write" and counts["write"] == at:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            _die_at(what, at, counts)

    _count_writes(torn)
    result: dict[str, Any] = {}
    try:
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
