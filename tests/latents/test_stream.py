"""Every stream delivers exactly what a loop over the tracks would, whoever reads and wherever it starts."""

import math
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.build import build_manifest
from attr_engine.latents.errors import BuffersHeld, StreamClosed
from attr_engine.latents.header import FLOATS
from attr_engine.latents.plan import Plan
from attr_engine.latents.shardfile import Track, write_shard

READERS = ["native", "python"] if native.available() else ["python"]
DTYPES = sorted(FLOATS)


class Case:
    """A random data set on disk, and the same in memory."""

    def __init__(self, folder, seed, dtype, shards, padded, tensors):
        rng = np.random.default_rng(seed)
        self.folder, self.channels = Path(folder), int(rng.integers(1, 9))
        self.padding = rng.normal(size=self.channels).tolist() if padded else None
        self.dtype = FLOATS[dtype]
        self.longest = int(rng.integers(1, 60))
        self.latents, self.clap, self.tokens, files = [], [], [], []
        for number in range(shards):
            tracks = []
            for _ in range(int(rng.integers(1, 12))):
                n = int(rng.choice([0, 1, self.longest, rng.integers(0, self.longest + 1)]))
                latent = torch.tensor(rng.normal(size=(n, self.channels))).to(self.dtype)
                clap = torch.tensor(rng.normal(size=5), dtype=torch.float32)
                tokens = torch.tensor(rng.integers(0, 99, size=(int(rng.integers(0, 4)), 3)))
                self.latents.append(latent)
                self.clap.append(clap)
                self.tokens.append(tokens)
                extra = {"clap": clap, "tokens": tokens} if tensors else {}
                name = f"t{len(self.latents) - 1}"
                tracks.append(Track(name, latent, extra, f'{{"at": {len(self.latents) - 1}}}', "{}"))
            files.append(f"shard-{number:05d}.safetensors")
            write_shard(self.folder / files[-1], tracks, {"padding": self.padding, "extra": {}})
        build_manifest(self.folder, files)
        self.tensors = tensors

    def __len__(self):
        return len(self.latents)

    def expected(self, tracks, frames, dtype):
        """Ids, padded latents, lengths and conditioning of a batch, by the plainest loop."""
        frames = max(len(self.latents[i]) for i in tracks) if frames is None else frames
        out = torch.zeros(len(tracks), frames, self.channels, dtype=dtype)
        if self.padding is not None:
            out[:] = torch.tensor(self.padding, dtype=torch.float64).to(self.dtype).to(dtype)
        for row, i in zip(out, tracks, strict=True):
            row[: len(self.latents[i])] = self.latents[i].to(dtype)
        return [f"t{i}" for i in tracks], out.transpose(1, 2), [len(self.latents[i]) for i in tracks]


