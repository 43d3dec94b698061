"""What the machine can do: copies and casts of the same bytes, from ordinary memory, without any files."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from stream_data import BATCH, BUFFERS, CHANNELS, FRAMES, ROW_BYTES, TrackSet

_HUGE = 2 << 20


def timed(jobs: list[Callable[[], None]]) -> float:
    """Seconds that the jobs take, each on a thread of its own; starting the threads is not counted."""
    barrier = threading.Barrier(len(jobs) + 1)

    def work(job: Callable[[], None]) -> None:
        barrier.wait()
        job()

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


class Ring:
    """Memory of the size of a stream's buffers, in huge pages where the kernel gives them, touched once.

    Args:
        item_bytes: bytes of one value in it.
    """

    def __init__(self, item_bytes: int) -> None:
        self.track_bytes = FRAMES * CHANNELS * item_bytes
        size = BUFFERS * BATCH * self.track_bytes
        # The default of Python is shared memory, which does not get huge pages.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.map = mmap.mmap(-1, -(-size // _HUGE) * _HUGE, flags=flags)
        self.map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.bytes[:] = 0

    def place(self, track: int) -> int:
        """The byte at which a track of the sequential order lands."""
        return track % (BUFFERS * BATCH) * self.track_bytes


class Limits:
    """The limits, each a function from a number of threads to seconds.

    Args:
        tracks: where the payload lies.
        frames: the payload in ordinary memory, ``[frames, CHANNELS]``.
    """

    def __init__(self, tracks: TrackSet, frames: np.ndarray) -> None:
        self._frames, self._lengths = frames, np.asarray(tracks.lengths)
        self._begins = np.concatenate([[0], np.cumsum(self._lengths)])[:-1]
        self._half, self._single = Ring(2), Ring(4)
        try:
            native: Any = importlib.import_module("attr_engine._native")
        except ImportError:
            native = None
        self._nontemporal = getattr(native, "copy_nontemporal", None)
        self._cast = getattr(native, "cast", None)
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.restype = None

    def available(self) -> dict[str, Callable[[int], float] | str]:
        """Every limit by name; in place of one that cannot be measured, the reason."""
        missing = "attr_engine._native.{} is not there"
        return {
            "memcpy": self.memcpy,
            "copy, non-temporal": self.nontemporal
            if self._nontemporal
            else missing.format("copy_nontemporal"),
            "cast fp16 to fp32": self.cast if self._cast else missing.format("cast"),
        }

    def memcpy(self, threads: int) -> float:
        """Seconds of libc's memcpy of every track into the ring."""
        return timed([self._copies(range(t, len(self._lengths), threads)) for t in range(threads)])

    def loop_overhead(self) -> float:
        """Seconds that the calls of :meth:`memcpy` take when they copy nothing, on one thread."""
        return timed([self._copies(range(len(self._lengths)), nothing=True)])

    def _copies(self, tracks: range, nothing: bool = False) -> Callable[[], None]:
        memcpy, source = self._memcpy, self._frames.ctypes.data
        target = self._half.bytes.ctypes.data
        # Arguments are made before the clock runs: what is left is one call a track.
        calls = [
            (
                ctypes.c_void_p(target + self._half.place(i)),
                ctypes.c_void_p(source + int(self._begins[i]) * ROW_BYTES),
                ctypes.c_size_t(0 if nothing else int(self._lengths[i]) * ROW_BYTES),
            )
            for i in tracks
        ]

        def run() -> None:
            for to, what, size in calls:
                memcpy(to, what, size)

        return run

    def nontemporal(self, threads: int) -> float:
        """Seconds of the engine's copy with non-temporal stores."""
        return timed([self._views(self._half, 2, t, threads, self._nontemporal) for t in range(threads)])

    def cast(self, threads: int) -> float:
        """Seconds of the engine's cast from float16 to float32."""
        cast = self._cast
        assert cast is not None
        return timed(
            [
                self._views(self._single, 4, t, threads, lambda to, what: cast(to, "F32", what, "F16"))
                for t in range(threads)
            ]
        )

    def _views(
        self,
        ring: Ring,
        item: int,
        first: int,
        step: int,
        call: Callable[[memoryview, memoryview], Any] | None,
    ) -> Callable[[], None]:
        assert call is not None
        source, target = memoryview(self._frames).cast("B"), memoryview(ring.map)
        pairs = []
        for i in range(first, len(self._lengths), step):
            place, size = ring.place(i), int(self._lengths[i]) * CHANNELS * item
            begin = int(self._begins[i]) * ROW_BYTES
            end = begin + int(self._lengths[i]) * ROW_BYTES
            pairs.append((target[place : place + size], source[begin:end]))

        def run() -> None:
            for to, what in pairs:
                call(to, what)

        return run

    def check(self, name: str) -> str:
        """After a run of the limit ``name``: whether the last tracks arrived; the reason where not."""
        ring, dtype = (self._single, np.float32) if name.startswith("cast") else (self._half, np.float16)
        for i in range(max(0, len(self._lengths) - BATCH), len(self._lengths)):
            expected = self._frames[self._begins[i] : self._begins[i] + self._lengths[i]].astype(dtype)
            found = ring.bytes[ring.place(i) :][: expected.nbytes].view(dtype).reshape(expected.shape)
            if not np.array_equal(found, expected):
                return f"track {i} did not arrive"
        return ""
