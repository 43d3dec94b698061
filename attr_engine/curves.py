"""How far down does the true source of a piece fall when the piece is changed? The same curves for every method.

Some training tracks stand for the pieces, so that the true source is known. Each is perturbed (:mod:`attr_engine.perturb`), every
version is a query of every method (:mod:`attr_engine.methods`), and what counts is the rank of the track that the version was made
from. Barnett et al. (arXiv 2401.14542) asked how embeddings move; asked here is where the source stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine import progress
from attr_engine.errors import UserError
from attr_engine.evaluate import clusters
from attr_engine.files import whole_file, writing_in
from attr_engine.grid_table import rank_of
from attr_engine.jobs import Query
from attr_engine.judge import Estimate, bootstrap, share
from attr_engine.latents.ingest import Encoder
from attr_engine.latents.store import LatentDataset
from attr_engine.methods import Method, Workspace, parse
from attr_engine.methods.base import model_key, no_progress
from attr_engine.models.protocol import Denoiser
from attr_engine.perturb import NONE, known, perturb_queries
from attr_engine.report.data import Table
from attr_engine.runs import key_of
from attr_engine.settings import Settings, decisive
from attr_engine.tensorfile import load_tensors, save_tensors

VERSIONS, WORK, RANKS = "versions", "methods", "ranks"
FORMAT = "attr_engine.curves/1"
_RESAMPLES = 4000
Cell = str | float | int | None
Change = tuple[str, str]  # perturbation and level


@dataclass(frozen=True)
class Curves:
    """Where the true sources stand.

    Attributes:
        methods: M names.
        sources: S ids of training tracks.
        changes: V perturbations with their levels; the first one is :data:`attr_engine.perturb.NONE`.
        ranks: float64 ``[M, S, V]``, from 1; half-integers where scores tie.
        scores: float64 ``[M, S, V]``, of the source, or of the best of its exact copies.
        tracks: N, how many are ranked.
        chance: ``[N]``: how often a source has which rank in a random order, the mean over the sources.
        failed: method to why it has no ranks.
    """

    methods: Sequence[str]
    sources: Sequence[str]
    changes: Sequence[Change]
    ranks: np.ndarray
    scores: np.ndarray
    tracks: int
    chance: np.ndarray
    failed: Mapping[str, str] = field(default_factory=dict)

    def column(self, method: int, change: Change) -> np.ndarray:
        """Ranks of all sources, ``[S]``."""
        return np.asarray(self.ranks[method, :, self.changes.index(change)])


# -- the numbers ------------------------------------------------------------------------------------


def choose_sources(tracks: LatentDataset, count: int, seed: int = 0, named: Sequence[str] = ()) -> list[int]:
    """Places of the training tracks that stand for true sources, in the order of the data set.

    Args:
        tracks: the training tracks.
        count: how many are drawn, among those of which there is no exact copy.
        seed: of the draw.
        named: ids that are taken instead.

    Raises:
        UserError: an id that is no training track or stands twice, or fewer tracks than are asked for.
    """
    ids = list(tracks.ids)
    if named:
        for i, name in enumerate(named):
            if name not in ids or name in named[:i]:
                why = "stands twice" if name in ids else "is not a training track"
                raise UserError(f"the source {name!r} {why}: check the ids of --sources")
        return sorted(ids.index(name) for name in named)
    copies = clusters(ids, tracks.info)
    alone = [i for i, name in enumerate(ids) if len(copies[name]) == 1]
    if not 1 <= count <= len(alone):
        raise UserError(
            f"{count} sources were asked for, and {len(alone)} training tracks have no exact copy: choose from 1 to {len(alone)}"
        )
    return sorted(int(i) for i in np.random.default_rng([seed, 2]).choice(alone, count, replace=False))


def chance(sizes: Sequence[int], tracks: int) -> np.ndarray:
    """How often the best of some tracks has which rank where the order is random.

    Args:
        sizes: number of tracks that count as one source, for every source.
        tracks: N.

    Returns:
        ``[N]``, the mean over the sources: ``P(r) = C(N - r, m - 1) / C(N, m)`` for m tracks.
    """
    place, rows = np.arange(1, tracks), []
    for m in sizes:
        ratios = np.maximum(tracks - place - m + 1, 0) / (tracks - place)
        rows.append(m / tracks * np.cumprod([1.0, *ratios]))
    return np.asarray(np.mean(rows, axis=0))


def median(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Estimate:
    """Median with its percentile interval, items ``[n]`` drawn again with replacement."""
    picks = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(np.median(values)), float(low), float(high), len(values))


def summary(ranks: np.ndarray) -> tuple[Estimate, Estimate, Estimate]:
    """Median rank and mean reciprocal rank with bootstrap intervals, share at rank 1 with Wilson's, of ranks ``[n]``."""
    return median(ranks), bootstrap(1 / ranks), share(int((ranks == 1).sum()), len(ranks))


