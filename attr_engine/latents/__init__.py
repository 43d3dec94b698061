"""Latents: the format on disk, reading, writing and ingest."""

from attr_engine.latents.batch import Batch, Tracks
from attr_engine.latents.memory import MemoryTracks
from attr_engine.latents.store import LatentDataset
from attr_engine.latents.writer import LatentWriter

__all__ = ["Batch", "LatentDataset", "LatentWriter", "MemoryTracks", "Tracks"]
