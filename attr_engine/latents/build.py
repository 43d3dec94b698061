"""Making a manifest from shards: the one way in which a data set becomes whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.files import whole_file
from attr_engine.latents import native
from attr_engine.latents.errors import DatasetError, ManifestMismatch, ReadError, named
from attr_engine.latents.manifest import MANIFEST, NUMBERS, SEAL, checksum, columns_of, meta_sum, shard_path
from attr_engine.latents.memory import check_ids
from attr_engine.latents.shardfile import FILE_NAME, Contents, read_contents


def shard_files(folder: Path) -> list[str]:
    """Names of the shards in a folder, in their order."""
    return sorted(p.name for p in folder.glob("shard-*.safetensors") if FILE_NAME.fullmatch(p.name))


def contents_of(folder: Path, file: str) -> Contents:
    """What a shard says of itself.

    Raises:
        DatasetError: it cannot be read, or is no shard.
    """
    path = shard_path(folder, file)
    try:
        return read_contents(path)
    except ReadError as error:
        raise named(error, folder / file, None) from None


def shared_of(contents: Contents) -> dict[str, Any]:
    """What all shards of a data set have to agree on."""
    return {
        "format": contents.meta["format"], "dtype": contents.dtype, "channels": contents.channels,
        "padding": contents.meta.get("padding"), "extra": contents.meta.get("extra", {}),
        "fields": {name: [dtype, list(row)] for name, (dtype, row) in contents.fields.items()},
    }  # fmt: skip


def build_manifest(
    folder: Path,
    files: Sequence[str],
    dropped: Iterable[tuple[str, int, str]] = (),
    left_out: Sequence[str] = (),
) -> int:
    """Write the manifest of these shards and return the number of its tracks.

    Args:
        folder: of the data set.
        files: names of its shards, in their order.
        dropped: (file, place in it, id) of tracks to leave out; recorded.
        left_out: names of shards that are not among ``files``; recorded.

    Raises:
        DatasetError: a shard cannot be read or does not fit the first, an id stands twice, or nothing is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    dropped = [item for item in dropped if item[0] in files and item[1] >= 0]
    gone = {(file, row) for file, row, _ in dropped}
    meta: dict[str, Any] = {}
    shards, seen, total = [], set[str](), 0
    path = folder / MANIFEST
    with whole_file(path) as part:
        # Read twice, so that the texts of one shard at a time are in memory: the metadata, which have to list
        # every shard, stand in the schema, and that is written first.
        for file in files:
            contents = contents_of(folder, file)
            shared = shared_of(contents)
            meta = meta or shared
            differs = [key for key in shared if shared[key] != meta[key]]
            if differs:
                raise ManifestMismatch(
                    f"shard {folder / file} has another {differs[0]} than {files[0]}: it belongs to another data set, "
                    "take it away", folder / file,
                )  # fmt: skip
            shards.append([file, contents.size, len(contents.rows), contents.head])
        if not files:
            raise DatasetError(f"there is no shard in {folder}: the source is empty", folder)
        meta = {
            **meta,
            "shards": shards,
            "dropped": [*map(list, dropped), *([file, -1, ""] for file in left_out)],
        }
        schema = _schema(meta)
        with pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
            for index, file in enumerate(files):
                contents = contents_of(folder, file)
                keep = [i for i in range(len(contents.rows)) if (file, i) not in gone]
                check_ids([contents.rows[i][0] for i in keep], seen)
                columns = _columns(index, contents, np.array(keep, dtype=np.int64))
                writer.write_table(pa.table(columns, schema=schema))
                total += len(keep)
        if not total:
            raise DatasetError(f"no track is left in {folder}: ingest again", folder)
        seal(part)
    return total


def _schema(meta: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    kinds = {"id": pa.string(), **{name: pa.from_numpy_dtype(dtype) for name, dtype in NUMBERS.items()}}
    kinds.update({"conditioning": pa.string(), "info": pa.string()})
    for field in meta["fields"]:
        kinds.update({name: pa.from_numpy_dtype(dtype) for name, dtype in columns_of(field).items()})
    return pa.schema(
        list(kinds.items()), metadata={"attr_engine": json.dumps({**meta, "crc32c": meta_sum(meta)})}
    )


def _columns(index: int, contents: Contents, keep: np.ndarray) -> dict[str, Any]:
    rows = [contents.rows[i] for i in keep]
    offsets = contents.offsets[""]
    out: dict[str, Any] = {
        "id": [row[0] for row in rows],
        "shard": np.full(len(keep), index, dtype=np.int32),
        "row": keep.astype(np.int32),
        "start": offsets[keep],
        "frames": offsets[keep + 1] - offsets[keep],
        "crc32c": contents.checksums[""][keep],
        "conditioning": [json.dumps(row[1]) for row in rows],
        "info": [json.dumps(row[2]) for row in rows],
    }
    for name in contents.fields:
        starts = contents.offsets[name]
        values = (starts[keep], starts[keep + 1] - starts[keep], contents.checksums[name][keep])
        out.update(zip(columns_of(name), values, strict=True))
    return out


def seal(path: Path) -> None:
    """Put the checksum of a Parquet file between its last page and its footer."""
    with open(path, "r+b") as file:
        file.seek(-8, 2)
        length, _ = struct.unpack("<I4s", file.read(8))
        end = file.seek(-8 - length, 2)
        footer = file.read()
        file.seek(0)
        value = native.crc32c(footer, checksum(iter(lambda: file.read(min(1 << 20, end - file.tell())), b"")))
        file.seek(end)
        file.write(SEAL + struct.pack("<I", value) + footer)
