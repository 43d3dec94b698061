"""Small data sets on disk, what damages them, and a small autoencoder."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents import manifest as manifests
from attr_engine.latents.build import seal
from attr_engine.latents.errors import DatasetError

torch.set_num_threads(1)

C = 4
LENGTHS = (5, 1, 9, 3, 7, 2)


def _latents(dtype: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(C, n)).astype(dtype) for n in LENGTHS]


@pytest.fixture
def write() -> Callable[..., list[np.ndarray]]:
    """Write a data set of six tracks ``t0`` ... ``t5`` and return their latents ``[4, n]``."""

    def write_set(out: Path, dtype: Any = np.float32, **options: Any) -> list[np.ndarray]:
        latents = _latents(dtype)
        writer = LatentWriter(out, **options)
        for i, latent in enumerate(latents):
            writer.add(f"t{i}", latent, {"seconds_total": i + 0.5}, {"title": f"piece {i}"})
        writer.close()
        return latents

    return write_set


@pytest.fixture
def folder(tmp_path: Path, write: Callable[..., list[np.ndarray]]) -> Path:
    """A whole data set of one shard."""
    write(tmp_path / "set", padding=np.arange(C, dtype=np.float32))
    return tmp_path / "set"


@pytest.fixture
def shard(folder: Path) -> Path:
    """The shard of that data set."""
    return folder / "shard-00000.safetensors"


@pytest.fixture
def rewrite_header(shard: Path) -> Callable[[Any], None]:
    """Put another header (an object, bytes, or a change of the old one) before the shard's payload.

    It is padded with spaces, so that the file keeps its size unless the header is longer than the old one.
    """
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])

    def rewrite(header: Any) -> None:
        if callable(header):
            header = header(json.loads(data[8 : 8 + length]))
        text = (header if isinstance(header, bytes) else json.dumps(header).encode()).ljust(length)
        shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


def write_manifest(path: Path, columns: dict[str, list[Any]], meta: dict[str, Any]) -> None:
    """Write a manifest with checksums that are right, whatever it says."""
    known = {
        **manifests.NUMBERS,
        **{key: kind for name in meta.get("fields", ()) for key, kind in manifests.columns_of(name).items()},
    }
    arrays = {name: pa.array(values) for name, values in columns.items()}
    for name in known.keys() & arrays.keys():
        try:
            arrays[name] = arrays[name].cast(pa.from_numpy_dtype(known[name]))
        except pa.ArrowException:
            pass  # a lie about the type
    covered = {name: meta[name] for name in manifests._META if name in meta}
    checksum = native.crc32c(json.dumps(covered, sort_keys=True).encode())
    table = pa.table(arrays).replace_schema_metadata(
        {"attr_engine": json.dumps({**meta, "crc32c": checksum})}
    )
    pq.write_table(table, path, write_page_checksum=True)
    seal(path)


@pytest.fixture
def lie(folder: Path) -> Callable[[Callable[[dict[str, list[Any]], dict[str, Any]], Any]], None]:
    """Rewrite the manifest as a liar would: well-formed and with the checksums of the lie."""

    def rewrite(change: Callable[[dict[str, list[Any]], dict[str, Any]], Any]) -> None:
        path = folder / "manifest.parquet"
        table = pq.read_table(path)
        meta = json.loads(table.schema.metadata[b"attr_engine"])
        del meta["crc32c"]
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        change(columns, meta)
        write_manifest(path, columns, meta)

    return rewrite


READERS = [("python", "pread"), ("native", "pread"), ("native", "map")]


def _read(folder: Path, reader: str = "auto", **options: Any) -> tuple[Any, ...]:
    data = LatentDataset(folder)
    latents, conditioning = [], []
    with data.stream(2, 10, reader=reader, **options) as stream:
        for batch in stream:
            latents += [(x.dtype, x.contiguous().view(torch.uint8).numpy().tobytes()) for x in batch.latents]
            for row in batch.conditioning:
                tensors = {
                    key: (x.dtype, x.tolist()) if isinstance(x, torch.Tensor) else x for key, x in row.items()
                }
                conditioning.append(tensors)
    padding = None if data.padding is None else data.padding.tolist()
    texts = (data.ids, list(data.info), list(data.conditioning), data.extra)
    return (*texts, data.channels, data.lengths.tolist(), padding, latents, conditioning)


@pytest.fixture
def everything() -> Callable[..., tuple[Any, ...]]:
    """All that a reader can learn from a data set, as something that compares exactly."""
    return _read


@pytest.fixture
def refused() -> Callable[..., str]:
    """Read a data set in every way: each has to refuse it with the same type and words, which are returned."""

    def read_in_every_way(folder: Path, kind: type[UserError], *says: str, **options: Any) -> str:
        messages = set()
        for reader, source in READERS if native.available() else READERS[:1]:
            with pytest.raises(UserError) as caught:
                _read(folder, reader, source=source, **options)
            assert type(caught.value) is kind, (reader, source, caught.value)
            message = str(caught.value)
            assert "\n" not in message and ":" in message
            for text in says:
                assert text in message, (reader, source, message)
            if isinstance(caught.value, DatasetError) and caught.value.track is not None:
                assert repr(caught.value.track) in message
            messages.add(message)
        return messages.pop()

    return read_in_every_way


@pytest.fixture(scope="session")
def encoder() -> Any:
    """A random Oobleck VAE of 4 channels on mono audio at 16 kHz, 1024 samples a frame; its scale is 2.5."""
    pytest.importorskip("stable_audio_tools")
    from attr_engine.models.autoencoder import Autoencoder, create_pretransform

    torch.manual_seed(0)
    layers = {"channels": 8, "c_mults": [1, 2], "strides": [4, 4], "use_snake": True}
    block = {
        "type": "autoencoder",
        "scale": 2.5,
        "config": {
            "encoder": {"type": "oobleck", "config": {"in_channels": 64, "latent_dim": 2 * C, **layers}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": 64, "latent_dim": C, "final_tanh": False, **layers},
            },
            "bottleneck": {"type": "vae"},
            "latent_dim": C,
            "downsampling_ratio": 1024,
            "io_channels": 1,
            "pretransform": {"type": "patched", "config": {"channels": 1, "patch_size": 64}},
        },
    }
    pretransform = create_pretransform(block, 16000, "test config")
    pretransform.eval().requires_grad_(False)
    return Autoencoder(pretransform, 16000, block, "fingerprint of the encoder")
