"""Symbolic links are followed within the folder of a data set and refused where they lead out of it."""

import pytest

from attr_engine.latents import LatentDataset, native
from attr_engine.latents.check import verify
from attr_engine.latents.errors import MissingShard, OutsideFolder, UnreadableShard

SHARD = "shard-00000.safetensors"
READERS = [("python", "pread"), ("native", "pread"), ("native", "map")]
READERS = READERS if native.available() else READERS[:1]


def test_a_link_within_the_folder_is_followed(folder, shard, everything):
    whole = everything(folder)
    shard.rename(folder / "blob")
    shard.symlink_to("blob")
    for reader, source in READERS:
        assert everything(folder, reader, source=source) == whole
    assert verify(folder).findings == []


def test_a_link_to_the_folder_is_followed(folder, tmp_path, everything):
    (tmp_path / "link").symlink_to(folder)
    assert everything(tmp_path / "link") == everything(folder)
    assert verify(tmp_path / "link").findings == []


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused(folder, shard, tmp_path, refused, relative):
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to("../elsewhere" if relative else tmp_path / "elsewhere")
    refused(folder, OutsideFolder, SHARD, "symbolic link", "put the file itself there")
    assert [(x.kind, x.file) for x in verify(folder).harmful] == [("OutsideFolder", SHARD)]


def test_a_link_out_of_the_folder_by_way_of_one_within_is_refused(folder, shard, tmp_path, refused):
    shard.rename(tmp_path / "elsewhere")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    shard.symlink_to("inner")
    refused(folder, OutsideFolder, SHARD)


def test_a_link_that_leads_nowhere_is_refused(folder, shard, refused):
    shard.unlink()
    shard.symlink_to("nothing")
    refused(folder, MissingShard, SHARD)
    shard.unlink()
    shard.symlink_to(SHARD)
    refused(folder, UnreadableShard, SHARD)
    assert [(x.kind, x.file) for x in verify(folder).harmful] == [("UnreadableShard", SHARD)]


@pytest.mark.parametrize(("reader", "source"), READERS)
def test_a_shard_that_becomes_a_link_after_it_was_opened_is_not_followed(
    folder, shard, tmp_path, reader, source
):
    data = LatentDataset(folder)
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableShard, match=SHARD):
        next(data.stream(6, reader=reader, source=source))