# -- the measurement --------------------------------------------------------------------------------


def check_perturbations(names: Sequence[str]) -> list[str]:
    """The perturbations that are looked at, the unperturbed level first.

    Raises:
        UserError: no such perturbation, or it stands twice.
    """
    for i, name in enumerate(names):
        if name not in known() or name in names[:i]:
            what = "stands twice" if name in known() else "does not exist"
            raise UserError(f"the perturbation {name!r} {what}: choose from {', '.join(known())}")
    return [NONE, *(name for name in names or known() if name != NONE)]


def curves(
    model: Denoiser, tracks: LatentDataset, encoder: Encoder, methods: Sequence[str], settings: Settings, out: str | Path,
    sources: Sequence[int], perturbations: Sequence[str] = (), others: LatentDataset | None = None, bars: bool = False,
) -> Curves:  # fmt: skip
    """Perturb some training tracks and see where every method ranks them.

    Args:
        model: theta_0.
        tracks: the training tracks; the sources with audio on disk.
        encoder: the autoencoder that made their latents.
        methods: as users write them (:func:`attr_engine.methods.parse`).
        settings: of the methods; its seed is that of the noise and of what is mixed in, too.
        out: folder; the same call carries on there, by method and perturbation.
        sources: places of the sources (:func:`choose_sources`).
        perturbations: names of :func:`attr_engine.perturb.known`, of which all levels are taken; default all of them.
        others: what is mixed in; default the training tracks.
        bars: whether to draw progress bars on standard error.

    Returns:
        The ranks. What a method cannot do keeps no other method from being measured, and is told by name.

    Raises:
        UserError: unknown methods or perturbations, another autoencoder, audio that is missing, or no method can be measured.
    """
    out, chosen = Path(out), check_perturbations(perturbations)
    parsed = dict(parse(text) for text in methods)
    if not parsed or len(parsed) < len(methods):
        raise UserError("no method was named, or one of them twice: name each once")
    if tracks.extra.get("encoder", encoder.fingerprint) != encoder.fingerprint:
        raise UserError(f"{tracks.path} was encoded by another autoencoder: give that one with --autoencoder")
    ids, copies = [tracks.ids[i] for i in sources], clusters(tracks.ids, tracks.info)
    members = [[i for i, name in enumerate(tracks.ids) if name in copies[source]] for source in ids]
    with writing_in(out):
        sets = {}
        for name in chosen:
            levels, show = [x for x, _ in known()[name]], progress.bar(f"perturbing: {name}", "track")
            sets[name] = perturb_queries(
                tracks, encoder, out / VERSIONS / name, model.frames, {name: levels}, settings.seed, show if bars else None,
                only=sources, others=others, keep_audio=True,
            )  # fmt: skip
        found, failed, bar = {}, dict[str, str](), progress.bar if bars else no_progress
        for text, method in parsed.items():
            work = Workspace(out / WORK / key_of(text), settings, bar)
            try:
                found[text] = _Asked(text, method, model, tracks, sets, members, work, out / RANKS).measure()
            except UserError as error:
                failed[text] = str(error)
    if not found:
        raise UserError("; ".join(f"method {name!r}: {why}" for name, why in failed.items()))
    values = np.stack(list(found.values()))  # [M, 2, S, V]
    changes = [(name, level) for name in chosen for level, _ in known()[name]]
    by_chance = chance([len(some) for some in members], len(tracks))
    return Curves(list(found), ids, changes, values[:, 0], values[:, 1], len(tracks), by_chance, failed)


