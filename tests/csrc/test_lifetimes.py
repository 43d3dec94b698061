"""Streams of the C++ extension from Python: threads, signals, forks, early and late ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attr_engine.latents import native
from attr_engine.latents.errors import BuffersHeld, StreamClosed

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not installed")

TRACKS = 40


def is_right(batch, expected):
    assert torch.equal(batch.latents, expected.latents) and list(batch.ids) == list(expected.ids)
    assert torch.equal(batch.valid, expected.valid)
    for mine, other in zip(batch.conditioning, expected.conditioning, strict=True):
        assert mine["text"] == other["text"] and torch.equal(mine["tokens"], other["tokens"])


def batches(data, size=4, frames=30):
    """The batches of a sequential stream, each in memory of its own."""
    places = range(0, TRACKS, size)
    return [data.batch(range(i, min(i + size, TRACKS)), frames) for i in places]


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_outlives_its_stream_and_its_data_set(data, threads):
    expected = batches(data)
    stream = data.stream(4, 30, threads=threads, buffers=3)
    held = [next(stream), next(stream)]
    tensors = [batch.latents[0] for batch in held]
    for path in data.path.iterdir():
        path.unlink()
    stream.close()
    del stream, data
    gc.collect()
    is_right(held[0], expected[0])
    del held
    gc.collect()
    assert all(torch.equal(a, b.latents[0]) for a, b in zip(tensors, expected, strict=False))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held():
    """Threads and open files, by name."""
    gc.collect()
    return {f"{what} {name}" for what in ("task", "fd") for name in os.listdir(f"/proc/self/{what}")}


@pytest.mark.parametrize("source", ["pread", "map"])
def test_a_thousand_streams_leave_nothing(data, source):
    def use(count):
        for i in range(count):
            stream = data.stream(4, 30, threads=i % 4, buffers=3, source=source)
            kept = [next(stream) for _ in range(i % 3)]
            if i % 5 == 0:
                del stream  # before its batches
            del kept

    use(100)
    # A thread that was joined stands in /proc until the kernel has cleared it away: one that is there before may be
    # gone afterwards, so that names are compared and not numbers, and the last ones are waited for.
    before, size = held(), resident()
    use(1000)
    until = time.monotonic() + 30
    while (left := held() - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left
    assert resident() - size < 8 << 20


def test_closing_from_another_thread_ends_the_wait(data):
    for threads in (0, 2):
        stream = data.stream(4, 30, threads=threads, buffers=2, patience=60)
        held = [next(stream), next(stream)]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(next, stream) for _ in range(3)]
            time.sleep(0.05)
            stream.close()
            for future in waiting:
                with pytest.raises(StreamClosed):
                    future.result(timeout=30)
        is_right(held[0], batches(data)[0])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_closing_at_any_moment_while_threads_read(data, threads, rng):
    expected = batches(data, 2)
    for _ in range(30):
        stream = data.stream(2, 30, threads=threads, buffers=5)

        def read(stream=stream):
            try:
                for batch in stream:
                    is_right(batch, expected[int(batch.ids[0][1:]) // 2])
            except StreamClosed:
                pass

        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(read) for _ in range(3)]
            time.sleep(float(rng.uniform(0, 0.005)))
            stream.close()
            for future in futures:
                future.result(timeout=30)


# -- sharing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
def test_threads_get_every_batch_of_a_stream_once(data, threads):
    expected = batches(data, 1)
    stream = data.stream(1, 30, threads=threads, buffers=8)
    seen = Counter()

    def read():
        for batch in stream:
            is_right(batch, expected[int(batch.ids[0][1:])])
            seen.update(batch.ids)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(read) for _ in range(4)]:
            future.result(timeout=60)
    assert seen == Counter(data.ids)


def test_two_streams_at_once(data):
    expected = batches(data)
    one, two = data.stream(4, 30, buffers=2), data.stream(4, 30, buffers=2, threads=1, source="map")
    for a, b, c in zip(one, two, expected, strict=True):
        is_right(a, c)
        is_right(b, c)


def change(batch, how):
    x = batch.latents
    if how == "inference":
        with torch.inference_mode():
            x[0].fill_(7)
            x.mul_(7)
    elif how == "view":
        x.detach()[:, 0].fill_(7)
    elif how == "out":
        torch.add(x, 7, out=x)
    elif how == "list":
        torch._foreach_mul_([x], 7)
    else:
        for values in batch.conditioning:
            values["tokens"].zero_()
        x.transpose(1, 2)[...] = 7


@pytest.mark.parametrize("how", ["inference", "view", "out", "list", "item"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_change_in_place_does_not_reach_later_batches(data, how, inside):
    expected = batches(data, 3)
    with torch.inference_mode(inside):
        for i, batch in enumerate(data.stream(3, 30, buffers=2)):
            is_right(batch, expected[i])
            if i % 3 != 1:
                change(batch, how)


def test_held_buffers_are_said_after_the_patience(data):
    stream = data.stream(4, 30, buffers=2, patience=0.3)
    held = [next(stream), next(stream)]
    for _ in range(2):
        with pytest.raises(BuffersHeld, match="all 2 buffers are held"):
            next(stream)
    del held[0]
    gc.collect()
    is_right(next(stream), batches(data)[2])


# -- signals, forks, the end of the process -------------------------------------------------------


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a process that a shell put into the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_interrupts_the_wait(data, interruptible):
    stream = data.stream(4, 30, buffers=2, patience=3600)
    held = [next(stream), next(stream)]
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()  # in here: on a slow machine it may be over before the wait begins
        next(stream)
    timer.join()
    del held
    is_right(next(stream), batches(data)[2])  # and the stream goes on


PRELUDE = """
import gc, os, sys, threading, time, torch
torch.set_num_threads(1)
from attr_engine.latents import LatentDataset
from attr_engine.latents.errors import StreamClosed
data = LatentDataset(sys.argv[1])
streams = [data.stream(4, 30, threads=n, buffers=3) for n in (0, 1, 3)]
held = [next(stream) for stream in streams]
first = held[0].latents.clone()
"""

FORK = """
def child(end):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    for stream in streams:
        try:
            next(stream)
        except StreamClosed as error:
            assert "forked" in str(error)
        else:
            os._exit(9)
    assert all(torch.equal(batch.latents, first) for batch in held)
    end()
    os._exit(8)

