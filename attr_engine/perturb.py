"""Perturbed versions of queries: how robust is a ranking to what happens to a piece between two people?

Audio is float32 ``[channels, samples]`` throughout; every perturbation gives a new array of that form at the same rate.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.evaluate import families_of, parents_of
from attr_engine.files import whole_file
from attr_engine.latents.audio import read_audio
from attr_engine.latents.ingest import Encoder, Progress, encode_piece, file_hash, padding_of
from attr_engine.latents.manifest import MANIFEST
from attr_engine.latents.recordings import Recordings
from attr_engine.latents.store import LatentDataset
from attr_engine.latents.writer import LatentWriter

MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_CODECS = {"MP3": "MPEG_LAYER_III", "OGG": "VORBIS"}
_LATEST = 4096  # samples that an encoder may put before the first one
_POLES = 4  # of the filters, which run forwards and backwards: twice as steep, and in time
_FILE_COLUMNS = ("source", "sha256", "path", "id", "parent")  # which say where a query's own audio is


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise UserError(
            f"changing pitch or tempo needs {error.name}: pip install 'attr-engine[perturb]'"
        ) from error
    return librosa


def pitch(audio: np.ndarray, rate: int, semitones: float) -> np.ndarray:
    """Move every frequency by semitones at the same length (librosa's phase vocoder, resampled).

    Raises:
        UserError: librosa is missing.
    """
    shifted = _librosa().effects.pitch_shift(audio, sr=rate, n_steps=semitones)
    return np.asarray(shifted, dtype=np.float32)


def tempo(audio: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Play ``factor`` times as fast at the same pitch (librosa's phase vocoder): ``samples / factor`` samples.

    Raises:
        UserError: librosa is missing.
    """
    return np.asarray(_librosa().effects.time_stretch(audio, rate=factor), dtype=np.float32)


def noise(audio: np.ndarray, rate: int, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise whose power over the whole piece lies ``decibels`` below the piece's; to silence, none."""
    added = rng.standard_normal(audio.shape)
    power = np.mean(np.square(audio, dtype=np.float64)) / np.mean(added**2)
    return (audio + added * np.sqrt(power) * 10 ** (-decibels / 20)).astype(np.float32)


def _filter(audio: np.ndarray, rate: int, hz: float, kind: str) -> np.ndarray:
    if not 0 < hz < rate / 2:
        raise UserError(
            f"a {kind}-pass filter at {hz:g} Hz needs audio of more than {2 * hz:g} Hz, this has {rate}: leave it out"
        )
    try:
        from scipy import signal
    except ImportError as error:
        raise UserError(f"filters need {error.name}: pip install 'attr-engine[perturb]'") from error
    sections = signal.butter(_POLES, hz, kind, fs=rate, output="sos")
    return np.asarray(signal.sosfiltfilt(sections, audio, axis=1, padtype=None), dtype=np.float32)


def low_pass(audio: np.ndarray, rate: int, hz: float) -> np.ndarray:
    """Keep what lies below a frequency: -6 dB there, 48 dB less an octave above, no delay (Butterworth, both ways).

    Raises:
        UserError: scipy is missing, or the audio holds no such frequency.
    """
    return _filter(audio, rate, hz, "low")


def high_pass(audio: np.ndarray, rate: int, hz: float) -> np.ndarray:
    """Keep what lies above a frequency, as :func:`low_pass` does below one."""
    return _filter(audio, rate, hz, "high")


def recode(audio: np.ndarray, rate: int, codec: str, level: float) -> np.ndarray:
    """Send audio through an encoder and back, at the same length and place.

    Args:
        audio: as everywhere.
        rate: Hz; MP3 takes ``MP3_RATES`` only.
        codec: ``"MP3"`` (variable bit rate) or ``"OGG"`` (Vorbis).
        level: libsndfile's compression level, from 0 (large and good) to 1 (small; MP3 takes less than 1).

    Returns:
        float64 ``[channels, samples]``, which may go beyond full scale.

    Raises:
        UserError: soundfile is missing, or MP3 has no such rate.
    """
    try:
        import soundfile
    except ImportError as error:
        raise UserError(f"lossy encoding needs {error.name}: pip install 'attr-engine[audio]'") from error
    if codec == "MP3" and rate not in MP3_RATES:
        raise UserError(f"MP3 has no sample rate of {rate} Hz: leave it out, or use OGG")
    packed, samples = io.BytesIO(), audio.shape[1]
    options = {"format": codec, "subtype": _CODECS[codec], "compression_level": level}
    with soundfile.SoundFile(packed, "w", rate, len(audio), **options) as file:
        # libsndfile's Vorbis encoder overflows its stack on long blocks.
        for start in range(0, samples, rate):
            file.write(audio.T[start : start + rate])
    packed.seek(0)
    heard = soundfile.read(packed, dtype="float64", always_2d=True)[0].T
    size = 1 << (samples + heard.shape[1]).bit_length()
    match = np.fft.irfft(np.fft.rfft(heard.mean(0), size) * np.conj(np.fft.rfft(audio.mean(0), size)), size)
    delay = int(np.argmax(match[:_LATEST]))  # of encoders that do not say how much they padded
    back = np.zeros(audio.shape)
    back[:, : heard.shape[1] - delay] = heard[:, delay : delay + samples]
    return back


def lossy(audio: np.ndarray, rate: int, codec: str, level: float) -> np.ndarray:
    """:func:`recode` as float32."""
    return recode(audio, rate, codec, level).astype(np.float32)


def crop(audio: np.ndarray, rate: int, share: float) -> np.ndarray:
    """The first ``share`` of a piece, one sample at least."""
    return audio[:, : max(1, round(audio.shape[1] * share))].copy()


def gain(audio: np.ndarray, rate: int, decibels: float) -> np.ndarray:
    """Louder or softer by decibels."""
    return (audio * 10 ** (decibels / 20)).astype(np.float32)


def full_scale(audio: np.ndarray, rate: int) -> np.ndarray:
    """As loud as can be without clipping: the largest sample becomes 1; silence stays."""
    return (audio / (np.abs(audio).max() or 1.0)).astype(np.float32)


def mixing(audio: np.ndarray, rate: int, decibels: float, other: np.ndarray) -> np.ndarray:
    """Add another piece whose power over the whole lies ``decibels`` below the piece's; to silence, none.

    Of a longer one the start is taken, a shorter one is repeated.

    Raises:
        UserError: the other piece is silent there, which no gain changes.
    """
    samples = audio.shape[1]
    added = np.tile(other, (1, -(-samples // other.shape[1])))[:, :samples].astype(np.float64)
    there = np.mean(added**2)
    if there == 0:
        raise UserError("the other piece is silent over the length of this one: mix in another one")
    power = np.mean(np.square(audio, dtype=np.float64)) / there
    return (audio + added * np.sqrt(power) * 10 ** (-decibels / 20)).astype(np.float32)


Perturbation = Callable[..., np.ndarray]  # of (audio, rate); noise also takes rng, mixing the other piece

# What is done to a piece, and how much of it: (level, function of audio and rate).
PERTURBATIONS: dict[str, tuple[tuple[str, Perturbation], ...]] = {
    "pitch": tuple((f"{n:+d}", partial(pitch, semitones=n)) for n in (-4, -2, -1, 1, 2, 4)),
    "tempo": tuple((f"{f:g}", partial(tempo, factor=f)) for f in (0.8, 0.9, 1.1, 1.25)),
    "noise": tuple((f"{d} dB", partial(noise, decibels=d)) for d in (30, 20, 10, 0)),
    "low-pass": tuple((f"{hz} Hz", partial(low_pass, hz=hz)) for hz in (4000, 1000)),
    "high-pass": tuple((f"{hz} Hz", partial(high_pass, hz=hz)) for hz in (200, 1000)),
    "lossy": (("MP3 high", partial(lossy, codec="MP3", level=0.3)), ("MP3 low", partial(lossy, codec="MP3", level=0.95))),
    "crop": tuple((f"{share:g}", partial(crop, share=share)) for share in (0.75, 0.5, 0.25)),
    "gain": (("full scale", full_scale), *((f"{d} dB", partial(gain, decibels=d)) for d in (-6, -12))),
}  # fmt: skip

NONE, MIXING = "none", "mixing"
_BESIDE: dict[str, tuple[tuple[str, Perturbation], ...]] = {
    MIXING: tuple((f"{d} dB", partial(mixing, decibels=d)) for d in (12, 6, 0)),
    NONE: (("as it is", lambda audio, rate: audio.copy()),),
}


def known() -> dict[str, tuple[tuple[str, Perturbation], ...]]:
    """``PERTURBATIONS``, and what does not happen to a piece alone: ``mixing``, which needs another one, and ``none``."""
    return {**PERTURBATIONS, **_BESIDE}


def perturb(
    audio: np.ndarray, rate: int, perturbation: str, level: str, rng: np.random.Generator, other: np.ndarray | None = None
) -> np.ndarray:  # fmt: skip
    """One entry of :func:`known`.

    Args:
        audio: float32 ``[channels, samples]``.
        rate: Hz.
        perturbation: a key of :func:`known`.
        level: one of its levels.
        rng: of added noise; nothing else draws.
        other: float32 ``[channels, samples'']``, what ``mixing`` adds; nothing else looks at it.

    Returns:
        float32 ``[channels, samples']``.

    Raises:
        UserError: no such entry, a missing library, a rate that it cannot be done at, or nothing to mix in.
    """
    levels = dict(known().get(perturbation, ()))
    if level not in levels:
        names = "; ".join(f"{key} {', '.join(dict(value))}" for key, value in known().items())
        raise UserError(f"there is no perturbation {perturbation!r} of level {level!r}: choose from {names}")
    more: dict[str, Any] = {"rng": rng} if perturbation == "noise" else {}
    if perturbation == MIXING:
        if other is None:
            raise UserError("mixing needs another piece: give one, or leave it out")
        more = {"other": other}
    return levels[level](audio, rate, **more)


def _conditioning(given: Mapping[str, Any], more_seconds: float) -> dict[str, Any]:
    """A query's conditioning for a version of it that lasts longer by some seconds."""
    if "seconds_total" not in given:
        return dict(given)
    return {**given, "seconds_total": float(given["seconds_total"]) + more_seconds}


def _chosen(perturbations: Mapping[str, Sequence[str]] | None) -> list[tuple[str, str]]:
    if perturbations is None:
        perturbations = {name: [level for level, _ in levels] for name, levels in PERTURBATIONS.items()}
    return [(name, level) for name, levels in perturbations.items() for level in levels]


def _kin(name: str, info: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What a piece shares with its relatives: ids of itself, its recording and its sources, names of its families."""
    ids = {name, str(info.get("parent") or name), *parents_of(info)}
    return {("id", x) for x in ids} | {("family", x) for x in families_of(info)}


@dataclass(frozen=True)
class _Maker:
    """Makes the versions of a query; the fields are those of :func:`perturb_queries`."""

    queries: LatentDataset
    encoder: Encoder
    chosen: Sequence[tuple[str, str]]
    frames: int
    seed: int
    others: LatentDataset
    audio: Path | None

    def versions(self, index: int) -> Iterator[tuple[str, np.ndarray, dict[str, Any], dict[str, Any]]]:
        """Id, audio, conditioning and info of every version of one query."""
        queries, rate = self.queries, self.encoder.sample_rate
        recordings = Recordings(rate, self.encoder.audio_channels, "query")
        name, longest = queries.ids[index], self.frames * self.encoder.samples_per_frame
        audio = recordings.audio(queries, index)
        given = queries.batch([index], int(queries.lengths[index])).conditioning[0]
        kept = {key: value for key, value in queries.info[index].items() if key not in _FILE_COLUMNS}
        # One for all levels, so that they differ in nothing but the level.
        partner = self._partner(index) if any(what == MIXING for what, _ in self.chosen) else None
        other = None if partner is None else recordings.audio(self.others, partner)
        for perturbation, level in self.chosen:
            label = f"{name} {perturbation} {level}"
            heard = perturb(audio, rate, perturbation, level, self._rng(label), other)
            cut = max(0, heard.shape[1] - longest)
            heard = heard[:, :longest]
            info = {"query": name, "perturbation": perturbation, "level": level, "kind": "perturbed", "start": 0.0,
                    "seconds": heard.shape[1] / rate, "seconds_cut": cut / rate}  # fmt: skip
            if perturbation == MIXING and partner is not None:
                info["mixed_with"] = self.others.ids[partner]
            more_seconds = (heard.shape[1] - audio.shape[1]) / rate
            if self.audio is not None:
                path = self.audio / f"{index:05d} {perturbation} {level}.flac"
                heard, scale = _keep(path, heard, rate)
                info |= {"source": path.name, "sha256": file_hash(path), "scaled": scale}
            yield label, heard, _conditioning(given, more_seconds), {**kept, **info}

    def _rng(self, label: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(label.encode())])

    def _partner(self, index: int) -> int:
        """A piece of ``others`` that is not known to be related to a query."""
        name = self.queries.ids[index]
        mine = _kin(name, self.queries.info[index])
        rows = enumerate(zip(self.others.ids, self.others.info, strict=True))
        strange = [i for i, row in rows if not mine & _kin(*row)]
        if not strange:
            raise UserError(
                f"{self.others.path} holds nothing unrelated to {name!r}: give others to mix in, or leave it out"
            )
        return int(self._rng(f"{name} {MIXING}").choice(strange))


def _keep(path: Path, audio: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """Write audio as a 16-bit FLAC, scaled down to full scale where it goes beyond; what the file holds, and the factor."""
    import soundfile  # without it there would be no audio to keep

    scale = 1.0 / max(1.0, float(np.abs(audio).max()))
    with whole_file(path) as part:
        soundfile.write(part, (audio * scale).T, rate, format="FLAC", subtype="PCM_16")
    return read_audio(path, rate, len(audio)), scale


def perturb_queries(
    queries: LatentDataset, encoder: Encoder, out: Path, frames: int,
    perturbations: Mapping[str, Sequence[str]] | None = None, seed: int = 0, progress: Progress | None = None,
    only: Sequence[int] | None = None, others: LatentDataset | None = None, keep_audio: bool = False,
) -> LatentDataset:  # fmt: skip
    """Write perturbed versions of queries as a data set; a finished one is opened, an interrupted one goes on.

    A query's audio is read from where the data set says that it lies (the latents of pieces from a sampler are decoded
    there), perturbed at the encoder's rate and encoded. What gets longer than the model takes is cut at its end, and
    ``seconds_cut`` says by how much.

    With ``keep_audio`` the versions lie in ``out/audio`` as 16-bit FLAC, where the data set says so, as it does of any other
    query. What is beyond full scale is then scaled down to it (``scaled``), and the latent is that of the file.

    The conditioning is the query's, ``seconds_total`` longer or shorter by as much as the audio; anything else it says, as
    a tempo, stays, because nobody would know better. The info is the query's with ``query`` (its id), ``perturbation``,
    ``level``, ``seconds`` and ``seconds_cut``; of a mixture also ``mixed_with``.

    Args:
        queries: with audio on disk.
        encoder: the model's autoencoder.
        out: folder of the data set.
        frames: longest piece in frames (the model's).
        perturbations: name to levels, of :func:`known`; default all of ``PERTURBATIONS``.
        seed: of the noise, which is another one for every version, and of the piece that is mixed into a query, the same one at
            every level.
        progress: called with (queries done, queries).
        only: places of the queries that are perturbed, each once; default all.
        others: pieces with audio on disk, of which ``mixing`` takes one that has neither id, recording, family nor sources
            in common with the query; default the queries themselves.
        keep_audio: whether to keep the audio of the versions.

    Returns:
        The data set, the versions of a query one after the other, with ids like ``"<query> pitch +2"``.

    Raises:
        UserError: audio that is missing or has changed, no such perturbation, nothing to mix in, a missing library, or ``out``
            was begun with other settings.
    """
    chosen, out = _chosen(perturbations), Path(out)
    if not chosen or seed < 0:
        raise UserError(f"name at least one perturbation and level, and a seed of at least 0, not {seed}")
    others = queries if others is None else others
    extra = {"from": "perturbations", "queries": queries.fingerprint, "encoder": encoder.fingerprint, "frames": frames,
             "sample_rate": encoder.sample_rate, "samples_per_frame": encoder.samples_per_frame,
             "perturbations": [list(pair) for pair in chosen], "seed": seed}  # fmt: skip
    if only is not None:
        extra["only"] = [int(index) for index in only]
    if any(name == MIXING for name, _ in chosen):
        extra["others"] = others.fingerprint
    if keep_audio:
        extra["root"] = str((out / "audio").resolve())
    if (out / MANIFEST).exists():
        whole = LatentDataset(out)
        if odd := [
            key for key, value in extra.items() if whole.extra.get(key) != json.loads(json.dumps(value))
        ]:
            raise UserError(f"{out} holds a data set with another {', '.join(odd)}: choose another folder")
        return whole
    places = range(len(queries)) if only is None else only
    maker = _Maker(queries, encoder, chosen, frames, seed, others, out / "audio" if keep_audio else None)
    with LatentWriter(out, padding=padding_of(out, encoder), extra=extra) as writer:
        for done, index in enumerate(places):
            if not all(writer.has(f"{queries.ids[index]} {name} {level}") for name, level in chosen):
                for label, audio, given, info in maker.versions(index):
                    if not writer.has(label):
                        writer.add(label, encode_piece(encoder, audio, frames), given, info)
            if progress is not None:
                progress(done + 1, len(places))
    return LatentDataset(out)
