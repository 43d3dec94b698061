"""The drawings of a report as inline SVG: waveforms, effect curves, intervals and shares.

Coordinates are numbers that we compute; no text from outside enters an SVG except through ``esc``.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from attr_engine.report.data import Clip
from attr_engine.report.markup import esc, json_block

#: A drawing is stretched to its cell; WIDTH x 60 only fixes how finely a curve is placed.
WIDTH, MIDDLE, REACH = 600, 30, 28

#: Points of a drawn effect curve; a cell is about 300 pixels wide.
CURVE_POINTS = 120


class ClipTable:
    """The clips of a report, each once: rows refer to them by number."""

    def __init__(self) -> None:
        self._clips: list[Clip] = []
        self._by_content: dict[tuple[str, bytes], int] = {}
        self._by_object: dict[int, int] = {}
        self._seen: list[Clip] = []  # keeps every object alive, so that an id() stands for one clip

    def number(self, clip: Clip) -> int:
        """Return the number of ``clip``; equal mime and bytes give the same number."""
        known = self._by_object.get(id(clip))
        if known is not None:
            return known
        content = (clip.mime, hashlib.sha256(clip.data).digest())
        index = self._by_content.setdefault(content, len(self._clips))
        if index == len(self._clips):
            self._clips.append(clip)
        self._by_object[id(clip)] = index
        self._seen.append(clip)
        return index

    def symbols(self) -> Iterator[str]:
        """Yield the SVG symbols ``wave-0``, ``wave-1``, ..."""
        for index, clip in enumerate(self._clips):
            yield _wave_symbol(index, clip.peaks)

    def blocks(self) -> Iterator[str]:
        """Yield one JSON block a clip with its data: URI; page.js decodes it when a player comes near."""
        for index, clip in enumerate(self._clips):
            uri = f"data:{clip.mime};base64,{base64.b64encode(clip.data).decode('ascii')}"
            yield f'<script type="application/json" id="clip-{index}">{json_block(uri)}</script>\n'


def _wave_symbol(index: int, peaks: np.ndarray) -> str:
    """Draw peaks ``[buckets, 2]`` as vertical strokes; the loudest bucket fills the height."""
    values = np.asarray(peaks, dtype=np.float64)
    largest = float(np.abs(values).max()) or 1.0
    # y grows downwards; a stroke of at least one unit keeps silence visible as a line.
    top = np.round(-49 * values[:, 1] / largest).astype(int)
    bottom = np.maximum(np.round(-49 * values[:, 0] / largest).astype(int), top + 1)
    path = "".join(f"M{x} {a}V{b}" for x, (a, b) in enumerate(zip(top, bottom, strict=True)))
    return (
        f'<symbol id="wave-{index}" viewBox="-0.5 -50 {len(values)} 100" preserveAspectRatio="none">'
        f'<path d="{path}"/></symbol>\n'
    )


def waveform(clip_number: int | None, curve: np.ndarray | None, label: str) -> str:
    """Draw a waveform with the effect curve over it, or either alone.

    Args:
        clip_number: number in the ``ClipTable``, None without audio.
        curve: ``[frames]`` finite, any sign; its largest absolute value fills half the height.
        label: what the drawing is, for those who do not see it; escaped here.

    Returns:
        An ``svg`` element that stretches to its container.
    """
    wave = "" if clip_number is None else f'<use href="#wave-{clip_number}" width="{WIDTH}" height="60"/>'
    return (
        f'<svg class="wave" viewBox="0 0 {WIDTH} 60" preserveAspectRatio="none" role="img" '
        f'aria-label="{esc(label, 400)}">{wave}<path class="zero" d="M0 {MIDDLE}H{WIDTH}"/>'
        f"{'' if curve is None else _curve_paths(curve)}</svg>"
    )


def _curve_paths(curve: np.ndarray) -> str:
    """Draw the positive part of ``[frames]`` above the middle line and the negative part below it."""
    values = np.asarray(curve, dtype=np.float64)
    buckets = min(len(values), CURVE_POINTS)
    edges = np.arange(buckets) * len(values) // buckets
    counts = np.diff(np.append(edges, len(values)))
    means = np.add.reduceat(values, edges) / counts  # mean, not maximum: a bucket keeps its part of the sum
    largest = float(np.abs(means).max())
    if largest == 0.0:
        return ""
    heights = np.round(REACH * means / largest).astype(int)
    centres = np.round((edges + counts / 2) * (WIDTH / len(values))).astype(int)
    return _area("pos", centres, np.maximum(heights, 0)) + _area("neg", centres, np.minimum(heights, 0))


def _area(css: str, x: np.ndarray, heights: np.ndarray) -> str:
    """Draw the area between the middle line and ``heights [points]`` at ``x [points]``."""
    if not heights.any():
        return ""
    y = MIDDLE - heights
    points = "".join(f"L{a} {b}" for a, b in zip(x, y, strict=True))
    return f'<path class="{css}" d="M0 {MIDDLE}V{y[0]}{points}H{WIDTH}V{MIDDLE}z"/>'


def curve_summary(curve: np.ndarray, seconds: float | None) -> str:
    """Say in words where the effect of ``curve [frames]`` is largest."""
    values = np.asarray(curve, dtype=np.float64)
    if not values.any():
        return "the effect curve is zero everywhere"
    at = int(np.abs(values).argmax())
    fraction = (at + 0.5) / len(values)
    place = f"{fraction:.0%} of the track" if seconds is None else f"{fraction * seconds:.1f} seconds"
    return f"the effect is largest at {place}, where it {'raises' if values[at] > 0 else 'lowers'} the score"


def score_range(scores: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float]:
    """Return the ends of the common scale of a ranking: from the lowest to the highest end of an interval.

    Scores that are not finite are left out; equal ends are moved apart.
    """
    ends = []
    for score, error in zip(scores, errors, strict=True):
        reach = error if error is not None and math.isfinite(error) else 0.0
        if math.isfinite(score):
            ends += [score - reach, score + reach]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if low == high:
        reach = abs(low) or 1.0
        low, high = low - reach, high + reach
    return low, high


def interval(score: float, error: float | None, scale: tuple[float, float]) -> str:
    """Draw a score as a dot and its standard error as a line, on the common ``scale`` of the ranking.

    A hollow dot has no standard error; zero is drawn where it lies inside the scale.
    """
    low, high = scale

    def at(value: float) -> str:
        # 4 % of room on both sides, so that a dot at the end is not cut
        return f"{min(100.0, max(0.0, 4 + 92 * (value - low) / (high - low))):.2f}%"

    parts = ['<line class="axis" x1="0%" x2="100%" y1="7" y2="7"/>']
    if low < 0 < high:
        parts.append(f'<line class="origin" x1="{at(0)}" x2="{at(0)}" y1="0" y2="14"/>')
    if math.isfinite(score):
        known = error is not None and math.isfinite(error)
        if error is not None and known:
            left, right = at(score - error), at(score + error)
            parts.append(f'<line class="error" x1="{left}" x2="{right}" y1="7" y2="7"/>')
        parts.append(f'<circle class="{"dot" if known else "dot hollow"}" cx="{at(score)}" cy="7" r="3.5"/>')
    return f'<svg class="interval" aria-hidden="true">{"".join(parts)}</svg>'


def share_bar(share: float) -> str:
    """Draw a share of 1 as a bar; the full width is 100 %."""
    width = 100 * min(1.0, max(0.0, share))
    return (
        '<svg class="bar" aria-hidden="true"><rect class="whole" width="100%" height="100%"/>'
        f'<rect class="part" width="{width:.3f}%" height="100%"/></svg>'
    )
