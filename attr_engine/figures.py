"""Figures 1 and 2 of the paper (arXiv 2506.18312): what methods say of the same tracks, and how they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attr_engine.controls import control_scores
from attr_engine.errors import UserError
from attr_engine.files import whole_file, write_json
from attr_engine.jobs import make_queries
from attr_engine.latents import LatentDataset
from attr_engine.latents.manifest import MANIFEST
from attr_engine.pipeline import SCORES_PARQUET
from attr_engine.report.shares import shares
from attr_engine.result import Attribution, order_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALINGS = ("min-max", "softmax")
CORRELATIONS = ("Pearson", "Spearman")
_ABREAST = 5  # panels
_POINTS = 2000  # of a curve that are drawn, evenly on the log axis

Methods = Mapping[str, np.ndarray]
"""Name of a method to its scores, float64 ``[Q, N]``, the same queries and tracks in the same order for all."""


# -- the numbers ------------------------------------------------------------------------------------


def scaled(scores: np.ndarray, how: str) -> np.ndarray:
    """Scores ``[N]`` of one query in a scale that methods share.

    ``min-max``: from 0 for the last track to 1 for the first. ``softmax``: :func:`attr_engine.report.shares.shares`, whose temperature
    is one standard deviation (the paper does not say which it took). Equal scores are all 0, or all 1/N.
    """
    if how == "softmax":
        return shares(scores, "softmax")
    low, high = scores.min(), scores.max()
    return np.asarray((scores - low) / (high - low if high > low else 1.0))


def sorted_curves(methods: Methods, how: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Figure 1: scaled scores of every method, the tracks of each query in the order of the first method.

    Returns:
        Name to mean and standard deviation over the queries, ``[N]`` each, from rank 1 on.
    """
    order = order_of(next(iter(methods.values())))
    out = {}
    for name, scores in methods.items():
        rows = np.stack([scaled(row, how)[places] for row, places in zip(scores, order, strict=True)])
        out[name] = rows.mean(axis=0), rows.std(axis=0)
    return out


def middle_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks ``[N]`` from the smallest on; equal scores share the middle of their ranks."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def correlations(methods: Methods, how: str) -> np.ndarray:
    """Figure 2: correlations of methods, the mean over queries: ``[M, M]``; NaN where a method says the same of all tracks."""
    stack = np.stack(list(methods.values()), axis=1)  # [Q, M, N]
    if how == "Spearman":
        stack = np.apply_along_axis(middle_ranks, 2, stack)
    centred = stack - stack.mean(axis=2, keepdims=True)
    length = np.linalg.norm(centred, axis=2, keepdims=True)
    same = np.ptp(stack, axis=2, keepdims=True) == 0
    unit = np.divide(centred, length, out=np.full_like(centred, np.nan), where=~same & (length > 0))
    return np.asarray((unit @ unit.transpose(0, 2, 1)).mean(axis=0))


# -- the methods ------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[str, Attribution]:
    """A table of scores, and how it is called."""
    file = path / SCORES_PARQUET if path.is_dir() else path
    return (path.name if path.is_dir() else path.stem), Attribution.from_parquet(file)


