"""What a report is made of. Strings may come from anywhere: they are escaped where they are printed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from attr_engine.errors import UserError

#: What a clip's mime may be: it goes into a data: URI.
AUDIO_MIME = re.compile(r"audio/[a-z0-9][a-z0-9.+-]{0,40}")

#: How far shown shares and "everything else" may be from 1: room for float32, none for a forgotten row.
SHARE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Clip:
    """The audio of a track or query.

    Attributes:
        mime: "audio/mpeg", "audio/ogg", "audio/wav", ... (see ``encode_clip``).
        data: the bytes of the file; clips with the same mime and bytes are embedded once.
        peaks: ``[buckets, 2]`` smallest and largest sample (see ``waveform_peaks``).
    """

    mime: str
    data: bytes
    peaks: np.ndarray


@dataclass(frozen=True)
class TrackInfo:
    """A track or query as it is shown.

    Attributes:
        id: the stable id.
        title, artist, licence: metadata, shown as text; "" if unknown.
        seconds: length of the music, None if unknown.
        source: path or URL, shown as text and never as a link.
        start: where this window starts in ``parent``, in seconds.
        parent: id of the longer recording of which this is a window, "" if it is none.
        clip: its audio from start to end; None is shown as "no audio".
        owner: whose it is, shown as text; "" if unknown.
    """

    id: str
    title: str = ""
    artist: str = ""
    licence: str = ""
    seconds: float | None = None
    source: str = ""
    start: float = 0.0
    parent: str = ""
    clip: Clip | None = None
    owner: str = ""


@dataclass(frozen=True)
class Row:
    """One track in a ranking.

    Attributes:
        track: id, a key of ``ReportData.tracks``; an unknown id is shown without metadata.
        rank: 1 is the track held most responsible.
        score: larger = more responsible, in the unit of the ranking.
        standard_error: of the score, same unit; None is shown as "not available".
        share: part of the whole in [0, 1] (see ``shares``).
        hit: the known (planted) relation to the query, such as "transposed"; "" if none or unknown.
        curve: ``[frames]`` where in the track the effect sits, any sign, first to last frame of the track.
    """

    track: str
    rank: int
    score: float
    standard_error: float | None
    share: float
    hit: str = ""
    curve: np.ndarray | None = None


@dataclass(frozen=True)
class Ranking:
    """The top tracks by one score function at one strength, or by one control.

    Attributes:
        name: "displacement", "loss_change", "skew", "random", "duration", ...
        strength: such as "relative size 0.01", or "".
        is_control: True for rankings that know nothing of the model, or nothing of the query.
        rows: the top k, best first.
        share_transform: the name of the transform behind the shares.
        everything_else: 1 - the sum of the shown shares.
        tracks: N, how many tracks were ranked.
        refused: no track stands out for this query: no shares are printed, whatever the score function.
    """

    name: str
    strength: str
    is_control: bool
    rows: list[Row]
    share_transform: str
    everything_else: float
    tracks: int
    refused: bool = False

    @property
    def label(self) -> str:
        """Name and strength in one line."""
        return f"{self.name}, {self.strength}" if self.strength else self.name


@dataclass(frozen=True)
class QuerySection:
    """One query with its rankings.

    Attributes:
        info: the query itself.
        kind: "generated", "held-out" or "training track".
        rankings: the first is shown, the others can be chosen.
        notes: such as "planted relatives found: 4 of 6 in the top 10".
    """

    info: TrackInfo
    kind: str
    rankings: list[Ranking]
    notes: list[str]


@dataclass(frozen=True)
class Table:
    """A table of results, such as mAP per score function and strength beside the controls."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        title, subtitle: of the page.
        summary: (name, value) of the key facts: model, data set, tracks, queries, draws, masks, seconds, ...
        tables: results over all queries.
        queries: in the order of the page.
        tracks: id to track, for every ``Row.track``.
        config, environment: what replays the run, shown at the end; nested dicts get dotted keys.
        warnings: what the reader must know first, shown prominently.
    """

    title: str
    subtitle: str
    summary: list[tuple[str, str]]
    tables: list[Table]
    queries: list[QuerySection]
    tracks: dict[str, TrackInfo]
    config: dict[str, Any]
    environment: dict[str, Any]
    warnings: list[str]


def check_report(data: ReportData) -> None:
    """Refuse what would be shown wrong rather than look wrong.

    Raises:
        UserError: a ranking whose shares and "everything else" are not parts of one whole, more rows than
            tracks, a clip that is not audio or whose peaks are not ``[buckets, 2]`` and finite, a table row
            of the wrong length. The message names the item.
    """
    for key, track in data.tracks.items():
        _check_clip(track.clip, f"track {key!r}")
    for query in data.queries:
        where = f"query {query.info.id!r}"
        _check_clip(query.info.clip, where)
        for ranking in query.rankings:
            _check_ranking(ranking, f"{where}, ranking {ranking.label!r}")
    for table in data.tables:
        for number, row in enumerate(table.rows):
            if len(row) != len(table.columns):
                raise UserError(
                    f"report: row {number} of table {table.title!r} has {len(row)} cells, "
                    f"the table has {len(table.columns)} columns"
                )


def _check_clip(clip: Clip | None, where: str) -> None:
    """Raise ``UserError`` where a clip cannot be embedded or drawn."""
    if clip is None:
        return
    if not AUDIO_MIME.fullmatch(clip.mime):
        raise UserError(f"report: the clip of {where} has mime {clip.mime!r}; it must be audio/...")
    peaks = np.asarray(clip.peaks)
    if peaks.ndim != 2 or peaks.shape[0] < 1 or peaks.shape[1] != 2 or not np.isfinite(peaks).all():
        raise UserError(
            f"report: the peaks of the clip of {where} must be [buckets, 2] and finite, not {peaks.shape}; "
            "make them with waveform_peaks"
        )


def _check_ranking(ranking: Ranking, where: str) -> None:
    """Raise ``UserError`` where the shares of a ranking are not parts of one whole."""
    parts = [row.share for row in ranking.rows] + [ranking.everything_else]
    for part in parts:
        if not -SHARE_TOLERANCE <= part <= 1.0 + SHARE_TOLERANCE:  # also refuses NaN
            raise UserError(f"report: {where}: a share of {part} is outside [0, 1]")
    if abs(math.fsum(parts) - 1.0) > SHARE_TOLERANCE:
        raise UserError(
            f"report: {where}: shares and everything_else sum to {math.fsum(parts):.6g}, not to 1; "
            "everything_else must be 1 - the sum of the shares shown"
        )
    if len(ranking.rows) > ranking.tracks:
        raise UserError(f"report: {where}: {len(ranking.rows)} rows, but only {ranking.tracks} tracks ranked")
