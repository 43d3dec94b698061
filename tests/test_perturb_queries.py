"""A data set of perturbed pieces says what was done to which query, and goes on where it was stopped."""

import csv
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import read_audio
from attr_engine.latents.ingest import encode_piece, file_hash, ingest_audio
from attr_engine.perturb import perturb, perturb_queries

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")
pytest.importorskip("scipy")

from test_perturb import ALL, RATE, hiss, levels  # noqa: E402


class Frames:
    """An encoder: mean, spread and peak of every frame of 800 samples."""

    sample_rate, audio_channels, samples_per_frame, fingerprint = RATE, 1, 800, "frames"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        frames = audio.reshape(len(audio), -1, 800)
        return torch.stack([frames.mean(-1), frames.std(-1), frames.amax(-1)], dim=1)


def make_queries(
    folder: Path,
    rng: np.random.Generator,
    frames: int = 40,
    prefix: str = "q",
    rows: list[dict[str, str]] | None = None,
    loudness: float = 1.0,
) -> LatentDataset:
    """Three pieces of 0.8 to 1.9 s with a metadata table; each has another source, or what ``rows`` say."""
    source = folder / "audio"
    source.mkdir(parents=True)
    more = [{"parents": f"a{i};b{i}"} for i in range(3)] if rows is None else rows
    table = [["path", "id", "tempo", "parents", "family"]]
    for i, seconds in enumerate((0.8, 1.9, 1.2)):
        soundfile.write(source / f"{i}.wav", loudness * hiss(rng, 1, seconds)[0], RATE, subtype="FLOAT")
        table.append(
            [f"{i}.wav", f"{prefix}{i}", 90.5 + i, more[i].get("parents", ""), more[i].get("family", "")]
        )
    with (source / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    ingest_audio(source, folder / "set", Frames(), frames, source / "metadata.csv", ["tempo"])
    return LatentDataset(folder / "set")


def test_a_set_says_what_was_done_to_which_query(rng: np.random.Generator, tmp_path: Path, seed: int) -> None:
    queries, told = make_queries(tmp_path, rng), []
    out = perturb_queries(
        queries, Frames(), tmp_path / "out", 40, seed=seed, progress=lambda *done: told.append(done)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert list(out.ids) == [f"{query} {name} {level}" for query in queries.ids for name, level in ALL]
    for i, (label, info) in enumerate(zip(out.ids, out.info, strict=True)):
        name, level, query = info["perturbation"], info["level"], info["query"]
        number = int(query[1:])
        assert label == f"{query} {name} {level}"
        assert info["parents"] == f"a{number};b{number}"
        assert not {"source", "sha256", "path", "id"} & set(info)
        # The slow, obvious way.
        audio = read_audio(tmp_path / "audio" / f"{number}.wav", RATE, 1)
        draws = np.random.default_rng([seed, zlib.crc32(label.encode())])
        heard = perturb(audio, RATE, name, level, draws)
        whole, heard = heard, heard[:, : 40 * 800]
        assert info["seconds"] == heard.shape[1] / RATE
        assert info["seconds_cut"] == (whole.shape[1] - heard.shape[1]) / RATE
        assert (info["seconds_cut"] > 0) == (number == 1 and name == "tempo" and level in ("0.8", "0.9"))
        given = out.conditioning[i]
        assert given["tempo"] == 90.5 + number
        assert given["seconds_start"] == 0.0
        assert given["seconds_total"] == pytest.approx(info["seconds"], abs=1e-9)
        n = math.ceil(heard.shape[1] / 800)
        padded = np.zeros(n * 800)
        padded[: heard.shape[1]] = heard[0]
        rows = padded.reshape(n, 800)
        expected = np.stack([rows.mean(1), rows.std(1, ddof=1), rows.max(1)])
        assert out.lengths[i] == n
        assert out.batch([i], n).latents[0].double().numpy() == pytest.approx(expected, abs=1e-5)


def test_a_window_is_perturbed_and_not_its_recording(rng: np.random.Generator, tmp_path: Path) -> None:
    source = tmp_path / "audio"
    source.mkdir()
    audio = hiss(rng, 1, 4.9)
    soundfile.write(source / "long.wav", audio[0], RATE, subtype="FLOAT")
    ingest_audio(source, tmp_path / "set", Frames(), 40)
    queries = LatentDataset(tmp_path / "set")
    assert len(queries) == 2
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, {"crop": ["0.5"], "gain": ["-6 dB"]})
    half = np.asarray(out.batch([2], 20).latents[0])
    piece = audio[0, 32000:48000].reshape(20, 800)
    assert half[0] == pytest.approx(piece.mean(1), abs=1e-6)
    assert half[2] == pytest.approx(piece.max(1), abs=1e-6)
    given = [out.conditioning[i] for i in (2, 3)]
    assert [g["seconds_start"] for g in given] == [2.0, 2.0]
    assert [g["seconds_total"] for g in given] == pytest.approx([3.9, 4.9])


def test_missing_and_changed_audio_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, path = make_queries(tmp_path, rng), tmp_path / "audio" / "1.wav"
    soundfile.write(path, hiss(rng, 1, 1.0)[0], RATE)
    with pytest.raises(UserError, match=r"1\.wav is not the file that the query 'q1' was made from"):
        perturb_queries(queries, Frames(), tmp_path / "changed", 40, {"gain": ["-6 dB"]})
    path.unlink()
    with pytest.raises(UserError, match=r"'q1' has no audio at .*1\.wav"):
        perturb_queries(queries, Frames(), tmp_path / "missing", 40, {"gain": ["-6 dB"]})


def test_a_finished_set_is_opened_and_another_one_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, encoder, wanted = make_queries(tmp_path, rng), Frames(), {"gain": ["-6 dB"], "crop": ["0.5"]}
    first = perturb_queries(queries, encoder, tmp_path / "out", 40, wanted)
    calls = encoder.calls
    assert perturb_queries(queries, encoder, tmp_path / "out", 40, wanted).fingerprint == first.fingerprint
    assert encoder.calls == calls
    for options in ({"perturbations": {"gain": ["-6 dB"]}}, {"seed": 1}):
        with pytest.raises(UserError, match=f"another {next(iter(options))}"):
            perturb_queries(queries, encoder, tmp_path / "out", 40, **{"perturbations": wanted, **options})
    with pytest.raises(UserError, match="at least one"):
        perturb_queries(queries, encoder, tmp_path / "none", 40, {})


def test_a_stopped_one_goes_on_to_the_same_set(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attr_engine import perturb as module
    from attr_engine.latents.writer import LatentWriter

    queries, wanted = make_queries(tmp_path, rng), {"noise": levels("noise"), "crop": ["0.25"]}
    whole = perturb_queries(queries, Frames(), tmp_path / "whole", 40, wanted)

    class Stop(Exception):
        pass

    def stop(done: int, count: int) -> None:
        if done == 2:
            raise Stop

    monkeypatch.setattr(module, "LatentWriter", lambda *a, **o: LatentWriter(*a, **o, shard_bytes=1))
    with pytest.raises(Stop):
        perturb_queries(queries, Frames(), tmp_path / "out", 40, wanted, progress=stop)
    encoder = Frames()
    again = perturb_queries(queries, encoder, tmp_path / "out", 40, wanted)
    assert encoder.calls <= 5  # those of the last query; the latent of silence lies in the shards
    assert again.ids == whole.ids
    rows = list(range(len(whole)))
    assert np.array_equal(again.batch(rows, 40).latents, whole.batch(rows, 40).latents)
    assert list(again.info) == list(whole.info)


MIXED = {"mixing": ["12 dB", "0 dB"]}


def test_an_unrelated_piece_is_mixed_in_the_same_at_every_level(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries, chosen = make_queries(tmp_path, rng), set()
    for seed in range(12):
        out = perturb_queries(queries, Frames(), tmp_path / str(seed), 40, MIXED, seed)
        mixed = [info["mixed_with"] for info in out.info]
        assert mixed[::2] == mixed[1::2]
        chosen.update(zip([info["query"] for info in out.info], mixed, strict=True))
        for label, info, i in zip(out.ids, out.info, range(len(out)), strict=True):
            audio, other = (
                read_audio(tmp_path / "audio" / f"{name[1:]}.wav", RATE, 1)
                for name in (info["query"], info["mixed_with"])
            )
            heard = perturb(audio, RATE, "mixing", info["level"], rng, other)
            latent = encode_piece(Frames(), heard, 40)
            assert torch.equal(latent, out.batch([i], latent.shape[1]).latents[0]), label
    assert chosen == {(a, b) for a in queries.ids for b in queries.ids if a != b}


@pytest.mark.parametrize(
    ("rows", "strange"),
    [
        ([{"family": "f"}, {"family": "f+g"}, {"family": "g"}], {0: {2}, 1: set(), 2: {0}}),
        ([{"parents": "q1;x"}, {}, {"parents": "x"}], {0: set(), 1: {2}, 2: {1}}),
        ([{"family": "q1"}, {}, {}], {0: {1, 2}, 1: {0, 2}, 2: {0, 1}}),
    ],
)
def test_relatives_are_not_mixed(
    rows: list[dict[str, str]], strange: dict[int, set[int]], rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng, rows=rows)
    for index, wanted in strange.items():
        if not wanted:
            with pytest.raises(UserError, match=f"holds nothing unrelated to 'q{index}'"):
                perturb_queries(queries, Frames(), tmp_path / "none", 40, MIXED, only=[index])
            continue
        found = set()
        for seed in range(16 if len(wanted) > 1 else 2):
            folder = tmp_path / f"{index} {seed}"
            out = perturb_queries(queries, Frames(), folder, 40, {"mixing": ["6 dB"]}, seed, only=[index])
            assert list(out.ids) == [f"q{index} mixing 6 dB"]
            found.add(int(out.info[0]["mixed_with"][1:]))
        assert found == wanted


def test_others_are_mixed_in_where_they_are_given(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, others = make_queries(tmp_path / "a", rng), make_queries(tmp_path / "b", rng, prefix="o")
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, MIXED, others=others)
    assert {info["mixed_with"] for info in out.info} <= set(others.ids)
    with pytest.raises(UserError, match="another others"):
        perturb_queries(queries, Frames(), tmp_path / "out", 40, MIXED)


def test_kept_audio_is_what_was_encoded_and_what_the_set_names(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries, wanted = make_queries(tmp_path, rng), {"gain": ["full scale"], "noise": ["0 dB"], **MIXED}
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, wanted, keep_audio=True)
    scales = []
    for i, info in enumerate(out.info):
        path = Path(out.extra["root"]) / info["source"]
        assert path.parent == tmp_path / "out" / "audio" and file_hash(path) == info["sha256"]
        assert soundfile.info(path).subtype == "PCM_16"
        audio = read_audio(path, RATE, 1)
        assert audio.shape[1] / RATE == info["seconds"] and info["start"] == 0
        latent = encode_piece(Frames(), audio, 40)
        assert torch.equal(latent, out.batch([i], latent.shape[1]).latents[0])
        draws = np.random.default_rng([0, zlib.crc32(out.ids[i].encode())])
        plain, other = (
            read_audio(tmp_path / "audio" / f"{name[1:]}.wav", RATE, 1)
            for name in (info["query"], info.get("mixed_with", "q0"))
        )
        heard = perturb(plain, RATE, info["perturbation"], info["level"], draws, other)
        assert info["scaled"] == 1 / max(1.0, float(np.abs(heard).max()))
        np.testing.assert_allclose(audio, heard * info["scaled"], atol=2**-14)
        scales.append(info["scaled"])
    assert max(scales) == 1
    assert not (perturb_queries(queries, Frames(), tmp_path / "plain", 40, MIXED).path / "audio").exists()


def test_what_is_beyond_full_scale_is_scaled_down_to_be_kept(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng, loudness=8.0)
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, {"none": ["as it is"]}, keep_audio=True)
    for i, info in enumerate(out.info):
        plain = read_audio(tmp_path / "audio" / f"{i}.wav", RATE, 1)
        assert np.abs(plain).max() > 1
        audio = read_audio(tmp_path / "out" / "audio" / info["source"], RATE, 1)
        np.testing.assert_allclose(audio, plain * info["scaled"], atol=2**-14)
        assert np.abs(audio).max() == pytest.approx(1, abs=2**-14)


def test_some_queries_are_perturbed_alike_alone_and_among_all(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng)
    wanted = {"noise": ["10 dB"], **MIXED}
    whole = perturb_queries(queries, Frames(), tmp_path / "all", 40, wanted)
    some = perturb_queries(queries, Frames(), tmp_path / "some", 40, wanted, only=[2, 0])
    assert list(some.ids) == [*whole.ids[6:], *whole.ids[:3]]
    assert torch.equal(some.batch(range(6), 40).latents, whole.batch([6, 7, 8, 0, 1, 2], 40).latents)
    with pytest.raises(UserError, match="another only"):
        perturb_queries(queries, Frames(), tmp_path / "some", 40, wanted, only=[0])
