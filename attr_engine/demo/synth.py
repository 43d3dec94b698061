"""Synthesis: every instrument as numpy arithmetic on one note, and the mix of a song in its room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attr_engine.demo.compose import DRUMS, HAT, KICK, OPEN_HAT, RIM, SHAKER, SNARE, TOM, Song
from attr_engine.perturb import MP3_RATES, recode

PEAK = 10 ** (-1 / 20)  # -1 dBFS
TOP = 0.46  # the highest partial, as a share of the sample rate: a little under Nyquist
TABLE = 8192
LEVELS = {"lead": 1.0, "comp": 0.5, "bass": 0.75, "pad": 0.33, DRUMS: 0.6}
SENDS = {"lead": 1.0, "comp": 0.8, "bass": 0.15, "pad": 1.0, DRUMS: 0.35}  # how much reaches the room


@dataclass(frozen=True)
class Tone:
    """One note to play: its frequency, the samples the key is held, the sample rate, the force 0 to 1."""

    hz: float
    gate: int
    rate: int
    force: float

    def partials(self, limit: int, ratio: float = 1.0) -> int:
        """How many harmonics of `ratio` times the pitch fit under the highest frequency, `limit` at most."""
        return max(1, min(limit, int(TOP * self.rate / (self.hz * ratio))))

    def soften(self, amplitudes: np.ndarray, corner: float) -> np.ndarray:
        """Roll the harmonics off above a corner frequency, as bodies and bells of instruments do."""
        return amplitudes / (1 + (self.hz * np.arange(1, len(amplitudes) + 1) / corner) ** 2)

    def time(self, release: float) -> np.ndarray:
        """Seconds since the onset, up to the end of the release."""
        return np.arange(self.gate + int(release * self.rate)) / self.rate

    def envelope(self, time: np.ndarray, attack: float, release: float) -> np.ndarray:
        """One while held, with raised-cosine sides, so that no note begins or ends with a click."""
        rise = 0.5 - 0.5 * np.cos(np.pi * np.minimum(time / attack, 1.0))
        fall = 0.5 + 0.5 * np.cos(np.pi * np.clip((time - self.gate / self.rate) / release, 0.0, 1.0))
        return rise * fall

    def noise(self, count: int, low: float, high: float) -> np.ndarray:
        """Noise in a band; the same note always gets the same noise."""
        rng = np.random.default_rng([int(self.hz * 100), count])
        return _band(rng.standard_normal(count), low, high, self.rate)


def _band(noise: np.ndarray, low: float, high: float, rate: int) -> np.ndarray:
    """Keep what lies between two frequencies, with gentle sides, at unit RMS."""
    hz = np.fft.rfftfreq(len(noise), 1 / rate) + 1e-9
    shape = 1 / np.sqrt((1 + (low / hz) ** 4) * (1 + (hz / high) ** 4))
    out = np.fft.irfft(np.fft.rfft(noise) * shape, len(noise))
    return out / (np.sqrt(np.mean(out**2)) + 1e-12)


def _cycles(
    tone: Tone,
    time: np.ndarray,
    vibrato: float = 0.0,
    speed: float = 5.2,
    cents: float = 0.0,
    onset: float = 0.25,
) -> np.ndarray:
    """Elapsed cycles of a note, with a vibrato in semitones that sets in after the onset."""
    hz = tone.hz * 2 ** (cents / 1200)
    if not vibrato:
        return hz * time
    depth = hz * (2 ** (vibrato / 12) - 1) / (2 * np.pi * speed)
    return hz * time + depth * np.clip(time / onset - 0.6, 0.0, 1.0) * (1 - np.cos(2 * np.pi * speed * time))


def _phases(count: int) -> np.ndarray:
    """Where each harmonic starts: spread out, as in-phase harmonics would add up to a buzzing pulse."""
    return np.exp(2.4j * np.arange(count) ** 2)


def _wave(amplitudes: Sequence[float] | np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Read one cycle of a harmonic spectrum at the given cycles, interpolating."""
    spectrum = np.zeros(TABLE // 2 + 1, dtype=np.complex128)
    spectrum[1 : len(amplitudes) + 1] = -0.5j * TABLE * np.asarray(amplitudes) * _phases(len(amplitudes))
    cycle = np.fft.irfft(spectrum, TABLE)
    cycle = np.append(cycle, cycle[0])
    place = (cycles % 1.0) * TABLE
    # A remainder can round up to exactly one cycle.
    index = np.minimum(place.astype(np.int64), TABLE - 1)
    return cycle[index] + (cycle[index + 1] - cycle[index]) * (place - index)


def _ringing(amplitudes: np.ndarray, cycles: np.ndarray, fade: np.ndarray, dull: np.ndarray) -> np.ndarray:
    """Harmonics that all fade, each one faster than the one below it by the factor `dull`."""
    turn = np.exp(2j * np.pi * cycles)
    partial = turn * fade
    turn *= dull
    weights = amplitudes * _phases(len(amplitudes))
    total = weights[0].real * partial.imag
    for weight in weights[1:]:
        partial *= turn
        total += weight.real * partial.imag
        total += weight.imag * partial.real
    return total


def _piano(tone: Tone) -> np.ndarray:
    time = tone.time(0.18)
    k = np.arange(1, tone.partials(26) + 1)
    amplitudes = tone.soften(np.abs(np.sin(np.pi * k / 7.3)) / k ** (1.7 - 0.6 * tone.force), 3600)
    rate = 0.55 * (tone.hz / 220) ** 0.7
    fade = 0.6 * np.exp(-3.2 * rate * time) + 0.4 * np.exp(-rate * time)
    dull = np.exp(-0.45 * rate * time)
    strings = sum(_ringing(amplitudes, _cycles(tone, time, cents=c), fade, dull) for c in (-0.8, 0.9))
    hammer = tone.noise(len(time), 300, 1800) * np.exp(-time / 0.012) * 0.05 * tone.force
    return (strings + hammer) * tone.envelope(time, 0.003, 0.17)


def _electric_piano(tone: Tone) -> np.ndarray:
    time = tone.time(0.15)
    phase = 2 * np.pi * tone.hz * time
    # Carson's rule keeps the sidebands of the modulation under the highest frequency.
    room = max(0.0, TOP * tone.rate / tone.hz - 2)
    index = min(2.4 * tone.force * min(1.0, (280 / tone.hz) ** 0.6), room) * np.exp(-time * 2.2)
    body = np.sin(phase + index * np.sin(phase)) * np.exp(-time * 0.9 * (tone.hz / 260) ** 0.5)
    ratio = next((r for r in (14, 9, 6, 4) if tone.partials(r) == r), 1)
    tine = 0.22 * tone.force * np.sin(ratio * phase) * np.exp(-time * 11)
    tremolo = 1 + 0.13 * np.sin(2 * np.pi * 4.6 * time)
    return (body + tine) * tremolo * tone.envelope(time, 0.004, 0.14)


def _organ(tone: Tone) -> np.ndarray:
    time = tone.time(0.07)
    bars = np.zeros(16)
    bars[[0, 1, 2, 3, 5, 7, 15]] = (0.7, 0.9, 0.55, 0.6, 0.35, 0.3, 0.2)  # harmonics of the octave below
    low = Tone(tone.hz / 2, tone.gate, tone.rate, tone.force)
    cycles = _cycles(low, time, vibrato=0.07, speed=6.4, onset=0.1)
    shimmer = 1 + 0.1 * np.sin(2 * np.pi * 6.4 * time + 0.7)
    click = tone.noise(len(time), 800, 3000) * np.exp(-time / 0.006) * 0.06
    return (_wave(bars[: low.partials(16)], cycles) * shimmer + click) * tone.envelope(time, 0.009, 0.06)


def _guitar(tone: Tone) -> np.ndarray:
    time = tone.time(0.12)
    k = np.arange(1, tone.partials(32) + 1)
    amplitudes = tone.soften(np.abs(np.sin(np.pi * k * 0.19)) / k ** (1.4 - 0.6 * tone.force), 4200)
    rate = 1.1 * (tone.hz / 200) ** 0.6
    strings = _ringing(amplitudes, _cycles(tone, time), np.exp(-rate * time), np.exp(-0.55 * rate * time))
    body = tone.noise(len(time), 90, 260) * np.exp(-time / 0.03) * 0.16
    return (strings + body) * tone.envelope(time, 0.002, 0.11)


def _flute(tone: Tone) -> np.ndarray:
    time = tone.time(0.12)
    cycles = _cycles(tone, time, vibrato=0.28, speed=5.1)
    dark = _wave([1, 0.12, 0.05][: tone.partials(3)], cycles)
    bright = _wave([1, 0.45, 0.22, 0.09, 0.04][: tone.partials(5)], cycles)
    blow = np.clip(tone.force * (0.55 + 0.35 * np.sin(2 * np.pi * 5.1 * time)), 0, 1)
    breath = tone.noise(len(time), tone.hz * 0.8, min(tone.hz * 4, 0.4 * tone.rate))
    puff = 0.035 + 0.13 * np.exp(-time / 0.05)
    return (dark + (bright - dark) * blow + breath * puff) * tone.envelope(time, 0.055, 0.11)


def _clarinet(tone: Tone) -> np.ndarray:
    time = tone.time(0.08)
    k = np.arange(1, tone.partials(19) + 1)
    amplitudes = tone.soften(np.where(k % 2 == 1, 1.0, 0.06) / k ** (1.5 - 0.45 * tone.force), 2600)
    cycles = _cycles(tone, time, vibrato=0.1, speed=4.7)
    swell = 0.8 + 0.2 * np.clip(time / 0.3, 0, 1)
    return _wave(amplitudes, cycles) * swell * tone.envelope(time, 0.032, 0.07)


def _brass(tone: Tone) -> np.ndarray:
    time = tone.time(0.1)
    k = np.arange(1, tone.partials(30) + 1)
    scoop = 0.02 * tone.hz / 220 * np.exp(-time / 0.03)
    cycles = _cycles(tone, time, vibrato=0.16, speed=5.4, onset=0.35) - scoop
    dark, bright = _wave(0.55 ** (k - 1.0), cycles), _wave(tone.soften(k**-0.75, 3200), cycles)
    bite = tone.force * (0.55 + 0.45 * np.exp(-time / 0.12)) * np.clip(time / 0.07, 0, 1)
    return (dark + (bright - dark) * bite) * tone.envelope(time, 0.03, 0.09)


def _ensemble(tone: Tone, time: np.ndarray, amplitudes: np.ndarray, vibrato: float) -> np.ndarray:
    """Three players of one part, a little out of tune and of step with one another."""
    players = ((-9, 4.7, 0.0), (2, 5.4, 0.37), (10, 6.0, 0.71))
    cycles = [_cycles(tone, time, vibrato, speed, cents) + start for cents, speed, start in players]
    return _wave(amplitudes, np.stack(cycles)).sum(axis=0)


def _strings(tone: Tone) -> np.ndarray:
    time = tone.time(0.28)
    k = np.arange(1, tone.partials(28) + 1)
    amplitudes = tone.soften((1 + 0.6 * np.sin(1.7 * k)) / k**1.15, 4000)
    bow = tone.envelope(time, min(0.13, 0.5 * tone.gate / tone.rate), 0.27)
    return _ensemble(tone, time, amplitudes, 0.14) * bow


def _choir(tone: Tone) -> np.ndarray:
    time = tone.time(0.3)
    hz = tone.hz * np.arange(1, tone.partials(40) + 1)
    formants = ((620, 160, 1.0), (1080, 190, 0.5), (2500, 320, 0.12), (3300, 400, 0.06))
    vowel = sum(level * np.exp(-(((hz - centre) / width) ** 2)) for centre, width, level in formants)
    amplitudes = (vowel + 0.05) / np.arange(1, len(hz) + 1) ** 0.6
    air = tone.noise(len(time), 1500, 5000) * 0.012
    breath = tone.envelope(time, min(0.11, 0.5 * tone.gate / tone.rate), 0.29)
    return (_ensemble(tone, time, amplitudes, 0.25) + air) * breath


def _modal(tone: Tone, time: np.ndarray, modes: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Free vibrations: (ratio to the pitch, level, seconds to fade to 1/e) each, those in band."""
    total = np.zeros(len(time))
    for ratio, level, fade in modes:
        if ratio * tone.hz < TOP * tone.rate:
            total += level * np.sin(2 * np.pi * ratio * tone.hz * time) * np.exp(-time / fade)
    return total


def _bells(tone: Tone) -> np.ndarray:
    time = tone.time(1.1)
    ratio = 3.51  # inharmonic, as struck metal is
    room = max(0.0, (TOP * tone.rate / tone.hz - 1) / ratio - 1)
    index = min(1.6 * tone.force * min(1.0, (420 / tone.hz) ** 0.5), room) * np.exp(-time / 0.45)
    phase = 2 * np.pi * tone.hz * time
    metal = np.sin(phase + index * np.sin(ratio * phase)) * np.exp(-time / 0.8)
    metal += _modal(tone, time, ((2.76, 0.25, 0.3), (0.5, 0.15, 0.9)))
    return metal * tone.envelope(time, 0.002, 1.0)


def _marimba(tone: Tone) -> np.ndarray:
    time = tone.time(0.25)
    length = 0.34 * (330 / tone.hz) ** 0.5
    modes = ((1, 1, length), (3.93, 0.38 * tone.force, length / 4), (9.2, 0.16, length / 9))
    wood = _modal(tone, time, modes)
    stick = tone.noise(len(time), 500, 2500) * np.exp(-time / 0.008) * 0.09 * tone.force
    return (wood + stick) * tone.envelope(time, 0.002, 0.24)


def _synth(tone: Tone) -> np.ndarray:
    time = tone.time(0.12)
    k = np.arange(1, tone.partials(36) + 1)
    sweep = np.exp(-time / 0.22) * (0.4 + 0.6 * tone.force)
    total = np.zeros(len(time))
    for cents in (-8, 8):
        cycles = _cycles(tone, time, 0.1, 5.8, cents)
        dark, bright = _wave(1 / k * np.exp(-k / 3.5), cycles), _wave(1 / k, cycles)
        total += dark + (bright - dark) * sweep
    return total * tone.envelope(time, 0.006, 0.11)


def _bass(tone: Tone) -> np.ndarray:
    time = tone.time(0.07)
    k = np.arange(1, tone.partials(14) + 1)
    amplitudes = np.abs(np.sin(np.pi * k * 0.28)) / k**1.25
    string = _ringing(amplitudes, _cycles(tone, time), np.exp(-0.9 * time), np.exp(-1.3 * time))
    return string * tone.envelope(time, 0.006, 0.06)


def _synth_bass(tone: Tone) -> np.ndarray:
    time = tone.time(0.06)
    k = np.arange(1, tone.partials(24) + 1)
    dark, bright = _wave(0.35 ** (k - 1.0), tone.hz * time), _wave(1 / k, tone.hz * time)
    return (dark + (bright - dark) * 0.75 * np.exp(-time / 0.11)) * tone.envelope(time, 0.005, 0.05)


# fmt: off
VOICES: dict[str, Callable[[Tone], np.ndarray]] = {
    "piano": _piano, "electric piano": _electric_piano, "organ": _organ, "guitar": _guitar, "flute": _flute,
    "clarinet": _clarinet, "brass": _brass, "strings": _strings, "choir": _choir, "bells": _bells,
    "marimba": _marimba, "synth": _synth, "bass": _bass, "synth bass": _synth_bass,
}
# fmt: on


def _drum(pitch: int, force: float, rate: int) -> np.ndarray:
    """One hit of the kit."""
    seconds = {KICK: 0.32, RIM: 0.09, SNARE: 0.22, HAT: 0.07, TOM: 0.35, OPEN_HAT: 0.22, SHAKER: 0.09}[pitch]
    tone = Tone(float(pitch), int(seconds * rate), rate, force)
    time = tone.time(0.0)
    edge = tone.envelope(time, 0.001, 0.01) * np.minimum(1.0, (time[-1] - time) / 0.01)
    high = 0.45 * rate

    def swept(start: float, end: float, fall: float) -> np.ndarray:
        return np.sin(2 * np.pi * (end * time + (start - end) * fall * (1 - np.exp(-time / fall))))

    def hiss(low: float, fade: float, attack: float = 0.0) -> np.ndarray:
        shape = np.exp(-time / fade) * (1 - np.exp(-time / attack) if attack else 1.0)
        return tone.noise(len(time), min(low, high * 0.7), high) * shape * 0.4

    hit = {
        KICK: lambda: swept(170, 48, 0.035) * np.exp(-time / 0.11) + hiss(1500, 0.004) * 0.5,
        RIM: lambda: swept(1700, 1650, 0.01) * np.exp(-time / 0.012) * 0.6 + hiss(900, 0.008) * 0.6,
        SNARE: lambda: swept(260, 185, 0.02) * np.exp(-time / 0.06) * 0.6 + hiss(1400, 0.07),
        HAT: lambda: hiss(5200, 0.018) * 0.55,
        TOM: lambda: swept(180, 105, 0.06) * np.exp(-time / 0.12) + hiss(500, 0.02) * 0.25,
        OPEN_HAT: lambda: hiss(4800, 0.085) * 0.5,
        SHAKER: lambda: hiss(3800, 0.025, attack=0.012) * 0.5,
    }[pitch]()
    return hit * edge * force


def _part(song: Song, part: str, rate: int, count: int) -> np.ndarray:
    """One part alone, each different note played once and laid in wherever it sounds."""
    track = np.zeros(count)
    played: dict[tuple[int, int, int], np.ndarray] = {}
    instrument = dict(song.parts).get(part, DRUMS)
    per_beat = 60.0 / song.tempo * rate
    for note in song.notes:
        start, gate = round(note.start * per_beat), max(1, round(note.length * per_beat))
        if note.part != part or start >= count:
            continue
        sound = (note.pitch, gate if part != DRUMS else 0, note.velocity)
        if sound not in played:
            force = note.velocity / 110
            if part == DRUMS:
                played[sound] = _drum(note.pitch, force, rate)
            else:
                wave = VOICES[instrument](Tone(440 * 2 ** ((note.pitch - 69) / 12), gate, rate, force))
                played[sound] = wave * (force**1.5 / (np.max(np.abs(wave)) + 1e-9))
        wave = played[sound][: count - start]
        track[start : start + len(wave)] += wave
    return track


def _room(dry: np.ndarray, sent: np.ndarray, size: float, rate: int) -> np.ndarray:
    """Add a room's answer to what is sent into it: noise that dies away, its highs first."""
    length = int((0.5 + 1.1 * size) * rate)
    time = np.arange(length) / rate
    noise = np.random.default_rng(round(size * 1000)).standard_normal(length)
    fade = 0.35 + 0.9 * size  # seconds to -60 dB
    answer = _band(noise, 180, 2200, rate) * np.exp(-6.9 * time / fade)
    answer += 0.5 * _band(noise, 2200, 0.4 * rate, rate) * np.exp(-6.9 * time / (0.45 * fade))
    answer *= np.minimum(1.0, time / 0.012) * (1.0 - time / time[-1])
    answer *= (0.25 + 0.35 * size) / np.sqrt(np.sum(answer**2))
    total = 1 << (len(dry) + length - 1).bit_length()
    mixed = np.fft.rfft(dry, total) + np.fft.rfft(sent, total) * np.fft.rfft(answer, total)
    hz = np.fft.rfftfreq(total, 1 / rate)
    mixed *= (1j * hz / (1j * hz + 25.0)) ** 2  # nothing below hearing; causal, so starts stay silent
    return np.fft.irfft(mixed, total)[: len(dry)]


def normalise(audio: np.ndarray) -> np.ndarray:
    """Scale audio to the common peak."""
    return audio * (PEAK / max(float(np.max(np.abs(audio))), 1e-9))


def render(song: Song, sample_rate: int = 16000) -> np.ndarray:
    """Play a song: mono float32 audio of exactly its duration, at -1 dBFS peak."""
    count = round(song.seconds * sample_rate)
    dry, sent = np.zeros(count), np.zeros(count)
    for part in (*dict(song.parts), DRUMS):
        track = _part(song, part, sample_rate, count)
        # Between the peak and the RMS, so that struck and held instruments balance.
        loudness = np.sqrt(np.max(np.abs(track)) * np.sqrt(np.mean(track**2)))
        if loudness > 0:
            track *= LEVELS[part] / loudness
            dry += track
            sent += SENDS[part] * track
    audio = _room(dry, sent, song.room, sample_rate)
    edge = min(count, int(0.12 * sample_rate))
    audio[-edge:] *= 0.5 + 0.5 * np.cos(np.linspace(0.0, np.pi, edge))
    return normalise(audio).astype(np.float32)


def splice(first: np.ndarray, second: np.ndarray, leave: int, enter: int, fade: int) -> np.ndarray:
    """Leave `first` at a sample and go on in `second` from another, crossfaded around the cut."""
    half = max(0, min(fade // 2, leave, enter, len(first) - leave, len(second) - enter))
    ramp = np.sin(np.linspace(0.0, np.pi / 2, 2 * half))  # equal power: the two are unrelated
    joint = first[leave - half : leave + half] * ramp[::-1] + second[enter - half : enter + half] * ramp
    return np.concatenate([first[: leave - half], joint, second[enter + half :]]).astype(np.float32)


def degrade(audio: np.ndarray, signal_to_noise: float, seed: int) -> np.ndarray:
    """Add white noise at a level in dB below the audio's own."""
    noise = np.random.default_rng(seed).standard_normal(len(audio))
    level = np.sqrt(np.mean(np.square(audio, dtype=np.float64))) * 10 ** (-signal_to_noise / 20)
    return normalise(audio + level * noise).astype(np.float32)


def transcode(audio: np.ndarray, sample_rate: int, codec: str, level: float) -> np.ndarray:
    """Send audio through MP3 or OGG at a compression level from 0 to 1, back at the same length and place."""
    codec = codec if sample_rate in MP3_RATES else "OGG"
    return normalise(recode(audio[None], sample_rate, codec, level)[0]).astype(np.float32)