def same(a, b):
    """Equal to the bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_batch(case, batch, tracks, frames, dtype):
    ids, latents, valid = case.expected(tracks, frames, dtype)
    assert list(batch.ids) == ids and batch.valid.tolist() == valid
    assert same(batch.latents, latents)
    assert batch.mask().sum(dim=1).tolist() == valid
    for i, values in zip(tracks, batch.conditioning, strict=True):
        assert values["at"] == i
        assert set(values) == ({"at", "clap", "tokens"} if case.tensors else {"at"})
        if case.tensors:
            assert same(values["clap"], case.clap[i]) and same(values["tokens"], case.tokens[i])


cases = {
    "seed": st.integers(0, 2**32),
    "dtype": st.sampled_from(DTYPES),
    "shards": st.integers(1, 4),
    "padded": st.booleans(),
    "tensors": st.booleans(),
}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)
@given(
    **cases,
    batch=st.integers(1, 9),
    fixed=st.booleans(),
    order=st.sampled_from(["sequential", "shuffle", "length"]),
    ranks=st.integers(1, 3),
    target=st.sampled_from([None, *DTYPES]),
    threads=st.integers(0, 3),
    buffers=st.integers(2, 4),
    source=st.sampled_from(["pread", "map"]),
    checksums=st.booleans(),
    nonfinite=st.sampled_from(["refuse", "allow"]),
    start=st.floats(0, 1),
)
def test_both_readers_deliver_the_plan_bit_for_bit(
    tmp_path_factory, seed, dtype, shards, padded, tensors, batch, fixed, order, ranks, target, threads, buffers, source,
    checksums, nonfinite, start,
):  # fmt: skip
    case = Case(tmp_path_factory.mktemp("set"), seed, dtype, shards, padded, tensors)
    data = LatentDataset(case.folder)
    frames = case.longest if fixed else None
    out = case.dtype if target is None else FLOATS[target]
    options = {"order": order, "seed": seed, "ranks": ranks, "dtype": out, "threads": threads, "buffers": buffers,
               "checksums": checksums, "nonfinite": nonfinite}  # fmt: skip
    for reader in READERS:
        seen = []
        for rank in range(ranks):
            plan = Plan(batch, order, seed, 0, rank, ranks)
            tracks, ends = plan.batches(data.lengths)
            with data.stream(batch, frames, rank=rank, reader=reader, source=source, **options) as stream:
                assert len(stream) == len(ends)
                positions = [stream.position]
                for number, got in enumerate(stream):
                    here = tracks[(ends[number - 1] if number else 0) : ends[number]].tolist()
                    check_batch(case, got, here, frames, out)
                    positions.append(stream.position)
                assert len(positions) == len(ends) + 1
            seen += tracks.tolist()
            first = int(start * len(ends))
            with data.stream(
                batch, frames, rank=rank, reader=reader, position=positions[first], **options
            ) as stream:
                resumed = [list(got.ids) for got in stream]
            everything = [f"t{i}" for i in tracks[(ends[first - 1] if first else 0) :]]
            assert [name for ids in resumed for name in ids] == everything
        assert sorted(seen) == list(range(len(case)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**cases, picks=st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_random_access_gives_any_tracks_in_any_order(
    tmp_path_factory, seed, dtype, shards, padded, tensors, picks
):
    case = Case(tmp_path_factory.mktemp("set"), seed, dtype, shards, padded, tensors)
    data = LatentDataset(case.folder)
    tracks = [pick % len(case) for pick in picks]
    check_batch(case, data.batch(tracks, case.longest + 3), tracks, case.longest + 3, case.dtype)


@pytest.fixture
def case(tmp_path):
    """Four shards of fp16 latents with a padding latent and conditioning tensors."""
    return Case(tmp_path, 7, "F16", 4, True, True)


@pytest.fixture(params=READERS)
def reader(request):
    """Each reader."""
    return request.param


def everything(case, **options):
    with LatentDataset(case.folder).stream(3, case.longest, **options) as stream:
        return [(list(b.ids), b.latents.clone()) for b in stream]


# -- orders ---------------------------------------------------------------------------------------


def test_the_shuffle_depends_on_seed_and_epoch_and_is_the_same_on_every_machine():
    lengths = np.full(100, 5)
    orders = {
        (s, e): Plan(7, "shuffle", s, e).batches(lengths)[0].tolist() for s in range(3) for e in range(3)
    }
    assert len({tuple(order) for order in orders.values()}) == 9
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    # worked out once; another numpy or machine must not give another order
    assert Plan(7, "shuffle", 1, 2).batches(np.full(8, 1))[0].tolist() == [6, 5, 1, 0, 2, 7, 3, 4]


def test_the_shuffle_is_even():
    # the place of one track over many seeds: chi-squared of 10 cells, 9 degrees of freedom; 1e-6 quantile 45.1
    places = np.array(
        [np.flatnonzero(Plan(1, "shuffle", s).batches(np.full(10, 1))[0] == 3)[0] for s in range(2000)]
    )
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 45.1


def test_by_length_pads_least(case):
    data = LatentDataset(case.folder)
    padded = {}
    for order in ("sequential", "length"):
        with data.stream(3, None, order=order) as stream:
            padded[order] = sum(b.latents.shape[0] * b.latents.shape[2] for b in stream)
    assert padded["length"] <= padded["sequential"]
    tracks, _ = Plan(3, "length").batches(data.lengths)
    assert (np.diff(data.lengths[tracks]) >= 0).all()


# -- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_stream_as_tracks_of_one_frame(tmp_path, reader, dtype):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(1000, 24)).astype(dtype)
    writer = LatentWriter(tmp_path / "index", shard_bytes=10_000)
    for i, vector in enumerate(vectors):
        writer.add(str(i), vector[:, None], {}, {})
    writer.close()
    for order in ("sequential", "shuffle"):
        with LatentDataset(tmp_path / "index").stream(128, 1, order=order, reader=reader) as stream:
            blocks = {
                int(i): row for b in stream for i, row in zip(b.ids, b.latents[:, :, 0].clone(), strict=True)
            }
        assert np.array_equal(torch.stack([blocks[i] for i in range(1000)]).numpy(), vectors)


# -- memory ---------------------------------------------------------------------------------------


def test_latents_are_views_of_frame_major_memory_that_outlive_the_stream(case, reader):
    data = LatentDataset(case.folder)
    stream = data.stream(3, case.longest, reader=reader, buffers=3)
    first = next(stream).latents
    kept = first.clone()
    assert first.transpose(1, 2).is_contiguous()
    stream.close()
    del stream, data
    assert same(first, kept)


def test_a_batch_that_is_held_is_not_overwritten(case, reader):
    expected = everything(case, reader="python")
    with LatentDataset(case.folder).stream(3, case.longest, buffers=3, reader=reader) as stream:
        held = next(stream)
        view = held.latents[0, :, :1]
        del held
        assert [list(b.ids) for b in stream] == [ids for ids, _ in expected[1:]]
        assert same(view, expected[0][1][0, :, :1])


@pytest.mark.parametrize("inference", [False, True])
def test_a_batch_changed_in_place_does_not_reach_later_ones(case, reader, inference):
    expected = everything(case, reader="python")
    with torch.inference_mode(inference):
        with LatentDataset(case.folder).stream(3, case.longest, buffers=2, reader=reader) as stream:
            for (ids, latents), batch in zip(expected, stream, strict=True):
                assert list(batch.ids) == ids and same(batch.latents, latents)
                batch.latents[:, 0].mul_(0).add_(7)
                batch.latents.transpose(1, 2)[:, -1] = 3
                batch.latents.detach()[0] += 1


@pytest.mark.skipif(not native.available(), reason="the Python reader has no ring")
def test_holding_every_buffer_is_said_and_can_be_put_right(case):
    with LatentDataset(case.folder).stream(1, case.longest, buffers=2, patience=0.2) as stream:
        held = [next(stream), next(stream)]
        with pytest.raises(BuffersHeld, match="all 2 buffers are held"):
            next(stream)
        del held
        assert next(stream).ids == ["t2"]


# -- position -------------------------------------------------------------------------------------


def test_a_position_of_another_plan_or_data_set_is_refused(case, tmp_path):
    data = LatentDataset(case.folder)
    with data.stream(3, order="shuffle", seed=5) as stream:
        next(stream)
        position = stream.position
    for other in ({"seed": 6}, {"order": "length"}, {"epoch": 1}, {"ranks": 2}):
        with pytest.raises(UserError, match="another plan or another data set"):
            data.stream(3, **{"order": "shuffle", "seed": 5, **other, "position": position})
    with pytest.raises(UserError, match="another plan or another data set"):
        data.stream(4, order="shuffle", seed=5, position=position)
    smaller = LatentDataset(case.folder, exclude=["shard-00002.safetensors"])
    with pytest.raises(UserError, match="another plan or another data set"):
        smaller.stream(3, order="shuffle", seed=5, position=position)
    for wrong in (3, {}, {"batch": "1"}, {**position, "batch": 10**6}, {**position, "batch": -1}):
        with pytest.raises(UserError, match="position"):
            data.stream(3, order="shuffle", seed=5, position=wrong)


# -- use ------------------------------------------------------------------------------------------


def test_threads_that_share_a_stream_get_every_batch_once(case, reader):
    if reader == "python":
        pytest.skip("one thread at a time")
    taken, lock = [], threading.Lock()
    with LatentDataset(case.folder).stream(1, case.longest, buffers=6) as stream:

        def consume():
            for batch in stream:
                with lock:
                    taken.append((batch.ids[0], batch.latents.clone()))

        threads = [threading.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = {ids[0]: latents for ids, latents in
                ((list(b.ids), b.latents) for b in LatentDataset(case.folder).stream(1, case.longest, reader="python"))}  # fmt: skip
    assert len(taken) == len(expected) == len(case)
    assert all(same(latents, expected[name]) for name, latents in taken)


def test_a_closed_stream_says_so(case, reader):
    stream = LatentDataset(case.folder).stream(3, reader=reader)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StreamClosed, match="closed"):
        next(stream)


def test_a_data_set_can_be_pickled(case):
    data = pickle.loads(pickle.dumps(LatentDataset(case.folder, exclude=["shard-00001.safetensors"])))
    assert data.fingerprint == LatentDataset(case.folder, exclude=["shard-00001.safetensors"]).fingerprint


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"batch": 0}, "make no plan"),
        ({"rank": 2, "ranks": 2}, "make no plan"),
        ({"order": "random"}, "sequential, shuffle, length"),
        ({"seed": -1}, "between 0 and"),
        ({"dtype": torch.int64}, "cannot be delivered as"),
        ({"threads": -1}, "threads"),
        ({"buffers": 0}, "buffers"),
        ({"buffers": 1}, "at least 2 buffers"),
        ({"frames": 2**62}, "from 1 to 2"),
        ({"frames": 20.5}, "from 1 to 2"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"device": "nope"}, "no device 'nope'"),
        ({"nonfinite": "no"}, "refuse or allow"),
        ({"source": "disk"}, "pread or map"),
        ({"frames": 1}, "more than the 1 asked for"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(case, options, part):
    with pytest.raises(UserError, match=part) as caught:
        LatentDataset(case.folder).stream(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not native.available(), reason="the Python reader has no ring")
def test_a_ring_that_no_memory_holds_is_refused_in_one_sentence(tmp_path):
    with LatentWriter(tmp_path / "set") as writer:
        for i in range(16):
            writer.add(f"t{i}", np.zeros((4096, 1)), {}, {})
    # 2^50 bytes: a process has 2^48 addresses at most, however much memory the system promises.
    with pytest.raises(UserError, match="no memory for 1") as caught:
        LatentDataset(tmp_path / "set").stream(16, 2**31 - 1)
    assert "\n" not in str(caught.value)


def test_a_number_that_does_not_fit_the_dtype_asked_for_is_refused(tmp_path, reader):
    writer = LatentWriter(tmp_path / "set")
    writer.add("small", np.ones((2, 3), dtype=np.float32), {}, {})
    writer.add("large", np.array([[1.0, 1e5], [1.0, 1.0]], dtype=np.float32), {}, {})
    writer.close()
    data = LatentDataset(tmp_path / "set")
    with data.stream(2, dtype=torch.float16, reader=reader) as stream:
        with pytest.raises(UserError, match="track 'large': its 'latents' does not fit .* first in row 1"):
            next(stream)
    with data.stream(2, dtype=torch.bfloat16, reader=reader) as stream:
        assert torch.isfinite(next(stream).latents).all()
    with data.stream(2, dtype=torch.float16, reader=reader, nonfinite="allow") as stream:
        assert math.isinf(next(stream).latents[1, 0, 1])