def reopen():
    assert len(list(data.stream(4, 30, buffers=12))) == 10
    assert torch.equal(next(data.stream(4, 30)).latents, first)
    os._exit(0)

def drop():
    streams.clear(); held.clear(); gc.collect()
    assert torch.equal(next(data.stream(4, 30)).latents, first)
    sys.exit(0)

def close():
    for stream in streams:
        stream.close()
    sys.exit(0)

for end in (reopen, drop, close, lambda: sys.exit(0), lambda: os._exit(0)):
    assert child(end) == 0, end
held.clear()
for stream in streams:
    assert sum(1 for _ in stream) == 9
print("done")
"""

ENDS = {
    "the last line": "",
    "sys.exit": "sys.exit(0)",
    "held in a cycle": "streams.append(streams); held.append(held); del streams, held",
    "held by a module": "sys.keep = held; torch.keep = streams; del streams, held",
    "in a waiting thread": """
held += [next(streams[2]), next(streams[2])]
def wait():
    try:
        next(streams[2])
    except StreamClosed:
        pass
threading.Thread(target=wait, daemon=True).start()
time.sleep(0.2)
""",
    "os._exit": "os._exit(0)",
}


def run(code, folder):
    command = [sys.executable, "-c", PRELUDE + code, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_fork_leaves_the_parent_its_streams(data):
    result = run(FORK, data.path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_with_streams_and_batches_alive(data, end):
    result = run(ENDS[end], data.path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
