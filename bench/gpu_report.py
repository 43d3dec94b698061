"""From what gpu.py measured to criteria, derived figures and Markdown tables."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

DRAWS = 2048
TRACKS = 115_000
PAPER_STEP = 1200.0  # seconds on an H100, arXiv 2506.18312
PAPER_HOURS = 40.0  # GPU-hours to score all tracks for one query: 5 h on 8 H100
# Datasheets: dense bfloat16 TFLOP/s, TB/s of memory. Times are scaled to an H100 by the ratios of either.
DATASHEETS = {"H100": {"matrix": 989.0, "copy": 3.35}, "H200": {"matrix": 989.0, "copy": 4.8}}


def _result(result: Row, part: str) -> Row:
    return result["parts"].get(part, {}).get("result") or {}


def _card(result: Row) -> str:
    return str((result["environment"].get("gpu") or {}).get("name", ""))


def criteria(result: Row) -> list[Row]:
    """What was asked for and what was found; None is "not measured", as everything is that ran on small shapes."""
    claimed = not result["tiny"] and result["device"] == "cuda"
    passes = _result(result, "passes").get("passes", {}) if claimed else {}
    step = _result(result, "unlearning") if claimed else {}
    fisher, backward = passes.get("Fisher pass", {}), passes.get("forward + backward", {})
    both = bool(fisher and backward)
    allowed = backward["peak_bytes"] + 4 * _result(result, "passes")["parameters"] if both else 0
    found = [
        ("Fisher pass over a plain forward + backward pass", "at_most", 1.10, "H100",
         fisher["median"] / backward["median"] if both else None),
        ("peak memory of a Fisher pass over that of a plain one and a float32 Fisher", "at_most", 1.0, "",
         fisher["peak_bytes"] / allowed if both else None),
        ("seconds of an unlearning step of 2048 draws (aim 75)", "below", 90.0, "H200", step.get("step_seconds")),
        ("share of the card's matrix rate, unlearning step", "at_least", 0.55, "",
         step.get("share_of_matrix_rate")),
        ("share of the card's matrix rate, forward + backward", "at_least", 0.55, "",
         backward.get("share_of_matrix_rate")),
    ]  # fmt: skip
    return [_criterion(result, *entry) for entry in found]


def _criterion(result: Row, name: str, sense: str, bound: float, card: str, found: float | None) -> Row:
    right = {"at_most": lambda x: x <= bound, "below": lambda x: x < bound, "at_least": lambda x: x >= bound}
    here = not card or card in _card(result)
    return {
        "criterion": name, "asked": {sense: bound}, "asked_of": card, "found": found,
        "passed": None if found is None or not here else right[sense](found),
        "note": "" if found is None or here else f"asked of an {card}, measured on another card",
    }  # fmt: skip


def derived(result: Row) -> Row:
    """Floors, the step beside the paper's, and the pass over the whole data set."""
    if result["tiny"] or result["device"] != "cuda":
        return {}
    out: Row = {}
    ceilings = _result(result, "ceilings")
    step, counted = _result(result, "unlearning"), _result(result, "agreement").get("tflop_a_row", {})
    if ceilings and counted:
        rate = ceilings["products"]["bfloat16"]["tflops"]
        out["floor_step_seconds"] = DRAWS * counted["forward + backward"] / rate
        out["floor_pass_hours"] = TRACKS * counted["forward"] / rate / 3600
    card = next((name for name in DATASHEETS if name in _card(result)), None)
    if step and card:
        seconds, h100 = step["step_seconds"], DATASHEETS["H100"]
        by = {name: seconds * rate / h100[name] for name, rate in DATASHEETS[card].items()}
        out["step_on_an_h100"] = {
            "seconds_by": {"own": seconds} if card == "H100" else by,
            "scaled": card != "H100", "paper_seconds": PAPER_STEP,
        }  # fmt: skip
    scoring = _result(result, "scoring")
    out["data_set_pass"] = [
        {"way": way, "queries": row["queries"], "tracks": TRACKS, "paper_hours_a_query": PAPER_HOURS,
         "gpu_hours_a_draw_and_query": row["seconds_a_row_and_query"] * TRACKS / 3600,
         "gpu_hours_a_draw": row["seconds_a_row_and_query"] * row["queries"] * TRACKS / 3600}
        for way in ("forward", "first_order") for row in scoring.get(way, [])
    ]  # fmt: skip
    return out


# -- Markdown -------------------------------------------------------------------------------------


def markdown(result: Row) -> str:
    """The whole result as tables."""
    versions = result["environment"]["versions"]
    where = _card(result) or f"CPU ({result['environment']['cpu']})"
    lines = [
        f"{where}; torch {versions['torch']}, triton {versions['triton']}; commit {result['environment']['commit'][:12]}"
    ]
    if result["tiny"]:
        lines += ["", "**Small shapes on a CPU: no time, rate or memory below means anything.**"]
    for part in (_checks, _ceilings, _passes, _step, _scores, _kernels, _tiles, _parts, _criteria):
        lines += part(result)
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    out = ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(_shown(cell) for cell in row) + " |" for row in rows]


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return "" if cell is None else str(cell).replace("|", "/")


def _checks(result: Row) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for check in result["checks"]:
        groups.setdefault((check["kernel"], check["dtype"]), []).append(check)
    rows: list[list[Any]] = []
    for (kernel, dtype), found in groups.items():
        red = [c for c in found if not c["green"]]
        worst = {key: max((c[key] for c in found if isinstance(c.get(key), float)), default=None)
                 for key in ("error", "bmm_and_square", "rounding_of_inputs")}  # fmt: skip
        verdict = f"**{len(red)} red**: {red[0]['way']} {red[0]['what']}" if red else "green"
        rows.append([kernel, dtype, len(found), *worst.values(), verdict])
    head = ["kernel", "dtype", "checks", "worst error", "of bmm + square", "rounding the inputs", ""]
    return _table(head, rows)


def _ceilings(result: Row) -> list[str]:
    found = _result(result, "ceilings")
    if not found:
        return []
    rows = [["device-to-device copy, GB/s", found["copy_gb_per_s"], found["copy"]["spread"]]]
    rows += [[f"{n} product of a {p['cube']}-cube, TFLOP/s", p["tflops"], p["spread"]]
             for n, p in found["products"].items()]  # fmt: skip
    return _table(["ceiling", "median", "spread"], rows)


def _gb(count: int) -> float:
    return count / 1e9


def _passes(result: Row) -> list[str]:
    rows = [[name, p["rows"], p["seconds_a_row"] * 1e3, p["spread"], p["tflops"], p["share_of_matrix_rate"], _gb(p["peak_bytes"])]
            for name, p in _result(result, "passes").get("passes", {}).items()]  # fmt: skip
    return _table(["pass", "rows", "ms a row", "spread", "TFLOP/s", "of the matrix rate", "peak GB"], rows)


def _step(result: Row) -> list[str]:
    step = _result(result, "unlearning")
    if not step:
        return []
    more = result.get("derived", {})
    rows: list[list[Any]] = [
        [f"step of {step['draws']} draws, s ({step['step_is']})", step["step_seconds"]],
        ["of it the damped step, s", step["precondition_seconds"]],
        ["share of the matrix rate", step["share_of_matrix_rate"]],
        ["peak GB", _gb(step["peak_bytes"])],
        ["floor at the card's own matrix rate, s", more.get("floor_step_seconds")],
    ]
    other = more.get("step_on_an_h100")
    if other:
        kind = "SCALED to an H100" if other["scaled"] else "on this H100"
        rows += [
            [f"{kind} by the datasheets' {name} rates, s" if other["scaled"] else f"{kind}, s", seconds]
            for name, seconds in other["seconds_by"].items()
        ]
        rows.append(["the paper, on an H100, s", other["paper_seconds"]])
    return _table(["unlearning", ""], rows)


def _scores(result: Row) -> list[str]:
    names = {"forward": "a forward pass a query", "first_order": "first order, one backward pass"}
    scoring, hours = _result(result, "scoring"), result.get("derived", {}).get("data_set_pass", [])
    rows = []
    for way, name in names.items():
        for p in scoring.get(way, []):
            over = [h for h in hours if (h["way"], h["queries"]) == (way, p["queries"])]
            rows.append([name, p["queries"], p["rows"], p["seconds_a_row_and_query"] * 1e3, p["share_of_matrix_rate"],
                         _gb(p["peak_bytes"]), over[0]["gpu_hours_a_draw_and_query"] if over else None])  # fmt: skip
    head = ["scoring", "queries", "rows", "ms a row and query", "of the matrix rate", "peak GB",
            f"GPU-h a draw and query, {TRACKS} tracks (paper: {PAPER_HOURS:g} a query)"]  # fmt: skip
    return _table(head, rows)


def _kernels(result: Row) -> list[str]:
    """One line a kernel and shape; its peers follow it in the result."""
    rows: list[list[Any]] = []
    ours: Row = {}
    for r in _result(result, "kernels").get("rows", []):
        if r["ours"]:
            ours = r
            rows.append([f"{r['kernel']} {r['way']}", r["what"], r["dtype"], r["median"] * 1e3, r["spread"],
                         r["share_of_matrix_rate"], r["share_of_copy"], _gb(r["peak_bytes"]), ""])  # fmt: skip
        else:
            times, memory = r["median"] / ours["median"], _gb(r["peak_bytes"])
            rows[-1][-1] += f"{'; ' if rows[-1][-1] else ''}{r['way']} {times:.2f}, {memory:.2g} GB"
    head = [
        "kernel",
        "shape",
        "dtype",
        "ms",
        "spread",
        "of the matrix rate",
        "of the copy",
        "peak GB",
        "times as long, peak",
    ]
    return _table(head, rows)


def _tiles(result: Row) -> list[str]:
    lines = _result(result, "tiles").get("lines", [])
    if not lines or result["tiny"]:
        return []
    return ["", "Rows for `kernels/table.py`:", "", "```", *lines, "```"]


def _parts(result: Row) -> list[str]:
    rows = []
    for name, part in result["parts"].items():
        if part["status"] != "done":
            rows.append([name, part["status"], part["reason"]])
        rows += [[name, f"skipped: {s['what']}", s["reason"]] for s in part["skipped"]]
    return _table(["part", "not measured", "why"], rows)


def _criteria(result: Row) -> list[str]:
    words = {"at_most": "≤", "below": "<", "at_least": "≥"}
    rows = []
    for c in result.get("criteria", []):
        ((sense, bound),) = c["asked"].items()
        verdict = {True: "met", False: "**not met**", None: c["note"] or "not measured"}[c["passed"]]
        rows.append([c["criterion"], f"{words[sense]} {bound:g}", c["asked_of"], c["found"], verdict])
    return _table(["criterion", "asked", "of", "found", ""], rows)
