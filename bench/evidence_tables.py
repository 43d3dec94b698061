"""From score matrices and retrained models to the tables of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attr_engine import judge

DEFAULT = "ridge (default)"


def text(found: judge.Estimate, digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [
        " | ".join(columns),
        " | ".join("---" for _ in columns),
        *(" | ".join(map(str, row)) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def lds_table(found: Mapping[str, Any]) -> str:
    """Methods by their mean, with the paired difference of the default to each."""
    values = {name: np.array(v) for name, v in found["methods"].items()}
    rows = []
    for name, each in sorted(values.items(), key=lambda item: -np.nanmean(item[1])):
        gap = "" if name == DEFAULT else text(judge.bootstrap(values[DEFAULT] - each))
        rows.append([f"**{name}**" if name == DEFAULT else name, text(judge.bootstrap(each)), gap])
    rows.append(
        [
            "retraining with another seed (split half)",
            text(judge.bootstrap(np.array(found["split_half"]))),
            "",
        ]
    )
    rows.append(["attainable (noise ceiling)", text(judge.bootstrap(np.array(found["attainable"]))), ""])
    chosen = "; ".join(
        f"{name}: {s['averaging']} averaging, lambda {s['lambda']:g}" for name, s in found["settings"].items()
    )
    note = f"{len(found['queries'])} queries, {found['halves']} random halves, {found['seeds']} seeds each. "
    note += f"Chosen on other families: {chosen}."
    return note + "\n\n" + markdown(["method", "LDS", "default minus this, paired"], rows)


def sweep_table(found: Mapping[str, Any]) -> str:
    """The best of every choice, the others at their best; and curvatures of an update."""
    columns, rows = found["columns"], found["rows"]
    lines = []
    for place, column in enumerate(columns[:-1]):
        best: dict[Any, float] = {}
        for row in rows:
            best[row[place]] = max(best.get(row[place], -1.0), row[-1])
        ordered = sorted(best.items(), key=lambda item: -item[1])
        lines.append([column, ", ".join(f"{value}: {score:.3f}" for value, score in ordered)])
    by_mean = sorted(found["curvature"].items(), key=lambda x: -np.mean(x[1]))
    first = np.array(by_mean[0][1])
    curvature = [
        [name, text(judge.bootstrap(np.array(v))), text(judge.bootstrap(first - np.array(v))) if n else ""]
        for n, (name, v) in enumerate(by_mean)
    ]
    count = len(next(iter(found["curvature"].values())))
    return (
        f"LDS over the {found['queries']} queries of the choosing part; each value with everything else at its best.\n\n"
        + markdown(["choice", "best LDS"], lines)
        + f"\nUpdates of size 0.01 by three curvatures, 4 draws, {count} queries of the choosing part:\n\n"
        + markdown(["update and score", "LDS", "first minus this, paired"], curvature)
    )


def timesteps_table(found: Mapping[str, Any]) -> str:
    """Weightings by their mean, and the paired difference of all alike to each."""
    first = np.array(next(iter(found.values()))["LDS"])
    rows = []
    for name, row in sorted(found.items(), key=lambda item: -np.mean(item[1]["LDS"])):
        each = np.array(row["LDS"])
        gap = "" if (each == first).all() else text(judge.bootstrap(first - each))
        rows.append([name, text(judge.bootstrap(each)), f"{row['lambda']:g}", gap])
    note = f"{len(first)} queries of the choosing part, whole gradients of single draws at length 1, 16 shared draws."
    return (
        note
        + "\n\n"
        + markdown(["weight of a timestep", "LDS", "lambda", "all alike minus this, paired"], rows)
    )


def projection_table(found: Mapping[str, Any]) -> str:
    """Each projection at its best lambda."""
    best: dict[tuple[Any, ...], tuple[float, float]] = {}
    for kind, rank, numbers, damping, score in found["rows"]:
        key = (kind, rank, numbers)
        best[key] = max(best.get(key, (-1.0, 0.0)), (score, damping))
    rows = [[*map(str, key), f"{score:.3f}", f"{damping:g}"] for key, (score, damping) in best.items()]
    return markdown(["projection", "rank", "numbers a track", "LDS", "lambda"], rows)


def relations_table(found: Mapping[str, Any]) -> str:
    """Queries by relation, tracks by relation: effect and its spread."""
    tracks = [
        "original",
        "exact copy",
        "noise",
        "lossy",
        "gain",
        "stretched",
        "re-orchestrated",
        "transposed",
        "spliced",
        "unrelated",
    ]
    rows = [
        [
            query,
            *(f"{row[t][0]:.1f}" if t in row else "" for t in tracks[:-1]),
            f"{row['unrelated'][0]:.1f} +- {row['unrelated'][1]:.1f}",
        ]
        for query, row in found.items()
    ]
    return markdown(["query is", *tracks], rows)


def plain(table: Mapping[str, Any]) -> str:
    """A table as it is."""
    if not table:
        return "not measured\n"
    rows = [[f"{c:g}" if isinstance(c, float) else str(c) for c in row] for row in table["rows"]]
    return f"{table['note']}\n\n" + markdown(table["columns"], rows)


def planted_table(found: Mapping[str, Any]) -> str:
    """Average precision of all methods, relations side by side."""
    table, out = found["table"], ""
    for first in range(3, len(table["columns"]), 3):  # precision, recall: a value and its interval each
        by_method: dict[str, dict[str, str]] = {}
        for name, relation, _, *numbers in table["rows"]:
            value, low, high = numbers[first - 3 : first]
            by_method.setdefault(name, {})[relation] = f"{value:.2f} ({low:.2f} to {high:.2f})"
        relations = list(next(iter(by_method.values())))
        rows = [[name, *(row[r] for r in relations)] for name, row in by_method.items()]
        out += markdown([f"method: {table['columns'][first]}", *relations], rows) + "\n"
    confirmed = found["confirmed"]
    kinds = list(next(iter(confirmed.values())))
    rows = [
        [name, *(text(judge.bootstrap(np.array(row[k]))) for k in kinds)] for name, row in confirmed.items()
    ]
    return (
        out
        + "Without copies at another gain, which retraining says are not near:\n\n"
        + markdown(["method: mAP", *kinds], rows)
    )


_MADE = ("known: exact copy", "known: gain", "known: noise", "known: lossy", "known: stretched", "targets")


def abstention_table(found: Mapping[str, Any]) -> str:
    """Rates by kind; and over all, over those that retraining says were made by a few tracks, and over the relatives."""
    rows, accepted = [], found["accepted"]

    def line(name: str, kinds: Sequence[str]) -> list[str]:
        yes, count = (sum(accepted[k][i] for k in kinds) for i in (0, 1))
        unknown = kinds[0].startswith("unknown")
        rate = judge.share(yes if unknown else count - yes, count)
        return [name, str(count), "false accepts" if unknown else "false refusals", text(rate)]

    for kind in accepted:
        rows.append(line(kind, [kind]))
    rows.append(line("**all unknown**", [k for k in accepted if k.startswith("unknown")]))
    rows.append(line("**near copies, stretched, training tracks**", [k for k in accepted if k in _MADE]))
    rows.append(
        line(
            "**all relatives of training tracks**",
            [k for k in accepted if k.startswith("known") and "generated" not in k],
        )
    )
    return markdown(["pieces", "count", "", "rate"], rows)


def self_table(found: Mapping[str, Any]) -> str:
    """Ranks, and who stands before a target."""
    before = (
        f"Of the {found['before']} tracks before a target, {found['of its family']} are of its own family."
    )
    sizes = (
        f"\nBy the size of the update, other training tracks:\n\n{plain(found['sizes'])}"
        if "sizes" in found
        else ""
    )
    return plain(found["table"]) + f"\n{before}\n" + sizes


def collapse_table(found: Mapping[str, Any]) -> str:
    """All methods on the judging part, the default on everything."""
    return (
        plain(found["all"])
        + "\nThe default over all known and generated queries:\n\n"
        + plain(found["default"])
    )


_SECTIONS = (
    ("lds", "Linear datamodelling score", lds_table),
    ("removal", "Removal", plain),
    ("groups", "One family or artist left out", plain),
    ("sweep", "What the settings were chosen from", sweep_table),
    ("timesteps", "Weighting timesteps", timesteps_table),
    ("projection", "What a projection loses", projection_table),
    ("relations", "What retraining says about relatives", relations_table),
    ("planted", "Planted relations: mean average precision", planted_table),
    ("self", "Rank of itself", self_table),
    ("collapse", "Collapse and hubs", collapse_table),
    ("abstention", "Abstention", abstention_table),
)


def document(result: Mapping[str, Any]) -> str:
    """Every table that a result has."""
    parts = [f"### {title}\n{table(result[name])}" for name, title, table in _SECTIONS if result.get(name)]
    return "\n".join(parts)
