"""The report: one HTML file that opens from disk: which tracks made which piece, and how sure we are."""

from attr_engine.report.audio import encode_clip, waveform_peaks
from attr_engine.report.page import (
    Clip,
    QuerySection,
    Ranking,
    ReportData,
    Row,
    Table,
    TrackInfo,
    write_report,
)
from attr_engine.report.shares import DEFAULT_TRANSFORM, TRANSFORMS, shares

__all__ = [
    "DEFAULT_TRANSFORM",
    "TRANSFORMS",
    "Clip",
    "QuerySection",
    "Ranking",
    "ReportData",
    "Row",
    "Table",
    "TrackInfo",
    "encode_clip",
    "shares",
    "waveform_peaks",
    "write_report",
]
