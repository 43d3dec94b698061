"""Starts the peers' processes, in an environment of their own that is made when it is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv-peers"
REQUIREMENTS = HERE / "requirements-stream.txt"
# A second copy of one of these would not be the one that attr_engine is measured with.
SHARED = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "pyarrow", "safetensors")
PACKAGES = ("mosaicml-streaming", "webdataset", "litdata", "stable-audio-tools", "pyarrow", "safetensors")


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


_SLOW = ("stable-audio-tools", "MosaicML streaming", "webdataset", "litdata")
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
    Peer("DataLoader, safetensors packed", share=0.25),
    Peer("DataLoader, safetensors packed", 2, 0.25),
    *(Peer(name, workers, 0.25) for name in _SLOW for workers in (0, 2)),
)


def python() -> Path:
    """The Python that the peers run in."""
    path = VENV / "bin" / "python"
    return path if path.exists() else Path(sys.executable)


def install() -> dict[str, str]:
    """Make the environment of the peers and bring it up to date.

    It sees the packages of the environment that runs this, so torch is not installed again.

    Returns:
        The reason for every requirement that could not be installed.
    """
    outer = sysconfig.get_path("purelib")
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    stamp = VENV / "stamp.json"
    key = hashlib.sha256(json.dumps([wanted, outer, sys.version, sys.executable]).encode()).hexdigest()
    if stamp.exists() and json.loads(stamp.read_text())["key"] == key:
        return {}
    print("making bench/.venv-peers (about two minutes)", file=sys.stderr, flush=True)
    venv.create(VENV, clear=True, with_pip=False)
    inner = str(VENV / "bin" / "python")
    paths = subprocess.run(
        [inner, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # addsitedir, and not the bare path, so that editable installs out there are found too.
    (Path(paths.stdout.strip()) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    if subprocess.run([inner, "-m", "pip", "--version"], capture_output=True).returncode:
        subprocess.run([inner, "-m", "ensurepip"], check=True, capture_output=True)
    pins = []
    for name in SHARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # A local part such as +cu130 is no version that an index has, and pip matches without it.
            pins.append(f"{name}=={metadata.version(name).split('+')[0]}")
    constraints = VENV / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    failed = {}
    for requirement in wanted:
        done = subprocess.run(
            [inner, "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraints), requirement],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            failed[requirement.split("==")[0]] = (errors or ["pip failed"])[-1].removeprefix("ERROR: ")[:200]
    if not failed:
        stamp.write_text(json.dumps({"key": key}))
    return failed


def versions() -> dict[str, str]:
    """Versions of the peers' packages, as their own Python sees them."""
    code = (
        "import json, importlib.metadata as m\n"
        f"found = {{d.metadata['Name'].lower(): d.version for d in reversed(list(m.distributions()))}}\n"
        f"print(json.dumps({{n: found[n] for n in {PACKAGES!r} if n in found}}))"
    )
    return json.loads(subprocess.run([str(python()), "-c", code], capture_output=True, text=True).stdout)


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
                [str(python()), "-u", str(HERE / "stream_peers.py"), *map(str, arguments)],
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