def methods_of(
    name: str, found: Attribution, tracks: Sequence[str], queries: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every score function at every strength of a table, for the tracks and queries that are asked for.

    Raises:
        UserError: a track or query is not there, or was not measured.
    """
    where = {track: i for i, track in enumerate(found.tracks)}
    missing = [t for t in tracks if t not in where] or [t for t in where if t not in set(tracks)]
    if missing:
        raise UserError(f"{name} and the first table are not of the same tracks: {missing[0]!r} is in one of them only")  # fmt: skip
    known = {query for query, _ in found.updates}
    absent = [q for q in queries if q not in known]
    if absent:
        raise UserError(
            f"{name} has no scores for the query {absent[0]!r}: compare tables of the same queries"
        )
    columns = [where[t] for t in tracks]
    strengths = list(dict.fromkeys(x for _, x in found.updates))
    out = {}
    for function, values in found.values.items():
        for strength in strengths:
            rows = np.stack([values[found.row(q, strength)][columns] for q in queries])
            bad = np.argwhere(~np.isfinite(rows))
            if len(bad):
                q, t = bad[0]
                raise UserError(
                    f"{name} has no finite score by {function} for the query {queries[q]!r} and the track {tracks[t]!r}: figures need "
                    "a run without --top and --index"
                )
            text = function if len(strengths) == 1 else f"{function}, {strength:g}"
            out[text] = rows
    return out


def _controls(path: Path, found: Attribution, queries: Sequence[str], data: str) -> dict[str, np.ndarray]:
    """Controls for the queries of a run."""
    s, frames = found.meta.get("settings") or {}, found.meta.get("frames")
    source = data or s.get("data")
    if not source or not isinstance(frames, int):
        raise UserError(
            f"{path} does not say which tracks its controls are of: give --data, or --no-controls without them"
        )
    tracks = LatentDataset(source)
    if list(tracks.ids) != list(found.tracks):
        raise UserError(f"{tracks.path} does not hold the tracks of {path}: give the run's own with --data, or --no-controls")  # fmt: skip
    sets: list[LatentDataset] = []
    for given in s.get("queries", ()):
        # Audio was encoded into the run directory.
        folders = (
            [Path(given)]
            if (Path(given) / MANIFEST).exists()
            else [p.parent for p in path.glob(f"queries-*/{MANIFEST}")]
        )
        if not folders:
            raise UserError(f"the queries {given} of {path} are not there any more: give --no-controls")
        sets += [LatentDataset(folder) for folder in folders if folder not in {x.path for x in sets}]
    known = {q.id: (q.tracks, q.index) for q in make_queries(tracks, sets, s.get("self_influence", ()))}
    return control_scores(tracks, [known[q] for q in queries], found.base, frames, int(s.get("seed", 0)))


def collect(
    first: Path, more: Sequence[Path] = (), controls: bool = True, data: str = ""
) -> dict[str, np.ndarray]:
    """Methods of a run: its score functions and strengths, further tables, controls.

    Args:
        first: run directory or Parquet file of scores; its tracks and queries are those of the figures.
        more: further ones, of the same tracks and at least these queries; their methods are named after them.
        controls: whether to add :func:`attr_engine.controls.control_scores`.
        data: the training tracks, where the run does not find them.

    Raises:
        UserError: a table that cannot be read or is of something else, or a name that stands twice.
    """
    name, found = _read(first)
    queries = list(dict.fromkeys(query for query, _ in found.updates))
    out = methods_of(name, found, found.tracks, queries)
    for path in more:
        other, table = _read(path)
        for method, scores in methods_of(other, table, found.tracks, queries).items():
            if f"{other}: {method}" in out:
                raise UserError(f"two of the tables are called {other!r}: rename one of them")
            out[f"{other}: {method}"] = scores
    if controls:
        out |= _controls(first, found, queries, data)
    return out


def chosen(methods: Methods, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some methods by name, in that order; without names all of them.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in methods:
            raise UserError(f"there is no method {name!r}; known: {'; '.join(methods)}")
    return {name: methods[name] for name in names or methods}


# -- the drawings -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error}): pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw(methods: Methods, out: Path) -> list[Path]:
    """Draw both figures.

    Args:
        methods: what to draw; the first one sorts figure 1.
        out: folder; gets ``figure1`` and ``figure2`` as ``.png`` and ``.svg``, and ``figures.json``.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is missing, or there are fewer than two tracks.
    """
    queries, tracks = next(iter(methods.values())).shape
    if tracks < 2:
        raise UserError(f"figures of {tracks} tracks would be empty: score at least 2")
    matrices = {how: correlations(methods, how) for how in CORRELATIONS}
    paths = _save(_figure1(methods, queries, tracks), out / "figure1")
    paths += _save(_figure2(list(methods), matrices, queries, tracks), out / "figure2")
    numbers = {
        how: [[None if np.isnan(x) else float(x) for x in row] for row in m] for how, m in matrices.items()
    }
    write_json(
        out / "figures.json", {"methods": list(methods), "queries": queries, "tracks": tracks, **numbers}
    )
    return [*paths, out / "figures.json"]


def _save(figure: Any, stem: Path) -> list[Path]:
    """Write PNG and SVG, the same bytes for the same figure."""
    import matplotlib

    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        paths.append(stem.with_suffix(f".{kind}"))
        with whole_file(paths[-1]) as part, matplotlib.rc_context({"svg.hashsalt": "attr_engine"}):
            figure.savefig(part, format=kind, dpi=150, metadata=metadata)
    return paths


def _figure1(methods: Methods, queries: int, tracks: int) -> Figure:
    """A panel for each method and scaling; the first method's mean stands in each as a dashed line."""
    names, wide = list(methods), min(len(methods), _ABREAST)
    high = -(-len(methods) // wide)
    figure = _figure(2.3 * wide + 0.6, 2 * (1.8 * high + 0.5) + 0.3)
    figure.suptitle(
        f"{tracks} tracks of {queries} queries, sorted by {names[0]} (dashed): mean and standard deviation over queries",
        fontsize=9,
    )
    places = np.unique(np.round(np.geomspace(1, tracks, _POINTS)).astype(int))
    for section, how in zip(figure.subfigures(len(SCALINGS), 1), SCALINGS, strict=True):
        curves = sorted_curves(methods, how)
        grid = section.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
        for place in range(len(names), grid.size):
            grid.flat[place].set_visible(False)
            if place >= wide:  # the panel above is the last of its column
                grid.flat[place - wide].tick_params(labelbottom=True)
        for panel, name in zip(grid.flat, names, strict=False):
            mean, spread = (values[places - 1] for values in curves[name])
            panel.fill_between(places, mean - spread, mean + spread, color="C0", alpha=0.25, linewidth=0)
            panel.plot(places, mean, color="C0", linewidth=0.9)
            panel.plot(places, curves[names[0]][0][places - 1], color="0.3", linewidth=0.8, linestyle="--")
            panel.set_title(name, fontsize=8)
            panel.set_xscale("log")
            panel.set_xlim(1, tracks)
            panel.tick_params(labelsize=7)
        section.supxlabel("rank", fontsize=8)
        section.supylabel(how, fontsize=8)
    return figure


def _figure2(names: Sequence[str], matrices: Mapping[str, np.ndarray], queries: int, tracks: int) -> Figure:
    side = 2.2 + 0.42 * len(names)
    longest = 0.08 * max(map(len, names))  # inches of a label, which stands upright below and beside
    figure = _figure(2 * side + longest + 0.8, side + longest)
    for i, (how, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), i + 1)
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names), fontsize=8)
        for (y, x), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(
                    x,
                    y,
                    f"{value:.2f}".replace("-0.00", "0.00"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=colour,
                )
        axes.set_title(f"{how} correlation over {tracks} tracks,\nmean of {queries} queries", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure
