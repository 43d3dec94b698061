"""Sounds that no score was written for: noises, and pieces of a composer that knows no notes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attr_engine.demo.synth import normalise

Rng = np.random.Generator
EDGE = 0.02  # seconds in which a texture comes and goes
LOWEST = 20.0  # Hz; the slope of a coloured noise ends there


def _shaped(rng: Rng, count: int, rate: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """White noise with a gain at every frequency in Hz."""
    hz = np.maximum(np.fft.rfftfreq(count, 1 / rate), LOWEST)
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * gain(hz), count)


def _walk(rng: Rng, count: int, rate: int, step: float, seconds: float) -> np.ndarray:
    """A random walk around 0: a normal step of that size every so many seconds, straight lines between."""
    points = max(2, int(np.ceil(count / rate / seconds)) + 1)
    return np.interp(
        np.arange(count) / rate / seconds, np.arange(points), rng.normal(0, step, points).cumsum()
    )


def _oscillator(hz: np.ndarray, rate: int, phase: float = 0.0) -> np.ndarray:
    """A sine whose frequency may change from sample to sample."""
    return np.sin(phase + 2 * np.pi * np.cumsum(hz) / rate)


def _white(rng: Rng, count: int, rate: int) -> np.ndarray:
    return rng.standard_normal(count)


def _pink(rng: Rng, count: int, rate: int) -> np.ndarray:
    return _shaped(rng, count, rate, lambda hz: hz**-0.5)


def _brown(rng: Rng, count: int, rate: int) -> np.ndarray:
    return _shaped(rng, count, rate, lambda hz: hz**-1.0)


def _filtered(rng: Rng, count: int, rate: int) -> np.ndarray:
    low = np.exp(rng.uniform(np.log(60), np.log(0.2 * rate)))
    high = low * rng.uniform(1.2, 3.0)
    return _shaped(rng, count, rate, lambda hz: 1 / np.sqrt((1 + (low / hz) ** 16) * (1 + (hz / high) ** 16)))


def _bursts(rng: Rng, count: int, rate: int) -> np.ndarray:
    """White noise that is let through a few times a second."""
    out, at = np.zeros(count), 0
    while at < count:
        length = int(rng.uniform(0.03, 0.3) * rate)
        piece = rng.standard_normal(length) * np.hanning(length) * rng.uniform(0.3, 1)
        out[at : at + length] += piece[: count - at]
        at += length + int(rng.exponential(0.25) * rate)
    return out


def _hum(rng: Rng, count: int, rate: int) -> np.ndarray:
    """The mains, with harmonics and a little hiss."""
    time, mains = np.arange(count) / rate, rng.choice([50.0, 60.0])
    loud = rng.uniform(0, 1, 12) / np.arange(1, 13)
    waves = [a * np.sin(2 * np.pi * mains * (n + 1) * time + rng.uniform(0, 7)) for n, a in enumerate(loud)]
    return np.sum(waves, axis=0) + 0.01 * rng.standard_normal(count)


def _sweep(rng: Rng, count: int, rate: int) -> np.ndarray:
    """One to four sweeps over most of the audible range, up or down."""
    turns, way = rng.integers(1, 5), rng.choice([-1, 1])
    low, high = rng.uniform(30, 120), rng.uniform(0.3, 0.45) * rate
    place = (way * turns * np.arange(count) / count) % 1.0
    return _oscillator(low * (high / low) ** place, rate)


def _fm(rng: Rng, count: int, rate: int) -> np.ndarray:
    """Voices of frequency modulation; pitch, ratio and depth wander and belong to no scale."""
    out = np.zeros(count)
    for _ in range(rng.integers(2, 5)):
        hz = np.clip(rng.uniform(60, 700) * 2 ** _walk(rng, count, rate, 0.3, 0.4), 30, 0.12 * rate)
        index = np.abs(rng.uniform(0.5, 6) + _walk(rng, count, rate, 0.8, 0.3))
        modulator = _oscillator(hz * rng.uniform(0.3, 2.9), rate)
        loud = np.clip(0.6 + _walk(rng, count, rate, 0.3, 0.5), 0.05, 1)
        out += loud * np.sin(2 * np.pi * np.cumsum(hz) / rate + index * modulator)
    return out


def _granular(rng: Rng, count: int, rate: int) -> np.ndarray:
    """A cloud of grains: short chirps at any time and any pitch."""
    out, top = np.zeros(count), 0.4 * rate
    for _ in range(int(count / rate * rng.uniform(8, 60))):
        length = int(rng.uniform(0.02, 0.15) * rate)
        start = int(rng.integers(0, max(1, count - length)))
        start_hz, stop_hz = np.exp(rng.uniform(np.log(80), np.log(top), 2))
        grain = (
            _oscillator(np.geomspace(start_hz, stop_hz, length), rate)
            * np.hanning(length)
            * rng.uniform(0.1, 1)
        )
        out[start : start + length] += grain[: count - start]
    return out


def _drone(rng: Rng, count: int, rate: int) -> np.ndarray:
    """Inharmonic partials, each coming and going on its own."""
    time, out = np.arange(count) / rate, np.zeros(count)
    for hz in rng.uniform(40, 300) * rng.uniform(1, 12, rng.integers(10, 30)):
        beat = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 1.5) * time + rng.uniform(0, 7))
        out += beat / np.sqrt(hz) * np.sin(2 * np.pi * hz * time + rng.uniform(0, 7))
    return out


def _glitch(rng: Rng, count: int, rate: int) -> np.ndarray:
    """Short programs of integer arithmetic on the sample number, cut off, repeated, interrupted."""
    out, at = np.zeros(count), 0
    while at < count:
        t = np.arange(int(rng.uniform(0.04, 0.4) * rate)) // int(rng.integers(1, 5))
        a, b, c = (int(shift) for shift in rng.integers(2, 10, 3))
        piece = ((t * ((t >> a) | (t >> b))) ^ (t >> c) * int(rng.integers(1, 9))) & 255
        for _ in range(rng.integers(1, 5)):
            if at < count:
                out[at : at + len(t)] = (piece - piece.mean())[: count - at]
            at += len(t)
        at += int(rng.choice([0, 0, 0.05, 0.2]) * rate)
    return out


Texture = Callable[[Rng, int, int], np.ndarray]
NOISES: dict[str, Texture] = {
    "white": _white, "pink": _pink, "brown": _brown, "filtered": _filtered, "bursts": _bursts, "hum": _hum, "sweep": _sweep,
}  # fmt: skip
PROCEDURES: dict[str, Texture] = {"fm": _fm, "granular": _granular, "drone": _drone, "glitch": _glitch}


def texture(name: str, seconds: float, sample_rate: int, seed: int) -> np.ndarray:
    """Audio of a kind of noise or of a procedure.

    Args:
        name: a key of ``NOISES`` or ``PROCEDURES``.
        seconds: how long.
        sample_rate: Hz.
        seed: everything that is drawn follows from it.

    Returns:
        float32 ``[samples]`` at the corpus' peak.
    """
    count = round(seconds * sample_rate)
    audio = {**NOISES, **PROCEDURES}[name](np.random.default_rng(seed), count, sample_rate)
    edge = min(count, int(EDGE * sample_rate))
    ramp = 0.5 - 0.5 * np.cos(np.linspace(0.0, np.pi, edge))
    audio[:edge] *= ramp
    audio[-edge:] *= ramp[::-1]
    return normalise(audio).astype(np.float32)
