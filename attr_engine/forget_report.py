"""What a removal leaves behind: forget.json, forget.md, forget.csv, and the trade-off as a plot where matplotlib is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attr_engine.files import whole_file, write_json, write_text

NAME = "forget"
_UNITS = {"fisher": "size", "ascent": "size", "mucs": "part of L_null", "relabel": "steps"}
_TITLES = {
    "forget": "loss, forgotten", "forget_change": "change", "remain": "loss, remaining", "remain_change": "change",
    "held_out": "loss, held out", "held_out_change": "change", "similarity_forget": "similarity, their prompts",
    "similarity_remain": "similarity, other prompts", "clap_forget": "CLAP score, their prompts",
    "clap_remain": "CLAP score, other prompts", "frechet": "Frechet distance",
    "kl_forget": "KL of labels, their prompts", "kl_remain": "KL of labels, other prompts",
}  # fmt: skip
KL_NOTE = (
    "KL of labels: mean, over pairs of pieces from the same prompt and noise, of the divergence of the labels that the classifier gives to "
    "the unlearned model's piece from those of the untouched model's, in nats; 0: it hears the same."
)
_ENDS = ("", "_low", "_high")


def write_report(out: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], method: str) -> None:
    """Write all of it; the first row is the untouched model's.

    Args:
        out: folder.
        rows: as :meth:`attr_engine.forget.Forgetting.run` returns them.
        about: what they are of.
        method: how it was unlearned.
    """
    write_text(out / f"{NAME}.csv", _csv(rows))
    write_text(out / f"{NAME}.md", markdown(rows, about, method))
    if find_spec("matplotlib") is not None:
        _plot(out / f"{NAME}.png", rows, method)
    write_json(out / f"{NAME}.json", {**about, "rows": list(rows)})


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in _TITLES if any(name in row for row in rows)]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a strength; intervals in columns of their own."""
    names = [(name, k) for name in _columns(rows) for k in range(1 if name == "frechet" else 3)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["strength", "steps", "ended", "size", *(name + _ENDS[k] for name, k in names)])
    for row in rows:
        fixed = [row["strength"], row.get("steps", 0), row.get("ended", True), row.get("size", 0.0)]
        writer.writerow([*fixed, *(_number(row.get(name), k) for name, k in names)])
    return text.getvalue()


def _number(value: Any, k: int) -> Any:
    if value is None:
        return ""
    return value[k] if isinstance(value, list) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value[0]:.4g} ({value[1]:.4g} to {value[2]:.4g})"
    )


def markdown(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], method: str) -> str:
    """The table with what it is of."""
    names, forgotten, s = _columns(rows), about["forgotten"], about["settings"]
    listed = ", ".join(f"`{x}`" for x in forgotten[:12]) + (
        f" and {len(forgotten) - 12} more" if len(forgotten) > 12 else ""
    )
    lines = [
        f"# Forgotten by {method}: {len(forgotten)} training tracks",
        "",
        f"{listed}.",
        "",
        f"| strength ({_UNITS[method]}) | steps | " + " | ".join(_TITLES[n] for n in names) + " |",
        "|" + " --- |" * (len(names) + 2),
    ]  # fmt: skip
    for row in rows:
        first = "untouched" if row["strength"] == 0 else f"{row['strength']:g}"
        steps = f"{row.get('steps', 0)}" + ("" if row.get("ended", True) else " (not reached)")
        lines.append(f"| {first} | {steps} | " + " | ".join(_cell(row.get(n)) for n in names) + " |")
    counts = ", ".join(f"{n} {name.replace('_', '-')}" for name, n in about["tracks"].items())
    lines += [
        "",
        f"Losses: mean over tracks ({counts}) and {s['draws']} draws, valid frames only, the same draws before and after, with the 95 % "
        f"bootstrap interval over tracks; an untrained network has {rows[0]['null_loss']:.4g} on the forgotten ones.",
    ]
    if s["pieces"]:
        lines += [
            f"Similarity: largest cosine of a generated piece with a forgotten track in {s['embedding']}, mean over {s['pieces']} pieces "
            "from prompts of forgotten tracks, and of others. Frechet distance: of the latter from the remaining tracks. The same "
            "prompts and noise for every model; so few pieces make it too large: compare it with the first row only.",
        ]
        lines += [
            f"CLAP score: cosine of a piece's audio and the text that it was generated from (conditioning {s['text']!r}) by {s['clap']!r}, "
            "mean over the same pieces."
            if s["clap"]
            else "No CLAP score: no checkpoint was named (--clap FOLDER).",
        ]
    if s["pieces"] and s["classifier"]:
        lines += [KL_NOTE]
    if about["done"] < about["strengths"]:
        lines += [f"So far {about['done']} of {about['strengths']} strengths."]
    return "\n".join(lines) + "\n"


def _plot(path: Path, rows: Sequence[Mapping[str, Any]], method: str) -> None:
    """Loss of what is forgotten against that of what remains, and against the Frechet distance."""
    from matplotlib.figure import Figure

    sides = [name for name in ("remain", "frechet") if all(row.get(name) is not None for row in rows)]
    figure = Figure(figsize=(5 * len(sides), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        points = [(row["forget"], row[name]) for row in rows]
        across = [x[0] for x, _ in points]
        up = [y[0] if isinstance(y, list) else y for _, y in points]
        axes.plot(across, up, color="0.7", zorder=0)
        axes.scatter(across, up)
        for row, x, y in zip(rows, across, up, strict=True):
            axes.annotate(f"{row['strength']:g}", (x, y), textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel=_TITLES["forget"], ylabel=_TITLES[name], title=method)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
