"""The peers: other ways to get padded batches of latents from disk.

Every one delivers batches of 32 tracks padded with zeros to 2584 frames in float16 with their valid lengths. A
reader without batching of its own fills one reused buffer; one in a DataLoader gets a collate function that does
so too where it runs in the same process.

Files stay open between passes, except that a memory map is made anew for each pass unless the row says that it is
kept: the pages of a kept map are in the page table already, which a first pass over the data never has.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stream_data import BATCH, CHANNELS, DTYPE, FRAMES, TrackSet

# ids, padded latents ([B, F, C], or [B, C, F] where FRAME_MAJOR says so), valid frames
Batch = tuple[list[int], Any, list[int]]
CHANNEL_MAJOR = {"stable-audio-tools"}
Samples = Iterable[tuple[int, Any]]
Passes = Callable[[], Iterator[Batch]]


class Source:
    """What is on disk, and how much of it a peer runs over."""

    def __init__(self, folder: Path, work: Path, seed: int, share: float, threads: int) -> None:
        self.set, self.work, self.seed, self.threads = TrackSet(folder, seed), work, seed, threads
        self._buffer = np.zeros((BATCH, FRAMES, CHANNELS), dtype=DTYPE)
        self.count = max(2 * BATCH, round(share * len(self.set)))
        self.begins = list(itertools.accumulate(self.set.lengths[: self.count], initial=0))

    @property
    def batches(self) -> list[range]:
        """The tracks of each batch."""
        return [range(i, min(i + BATCH, self.count)) for i in range(0, self.count, BATCH)]

    def maps(self) -> list[np.ndarray]:
        """A memory map of the latents of every shard."""
        return [
            # A plain array over the map: slicing a memmap object costs several microseconds.
            np.asarray(np.memmap(shard.path, DTYPE, "r", shard.offset, (shard.frames, CHANNELS)))
            for shard in self.set.shards
        ]

    def tracks(self) -> Iterator[np.ndarray]:
        """Every track in turn, to write a peer's own format from."""
        maps = self.maps()
        for i in range(self.count):
            start = self.set.starts[i]
            yield maps[self.set.shard_of[i]][start : start + self.set.lengths[i]]

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder of data in a peer's own format; kept once it is whole."""
        folder = self.work / "peers" / f"{name}-{self.count}"
        if not (folder / "whole").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder)
            (folder / "whole").touch()
        return folder

    def filled(self, latent_of_track: Callable[[int], Any], tensor: bool) -> Iterator[Batch]:
        """Batches in a reused buffer, which ``latent_of_track`` fills track by track."""
        buffer: Any = self._buffer
        if tensor:
            import torch

            buffer = torch.from_numpy(buffer)
        for tracks in self.batches:
            valid = [self.set.lengths[i] for i in tracks]
            for row, i in enumerate(tracks):
                buffer[row, : valid[row]] = latent_of_track(i)
                buffer[row, valid[row] :] = 0
            yield list(tracks), buffer[: len(valid)], valid


# A source and a number of workers to something that starts a pass.
Peer = Callable[[Source, int], Passes]


def memmap(kept: bool) -> Peer:
    def peer(source: Source, workers: int) -> Passes:
        maps, tracks = source.maps(), source.set

        def batches() -> Iterator[Batch]:
            own = maps if kept else source.maps()
            return source.filled(
                lambda i: own[tracks.shard_of[i]][tracks.starts[i] : tracks.starts[i] + tracks.lengths[i]],
                False,
            )

        return batches

    return peer


def memmap_tuned(kept: bool) -> Peer:
    """What somebody could make of it: threads, and padding that is in place is not written again."""

    def peer(source: Source, workers: int) -> Passes:
        maps, tracks = source.maps(), source.set
        buffer, dirty = np.zeros((BATCH, FRAMES, CHANNELS), dtype=DTYPE), [0] * BATCH
        pool = ThreadPoolExecutor(source.threads)

        def fill(own: list[np.ndarray], batch: range, first: int) -> None:
            for row in range(first, len(batch), source.threads):
                i = batch[row]
                start, valid = tracks.starts[i], tracks.lengths[i]
                buffer[row, :valid] = own[tracks.shard_of[i]][start : start + valid]
                if dirty[row] > valid:
                    buffer[row, valid : dirty[row]] = 0
                dirty[row] = valid

        def batches() -> Iterator[Batch]:
            own = maps if kept else source.maps()
            for batch in source.batches:
                parts = range(source.threads)
                list(pool.map(fill, [own for _ in parts], [batch for _ in parts], parts))
                yield list(batch), buffer[: len(batch)], [tracks.lengths[i] for i in batch]

        return batches

    return peer


