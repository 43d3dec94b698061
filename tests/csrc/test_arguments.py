"""Wrong arguments of the C++ classes are exceptions, whatever they are."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest

from attr_engine.latents import native
from attr_engine.latents.errors import ReadError

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not installed")


def drain(stream):
    count = 0
    while stream.next(1.0) is not None:
        count += 1
    return count


def test_a_raw_stream_reads(call):
    assert drain(call()) == drain(call(threads=0)) == drain(call(map=True)) == -(-call.tracks // 2)


WIDE = 2**63 - 1
WRONG = [
    {"files": None}, {"files": [("x",)]}, {"files": [(3, 3)]}, {"files": [("a\0b", 3)]}, {"files": [("x", 2**63)]},
    {"tensors": [("latents", "F32", 0)]}, {"tensors": [("latents", "F31", 4)]},
    {"tensors": [("latents", "F32", -1)]}, {"tensors": [("latents", "F32", WIDE)]}, {"tensors": []},
    {"shard_of": None}, {"shard_of": [0, 0]}, {"shard_of": np.zeros(3, dtype=np.int64)},
    {"shard_of": np.full(3, 2**31 - 1, dtype=np.int32)}, {"shard_of": np.zeros(0, dtype=np.int32)},
    {"ends": None}, {"ends": np.array([2.0])}, {"ends": np.array([0])}, {"ends": np.array([WIDE])},
    {"ends": np.array([-1])}, {"ends": np.array([2, 1])}, {"ends": np.array([[2]])},
    {"ends": np.array([2], dtype=">i8")}, {"ends": np.arange(20)[::2]},
    {"fields": None}, {"fields": [None]}, {"fields": [{}]}, {"fields": ({},)},
    {"ring": None}, {"ring": bytes(4000)}, {"ring": bytearray(10)}, {"ring": bytearray(0)}, {"ring": "text"},
    {"slot_bytes": 0}, {"slot_bytes": -1}, {"slot_bytes": 7}, {"slot_bytes": 2**64}, {"slot_bytes": 2**64 - 1},
    {"slot_bytes": 1.5}, {"threads": -1}, {"threads": 257}, {"threads": 2**63}, {"threads": 2**64}, {"threads": None},
    {"first": -1}, {"first": 100}, {"first": WIDE}, {"first": 2**63},
    {"tensor": 1}, {"tensor": -1}, {"tensor": 2**64}, {"tensor": None}, {"to": "F8"}, {"to": 3}, {"to": "I64"},
    {"to": "F64"}, {"starts": None}, {"starts": np.zeros(1, dtype=np.int64)}, {"rows": np.zeros(1, dtype=np.int64)},
    {"checksums": np.zeros(1, dtype=np.uint32)}, {"checksums": np.zeros(1)}, {"frames": np.zeros(0, dtype=np.int64)},
    {"frames": np.array([WIDE])}, {"pad_row": bytes(15)}, {"pad_row": 3}, {"pad_row": bytes(17)},
    {"refuse_nonfinite": "yes"}, {"slot_offset": 2**64 - 1}, {"slot_offset": 1}, {"slot_offset": -1},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_a_wrong_argument_is_an_exception(call, wrong):
    with pytest.raises((TypeError, ValueError, KeyError, ReadError, RuntimeError)) as info:
        call(**wrong)
    assert str(info.value)


@pytest.mark.parametrize("name", ["starts", "rows", "frames"])
@pytest.mark.parametrize("value", [-1, WIDE, -WIDE - 1, 2**62, 2**31])
def test_a_wrong_number_in_a_plan_is_an_exception(call, name, value, rng):
    changed = call.field[name].copy()
    changed[int(rng.integers(len(changed)))] = value
    with pytest.raises(ReadError) as info:
        drain(call(**{name: changed}))
    assert info.value.kind in ("argument", "mismatch")


@pytest.mark.parametrize("patience", [-1.0, 0.0, float("nan"), float("inf"), 1e300])
def test_any_patience_will_do_where_nobody_waits(call, patience):
    assert call().next(patience).batch == 0


def test_the_ring_cannot_be_freed_or_moved_under_a_stream(call):
    ring = bytearray(2 * call.slot)
    stream = call(ring=ring)
    slot = stream.next(1.0)
    for held in (stream, slot):
        with pytest.raises(BufferError):
            ring.extend(b"more")
        del held
    del stream
    gc.collect()
    with pytest.raises(BufferError):
        ring.extend(b"more")
    del slot
    gc.collect()
    ring.extend(b"more")


def test_objects_are_made_in_one_way(call):
    module = native.reader("native")
    stream = call()
    for attempt in (
        module.Slot,
        module.Shards,
        module.Stream,
        lambda: copy.copy(stream),
        lambda: pickle.dumps(stream),
    ):
        with pytest.raises(TypeError):
            attempt()


def test_a_row_of_any_size_costs_nothing_where_no_track_has_rows(tmp_path):
    from attr_engine import _native

    (tmp_path / "shard").write_bytes(b"")
    shards = _native.Shards([(str(tmp_path / "shard"), 0)], [("latents", "F16", 2**38)], False)
    nothing = np.zeros(1, dtype=np.int64)
    field = {"tensor": 0, "to": None, "starts": nothing, "rows": nothing, "checksums": None, "frames": nothing,
             "pad_row": None, "refuse_nonfinite": False, "slot_offset": 0}  # fmt: skip
    arguments = (np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.int64), [field], bytearray(64), 64, 0, 0)
    with pytest.raises(Exception, match="its header|ends in"):
        _native.Stream(shards, *arguments).next(0.0)