@dataclass(frozen=True)
class _Asked:
    """One method, asked for all versions: ``sets`` by perturbation, ``members`` the places of every source and its copies."""

    name: str
    method: Method
    model: Denoiser
    tracks: LatentDataset
    sets: Mapping[str, LatentDataset]
    members: Sequence[list[int]]
    work: Workspace
    folder: Path

    def measure(self) -> np.ndarray:
        """Ranks and scores of the sources, ``[2, S, V]``; what is on disk is not measured again."""
        self.work.folder.mkdir(parents=True, exist_ok=True)
        fitted = self.method.fit(self.model, self.tracks, self.work)  # what is kept is not made again
        keys = {name: self._key(name, getattr(fitted, "fingerprint", "")) for name in self.sets}
        paths = {name: self.folder / f"{key}.safetensors" for name, key in keys.items()}
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing:
            total, show = sum(map(len, self.sets.values())), self.work.progress(self.name, "version")
            show(done := total - sum(len(self.sets[name]) for name in missing), total)
            for name in missing:
                versions = self.sets[name]
                rows = fitted.score([Query(versions, i, "perturbed") for i in range(len(versions))])
                save_tensors(paths[name], {"found": self._places(name, rows)}, {"key": keys[name]})
                show(done := done + len(versions), total)
        parts = [load_tensors(path, keys[name])[0]["found"].numpy() for name, path in paths.items()]
        return np.concatenate(parts, axis=2)

    def _key(self, name: str, fingerprint: str) -> str:
        return key_of(
            self.name, fingerprint, model_key(self.model), self.tracks.fingerprint, self.sets[name].fingerprint, self.members,
            decisive(self.work.settings),
        )  # fmt: skip

    def _places(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Ranks and scores of the sources, ``[2, S, levels]``, from scores of all versions of a perturbation."""
        expected = (len(self.sets[name]), len(self.tracks))
        if np.shape(rows) != expected:
            raise UserError(f"it gave scores {list(np.shape(rows))} for {name!r}, expected {list(expected)}")
        # The versions of a source stand one after the other.
        cube = np.asarray(rows, dtype=np.float64).reshape(len(self.members), -1, len(self.tracks))
        found = np.empty((2, *cube.shape[:2]))
        for s, some in enumerate(self.members):
            found[0, s] = [rank_of(scores, some) for scores in cube[s]]
            found[1, s] = cube[s][:, some].max(axis=1)
        return torch.from_numpy(found)


# -- the tables -------------------------------------------------------------------------------------


def tables(found: Curves) -> list[Table]:
    """Median ranks, a column a method, for reading; and all numbers with their intervals."""
    return [_overview(found), _numbers(found)]


def _by_chance(found: Curves) -> list[float]:
    """Median rank, mean reciprocal rank and share at rank 1 of a random order."""
    place, total = np.arange(1, found.tracks + 1), np.cumsum(found.chance)
    # Rounding of the sums must not move the median of an even number.
    return [
        1.0 + int((total < 0.5 - 1e-9).sum()),
        float((found.chance / place).sum()),
        float(found.chance[0]),
    ]


def _note(found: Curves) -> str:
    missing = "".join(f" Without {name}: {why}." for name, why in found.failed.items())
    return (
        f"Rank of the training track that a version was made from among {found.tracks}, a track and its exact copies as one; "
        f"{len(found.sources)} sources; 95 % intervals over sources.{missing}"
    )


def _overview(found: Curves) -> Table:
    rows: list[list[Cell]] = []
    for change in found.changes:
        each = [median(found.column(m, change)) for m in range(len(found.methods))]
        rows.append(
            [*change, *(f"{x.value:g} ({x.low:g} to {x.high:g})" for x in each), _by_chance(found)[0]]
        )
    columns = ["perturbation", "level", *found.methods, "chance"]
    return Table("Perturbation curves: median rank of the true source", columns, rows, _note(found))


def _numbers(found: Curves) -> Table:
    rows: list[list[Cell]] = []
    for m, name in enumerate(found.methods):
        for change in found.changes:
            each = summary(found.column(m, change))
            rows.append([name, *change, *(round(x, 4) for e in each for x in (e.value, e.low, e.high))])
    rows.append(["chance", "", "", *(x for n in _by_chance(found) for x in (round(n, 4), None, None))])
    interval = ["low", "high"]
    columns = ["method", "perturbation", "level", "median rank", *interval, "mean reciprocal rank", *interval,
               "share at rank 1", *interval]  # fmt: skip
    return Table("Perturbation curves: all numbers", columns, rows, _note(found))


def write_points(found: Curves, path: Path) -> None:
    """Write every rank and score: method, source, perturbation, level, rank, score; as Parquet, and as CSV beside it."""
    import pyarrow as pa

    from attr_engine import scorefile as f

    schema = pa.schema(
        [*((name, f.TEXT) for name in ("method", "source", "perturbation", "level")), ("rank", pa.float64()), ("score", pa.float64())]
    )  # fmt: skip

    def points() -> Iterable[pa.Table]:
        for m, method in enumerate(found.methods):
            texts = [(method, source, *change) for source in found.sources for change in found.changes]
            columns = [
                pa.array(column, pa.string()).dictionary_encode() for column in zip(*texts, strict=True)
            ]
            numbers = [pa.array(found.ranks[m].ravel()), f.known(found.scores[m].ravel())]
            yield pa.table([*columns, *numbers], schema=schema)

    header = {
        "format": FORMAT,
        "tracks": found.tracks,
        "chance": _by_chance(found),
        "failed": dict(found.failed),
    }
    f.write_parquet(path, schema, points(), header)
    f.write_csv(path.with_suffix(".csv"), schema, points())


# -- the drawing ------------------------------------------------------------------------------------

_ABREAST = 3  # panels
# Levels that stand before a piece as it is; all others come after it.
_BEFORE: dict[str, Callable[[str], bool]] = {
    "pitch": lambda level: float(level) < 0, "tempo": lambda level: float(level) < 1, "gain": lambda level: level == "full scale",
}  # fmt: skip
_MARKS = "osD^vPX*<>"


def _axis(changes: Sequence[Change], name: str) -> list[Change]:
    """The levels of a perturbation with the unperturbed one where it belongs: between them, or first."""
    levels, before = [c for c in changes if c[0] == name], _BEFORE.get(name, lambda level: False)
    return [*(c for c in levels if before(c[1])), changes[0], *(c for c in levels if not before(c[1]))]


def draw(found: Curves, path: Path) -> None:
    """Draw a panel a perturbation and a line a method, as PNG: median ranks with their intervals, 1 at the top.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"a figure needs {error.name}: pip install matplotlib") from error
    names = [name for name in dict.fromkeys(name for name, _ in found.changes) if name != NONE] or [NONE]
    wide = min(_ABREAST, len(names))
    high = -(-len(names) // wide)
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.1 * wide + 1.6, 2.2 * high + 0.7), layout="constrained", facecolor="white")
        panels = figure.subplots(high, wide, sharey=True, squeeze=False).flat
        for panel, name in zip(panels, names, strict=False):
            _panel(panel, found, name)
        for panel in list(figure.axes)[len(names) :]:
            panel.set_visible(False)
        figure.axes[0].set_ylim(found.tracks, 0.8)
        figure.axes[0].yaxis.set_major_formatter("{x:g}")
        figure.supylabel(f"median rank of the true source among {found.tracks} (log)")
        figure.suptitle(f"{len(found.sources)} sources; bars: 95 % intervals", fontsize=9)
        lines, labels = figure.axes[0].get_legend_handles_labels()
        lines, labels = [*lines[1:], lines[0]], [*labels[1:], labels[0]]  # chance last
        figure.legend(lines, labels, loc="outside right upper", frameon=False)
        with whole_file(path) as part:
            figure.savefig(part, format="png", dpi=150, metadata={"Software": None})


def _panel(panel: Any, found: Curves, name: str) -> None:
    axis = _axis(found.changes, name)
    for m, method in enumerate(found.methods):
        each = [median(found.column(m, change)) for change in axis]
        middle = np.array([x.value for x in each])
        bars = [middle - [x.low for x in each], [x.high for x in each] - middle]
        # Side by side, because many methods have the same medians.
        at = np.arange(len(axis)) + 0.5 * ((m + 0.5) / len(found.methods) - 0.5)
        panel.errorbar(
            at, middle, bars, label=method, color=f"C{m % 10}", marker=_MARKS[m % len(_MARKS)], markersize=4,
            linewidth=1.2, elinewidth=0.7, linestyle="-" if m < 10 else "--",
        )  # fmt: skip
    panel.axhline(_by_chance(found)[0], color="0.5", linestyle=":", linewidth=1.2, label="chance")
    panel.set_title(name, fontsize=9)
    panel.set_yscale("log")
    panel.set_xticks(range(len(axis)), [level if what != NONE else NONE for what, level in axis])
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
