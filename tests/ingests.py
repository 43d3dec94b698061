"""A process that runs small ingests in children, which can be killed at any point.

It reads a line of JSON a job on standard input and answers with one: ``{"code", ...}`` when the child is gone
(``code`` is negative for a signal), with how often each kind of event happened.

Fields of a job: ``kind``, ``source``, ``out``, ``options``; ``shard_bytes``; ``die`` kills the child with SIGKILL:
``["file", n]`` before its n-th change of a file in ``out``, ``["torn", n]`` with half of its n-th file written,
``["add", n]`` before its n-th track.
"""

import functools
import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHANGES = ("os.rename", "os.remove", "os.mkdir", "open")
RATE, FRAME = 8000, 400


class FakeEncoder:
    """Mean, spread and peak of every frame of 400 samples."""

    sample_rate, audio_channels, samples_per_frame, fingerprint = RATE, 1, FRAME, "fake"

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        frames = audio.reshape(len(audio), -1, FRAME)
        return torch.stack([frames.mean(-1), frames.std(-1), frames.amax(-1)], dim=1)


def ingest(kind: str, source: Path, out: Path, /, **options: Any) -> Any:
    """One ingest of any kind."""
    from attr_engine.latents import convert
    from attr_engine.latents.ingest import ingest_audio

    if kind == "audio":
        return ingest_audio(
            source, out, options.pop("encoder", FakeEncoder()), options.pop("frames", 20), **options
        )
    take = {"pre-encoded": convert.ingest_pre_encoded, "webdataset": convert.ingest_webdataset,
            "arrays": convert.ingest_arrays}[kind]  # fmt: skip
    return take(source, out, **options)


def make_source(kind: str, folder: Path, count: int = 12) -> Path:
    """A small source of ``count`` recordings or latents of different lengths."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True)
    if kind == "audio":
        import soundfile

        for i in range(count):
            seconds = (0.3, 3.1, 1.0)[i % 3]  # with 20 frames a window holds a second
            soundfile.write(folder / f"{i:02d}.wav", rng.uniform(-0.5, 0.5, int(seconds * RATE)), RATE)
        return folder
    latents = {f"{i:02d}": rng.normal(size=(3, 4 + i)).astype(np.float32) for i in range(count)}
    rows = {
        name: {"path": name, "prompt": f"piece {name}", "padding_mask": [1] * (x.shape[1] - 1) + [0]}
        for name, x in latents.items()
    }
    if kind == "arrays":
        np.savez(folder / "all.npz", **latents)
        return folder / "all.npz"
    for name, latent in latents.items():
        np.save(folder / f"{name}.npy", latent)
        (folder / f"{name}.json").write_text(json.dumps(rows[name]))
    if kind == "webdataset":
        import tarfile

        for first in range(0, count, 5):
            with tarfile.open(folder / f"{first:02d}.tar", "w") as tar:
                for name in list(latents)[first : first + 5]:
                    for ending in ("npy", "json"):
                        tar.add(folder / f"{name}.{ending}", f"{name}.{ending}")
        for path in (*folder.glob("*.npy"), *folder.glob("*.json")):
            path.unlink()
    return folder


def small_shards(size: int) -> None:
    """Have every ingest of this process write shards of that many bytes."""
    from attr_engine.latents import LatentWriter, convert
    from attr_engine.latents import ingest as audio

    audio.LatentWriter = convert.LatentWriter = functools.partial(LatentWriter, shard_bytes=size)


def _child(job: dict[str, Any], answer: int) -> None:
    out, counts = Path(job["out"]), {"file": 0, "torn": 0, "add": 0}
    what, at = job.get("die") or ("", 0)

    def happens(event: str, path: str = "") -> None:
        counts[event] += 1
        if event == what and counts[event] == at:
            if event == "torn":
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def changes(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event in CHANGES
            and isinstance(arguments[0], str | Path)
            and str(arguments[0]).startswith(str(out))
        ):
            if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
                happens("file")

    from attr_engine.latents import LatentWriter

    fsync, add = os.fsync, LatentWriter.add

    def fsynced(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return fsync(fd)  # not a moment of its own
        happens("torn", f"/proc/self/fd/{fd}")
        fsync(fd)

    def added(*arguments: Any, **more: Any) -> None:
        happens("add")
        add(*arguments, **more)

    os.fsync, LatentWriter.add = fsynced, added
    small_shards(job["shard_bytes"])
    sys.addaudithook(changes)
    report = ingest(job["kind"], Path(job["source"]), out, **job.get("options", {}))
    result = {"tracks": report.tracks, "there": report.there, "notes": report.notes}
    os.write(answer, json.dumps({**counts, **result}).encode())


def main() -> None:
    import pyarrow.parquet  # noqa: F401
    import soundfile  # noqa: F401
    import soxr  # noqa: F401

    import attr_engine.latents.convert  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(json.loads(line), write)
                code = 0
            except BaseException as error:
                os.write(write, json.dumps({"raised": repr(error)}).encode())
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, **json.loads(text or "{}")}), flush=True)


if __name__ == "__main__":
    main()