def arrow(kept: bool) -> Peer:
    def peer(source: Source, workers: int) -> Passes:
        import pyarrow as pa

        def make(folder: Path) -> None:
            schema = pa.schema([("latents", pa.large_list(pa.float16()))])
            tracks = source.tracks()
            with (
                pa.OSFile(str(folder / "latents.arrow"), "wb") as file,
                pa.ipc.new_file(file, schema) as writer,
            ):
                for batch in source.batches:
                    offsets = np.cumsum([0, *(source.set.lengths[i] * CHANNELS for i in batch)])
                    values = np.concatenate([next(tracks).reshape(-1) for _ in batch])
                    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
                    writer.write_batch(pa.record_batch([column], schema=schema))

        path = str(source.made("arrow", make) / "latents.arrow")
        first = pa.ipc.open_file(pa.memory_map(path))
        buffer = np.zeros((BATCH, FRAMES, CHANNELS), dtype=DTYPE)

        def batches() -> Iterator[Batch]:
            reader = first if kept else pa.ipc.open_file(pa.memory_map(path))
            for number, tracks in enumerate(source.batches):
                column = reader.get_batch(number).column(0)
                values, ends = column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy().tolist()
                valid = []
                for row in range(len(tracks)):
                    track = values[ends[row] : ends[row + 1]].reshape(-1, CHANNELS)
                    buffer[row, : len(track)] = track
                    buffer[row, len(track) :] = 0
                    valid.append(len(track))
                yield list(tracks), buffer[: len(valid)], valid

        return batches

    return peer


def safetensors_each(framework: str) -> Peer:
    def peer(source: Source, workers: int) -> Passes:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        def make(folder: Path) -> None:
            tracks, pending, size, number = source.tracks(), {}, 0, 0
            for i in range(source.count):
                pending[str(i)] = np.ascontiguousarray(next(tracks))
                size += pending[str(i)].nbytes
                if size >= 256 << 20 or i == source.count - 1:
                    save_file(pending, folder / f"{number:05d}.safetensors")
                    pending, size, number = {}, 0, number + 1

        paths = sorted(source.made("safetensors", make).glob("*.safetensors"))
        files = [safe_open(path, framework=framework) for path in paths]
        where = {int(key): file for file in files for key in file.keys()}  # noqa: SIM118
        return lambda: source.filled(lambda i: where[i].get_tensor(str(i)), framework == "pt")

    return peer


def safetensors_packed(framework: str) -> Peer:
    def peer(source: Source, workers: int) -> Passes:
        from safetensors import safe_open

        files = [safe_open(shard.path, framework=framework) for shard in source.set.shards]
        slices, tracks = [file.get_slice("latents") for file in files], source.set

        def latent(i: int) -> Any:
            return slices[tracks.shard_of[i]][tracks.starts[i] : tracks.starts[i] + tracks.lengths[i]]

        return lambda: source.filled(latent, framework == "pt")

    return peer


def npy(source: Source, workers: int, loader: bool = False) -> Passes:
    def make(folder: Path) -> None:
        for i, track in enumerate(source.tracks()):
            np.save(folder / f"{i:07d}.npy", track)

    folder = str(source.made("npy", make))
    if loader:
        data = Npy(source)
        data.folder = folder
        return _loader(data, workers, Collate()).__iter__
    return lambda: source.filled(lambda i: np.load(f"{folder}/{i:07d}.npy"), False)


class Collate:
    """Pad samples to a batch: in a buffer that is reused, or in new memory in a worker, which sends it away."""

    def __init__(self) -> None:
        self._buffer: Any = None

    def __call__(self, samples: Samples) -> Batch:
        """The batch of some samples."""
        import torch

        samples = list(samples)
        if torch.utils.data.get_worker_info() is not None:
            buffer = torch.zeros(len(samples), FRAMES, CHANNELS, dtype=torch.float16)
        else:
            if self._buffer is None:
                self._buffer = torch.zeros(BATCH, FRAMES, CHANNELS, dtype=torch.float16)
            buffer = self._buffer[: len(samples)]
        valid = []
        for row, (_, track) in enumerate(samples):
            valid.append(len(track))
            buffer[row, : len(track)] = torch.as_tensor(track)
            buffer[row, len(track) :] = 0
        return [int(i) for i, _ in samples], buffer, valid


class Packed:
    """A torch data set over the packed shards; files are opened in the process that reads them."""

    def __init__(self, source: Source) -> None:
        self._set, self._count = source.set, source.count
        self._slices: list[Any] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[int, Any]:
        if not self._slices:
            from safetensors import safe_open

            files = [safe_open(shard.path, framework="pt") for shard in self._set.shards]
            self._slices = [file.get_slice("latents") for file in files]
        start = self._set.starts[i]
        return i, self._slices[self._set.shard_of[i]][start : start + self._set.lengths[i]]


class Npy(Packed):
    """The same over .npy files, one a track, mapped when asked for; copy on write, because torch warns of what it may not write to."""

    folder = ""

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, np.load(f"{self.folder}/{i:07d}.npy", mmap_mode="c")


def _loader(data: Any, workers: int, collate: Any, **more: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        data,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        **{"batch_size": BATCH, **more},
    )


