"""Starts the peers' processes, in an environment of their own that is made when it is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers_env import Environment

HERE = Path(__file__).resolve().parent
PEERS = Environment(
    HERE / ".venv-peers", HERE / "requirements-stream.txt",
    ("mosaicml-streaming", "webdataset", "litdata", "stable-audio-tools", "pyarrow", "safetensors"),
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A row of the comparison.

    Attributes:
        name: in ``stream_readers.PEERS``.
        workers: worker processes.
        share: of the tracks that it runs over; slow ones take a part.
    """

    name: str
    workers: int = 0
    share: float = 1.0

    @property
    def row(self) -> str:
        """What it is called in the table."""
        return f"{self.name}, {self.workers} workers" if self.workers else self.name


_SLOW = (
    "DataLoader, .npy a track",
    "DataLoader, safetensors packed",
    "stable-audio-tools",
    "MosaicML streaming",
    "webdataset",
    "litdata",
)
ALL = (
    Peer("numpy memmap"),
    Peer("numpy memmap, map kept"),
    Peer("numpy memmap, tuned"),
    Peer("numpy memmap, tuned, map kept"),
    Peer("Arrow IPC memory map"),
    Peer("Arrow IPC memory map, map kept"),
    Peer("safetensors a track, numpy"),
    Peer("safetensors a track, torch"),
    Peer("safetensors packed, numpy"),
    Peer("safetensors packed, torch"),
    Peer(".npy a track", share=0.25),
    *(Peer(name, workers, 0.25) for name in _SLOW for workers in (0, 2)),
)


class Running:
    """A peer's process.

    Args:
        peer: which.
        folder: the data set.
        work: where it may write its own format.
        seed: of the data.
        threads: of the tuned memory map.
    """

    def __init__(self, peer: Peer, folder: Path, work: Path, seed: int, threads: int) -> None:
        work.joinpath("logs").mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in peer.row)
        self._log = work / "logs" / f"{name}.txt"
        arguments = [peer.name, folder, work, seed, peer.share, threads, peer.workers]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if peer.name == "MosaicML streaming":
            # It leaves lock files behind. Not for all: worker sockets need a short path.
            work.joinpath("tmp").mkdir(exist_ok=True)
            environment["TMPDIR"] = str(work / "tmp")
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [str(PEERS.python()), "-u", str(HERE / "stream_peers.py"), *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=HERE,
                # Workers that outlive their parent are ended with the group.
                env=environment, start_new_session=True,
            )  # fmt: skip

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to ``check`` or ``run``: ``payload`` or ``seconds``, or the reason under ``missing`` or ``failed``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        last = (self._log.read_text().strip().splitlines() or [""])[-1]
        return {"failed": f"the process ended with {code}: {last[:200]}"}

    def close(self) -> None:
        """End the process and its workers."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