def dataloader(source: Source, workers: int) -> Passes:
    return _loader(Packed(source), workers, Collate()).__iter__


def stable_audio_tools(source: Source, workers: int) -> Passes:
    from stable_audio_tools.data.dataset import LocalDatasetConfig, PreEncodedDataset, collation_fn

    def make(folder: Path) -> None:
        (folder / "0").mkdir(exist_ok=True)
        for i, track in enumerate(source.tracks()):
            padded = np.zeros((CHANNELS, FRAMES), dtype=DTYPE)
            padded[:, : len(track)] = track.T
            stem = f"000{i // BATCH:06d}{i % BATCH:04d}"
            np.save(folder / "0" / f"{stem}.npy", padded)
            mask = [1] * len(track) + [0] * (FRAMES - len(track))
            info = {
                "path": f"{i}.wav", "relpath": f"{i}.wav", "timestamps": [0.0, 1.0], "seconds_start": 0,
                "seconds_total": len(track) * 2048 / 44100, "padding_mask": mask, "prompt": "piano",
            }  # fmt: skip
            (folder / "0" / f"{stem}.json").write_text(json.dumps(info))

    folder = source.made("stable-audio-tools", make)
    data = PreEncodedDataset([LocalDatasetConfig("bench", str(folder))], latent_crop_length=FRAMES)
    loader = _loader(data, workers, collation_fn)

    def batches() -> Iterator[Batch]:
        for latents, infos in loader:
            yield (
                [int(info["path"].removesuffix(".wav")) for info in infos],
                latents,
                [int(info["padding_mask"][0].sum()) for info in infos],
            )

    return batches


def mosaic(source: Source, workers: int) -> Passes:
    from streaming import MDSWriter, StreamingDataset

    def make(folder: Path) -> None:
        columns = {"id": "int", "latents": "ndarray:float16"}
        with MDSWriter(out=str(folder / "mds"), columns=columns, exist_ok=True) as writer:
            for i, track in enumerate(source.tracks()):
                writer.write({"id": i, "latents": track})

    folder = source.made("mosaicml-streaming", make) / "mds"
    collate = Collate()
    data = StreamingDataset(local=str(folder), shuffle=False, batch_size=BATCH)
    loader = _loader(data, workers, lambda samples: collate([(s["id"], s["latents"]) for s in samples]))
    return loader.__iter__


def webdataset(source: Source, workers: int) -> Passes:
    import webdataset as wds

    def make(folder: Path) -> None:
        with wds.ShardWriter(f"{folder}/%05d.tar", maxsize=64 << 20, verbose=0) as writer:
            for i, track in enumerate(source.tracks()):
                file = io.BytesIO()
                np.save(file, track)
                writer.write({"__key__": f"{i:07d}", "npy": file.getvalue()})

    urls = sorted(map(str, source.made("webdataset", make).glob("*.tar")))
    collate = Collate()

    def decode(sample: dict[str, Any]) -> tuple[int, np.ndarray]:
        return int(sample["__key__"]), np.load(io.BytesIO(sample["npy"]))

    data = wds.WebDataset(urls, shardshuffle=False, empty_check=False).map(decode)
    data = data.batched(BATCH, collation_fn=collate, partial=True)
    return _loader(data, workers, None, batch_size=None).__iter__


def litdata(source: Source, workers: int) -> Passes:
    import litdata as ld
    from stream_litdata import sample

    def make(folder: Path) -> None:
        jobs = [(str(source.set.folder), source.seed, i) for i in range(source.count)]
        ld.optimize(
            sample, jobs, str(folder / "data"), num_workers=1, chunk_bytes="64MB", start_method="fork"
        )

    folder = source.made("litdata", make) / "data"
    data, collate = ld.StreamingDataset(str(folder), shuffle=False, drop_last=False), Collate()
    loader = ld.StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0, shuffle=False,
        collate_fn=lambda samples: collate([(s["id"], s["latents"]) for s in samples]),
    )  # fmt: skip
    return lambda: iter(loader)


PEERS: dict[str, Peer] = {
    "numpy memmap": memmap(kept=False),
    "numpy memmap, map kept": memmap(kept=True),
    "numpy memmap, tuned": memmap_tuned(kept=False),
    "numpy memmap, tuned, map kept": memmap_tuned(kept=True),
    "Arrow IPC memory map": arrow(kept=False),
    "Arrow IPC memory map, map kept": arrow(kept=True),
    "safetensors a track, numpy": safetensors_each("np"),
    "safetensors a track, torch": safetensors_each("pt"),
    "safetensors packed, numpy": safetensors_packed("np"),
    "safetensors packed, torch": safetensors_packed("pt"),
    ".npy a track": npy,
    "DataLoader, .npy a track": partial(npy, loader=True),
    "DataLoader, safetensors packed": dataloader,
    "stable-audio-tools": stable_audio_tools,
    "MosaicML streaming": mosaic,
    "webdataset": webdataset,
    "litdata": litdata,
}
