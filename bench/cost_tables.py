"""Tables of ``bench/cost_model.py``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_model import CARDS, WIDE, Model, Work, solve_flop
from gpu_model import Size
from gpu_report import DRAWS, PAPER_HOURS, PAPER_STEP, TRACKS

RESULTS = Path(__file__).resolve().parent / "results"
PAPER_QUERY = 3600.0 * PAPER_HOURS  # seconds of one H100: 5 h on 8 of them
REACHED = 0.55  # share of the matrix rate that is asked of the engine, not measured
DEMO = Size(
    channels=256, width=128, depth=4, heads=4, context_width=128, timing_width=128, frames=47, context=4
)  # 188 frames, patches of 4


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _time(seconds: float) -> str:
    for unit, size in (("GPU-h", 3600.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * (0.1 if unit == "GPU-h" else 1.0):
            return (
                f"{seconds / size:,.0f} {unit}" if seconds >= 100 * size else f"{seconds / size:.3g} {unit}"
            )
    return f"{1e3 * seconds:.2g} ms"


def _bytes(value: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B" if value else ""


def methods(model: Model, args: argparse.Namespace) -> str:
    """Every method for so many tracks, draws and queries."""
    n, t, k, card = args.tracks, args.draws, args.queries, CARDS[args.card]
    made: dict[str, Work] = {
        f"Fisher, {args.fisher_draws} draws a track (once)": model.fisher(n, args.fisher_draws),
        f"updates, {args.update_draws} draws, one step": model.update(k, args.update_draws),
        f"scores by unlearning, 1 + {k} forward passes": model.unlearning(n, t, k),
        "scores to first order (influence)": model.influence(n, t, k),
        f"index or ridge, {args.index_draws} draws (once)": model.index(n, args.index_draws),
        f"race, at most {args.race_share:g} of 256 draws": model.race(n, 256, k, args.race_share),
    }
    rows = []
    for name, work in made.items():
        least, apart = work.seconds(card, args.share)
        rows.append([name, f"{work.flop / 1e15:,.3g}", _time(least), _time(apart), _bytes(work.held), _bytes(work.disk)])  # fmt: skip
    head = ["work", "PFLOP", "at least", "without overlap", "on the card", "on disk"]
    return (
        f"{n:,.0f} tracks of {model.size.frames} frames, {t} draws, {k} queries; {card.name} ({card.source}) at {args.share:g} of its "
        f"matrix rate; bfloat16, {model.rows} rows a pass. Counted, not measured.\n\n" + _table(head, rows)
    )


def floor() -> str:
    """The least that single pieces of work take, by arithmetic alone."""
    model = Model(Size())
    forward, both = model.forward().flop, model.backward().flop
    work = {
        "one forward pass of a row": forward,
        "one forward + backward pass": both,
        "the same without the weights' gradients": both - model.weight_products(),
        f"{DRAWS} forward + backward passes: one unlearning step": DRAWS * both,
        f"{TRACKS:,} forward passes: one draw of every track": TRACKS * forward,
        f"a Fisher of {TRACKS:,} tracks, one draw each": TRACKS * both,
    }
    cards = [CARDS["h100"], CARDS["h200-cube"]]
    rows = [
        [name, f"{flop / 1e12:,.3g}" if flop < 1e15 else f"{flop / 1e12:,.0f}", *(_time(flop / c.matrix) for c in cards)]
        for name, flop in work.items()
    ]  # fmt: skip
    head = [
        "work",
        "TFLOP",
        *(f"at {c.matrix / 1e12:.0f} TFLOP/s ({c.name}, {c.source.split(';')[0]})" for c in cards),
    ]
    return _table(head, rows)


def _share(seconds: float, flop: float) -> str:
    return f"{flop / CARDS['h100'].matrix / seconds:.3f}"


def _scored(gpu: Any, draws: int) -> str:
    """What one query over all tracks takes by what gpu.py measured of a row; its card is named, for nothing is scaled to another."""
    passes = gpu["derived"].get("data_set_pass", ())
    found = [p["gpu_hours_a_draw"] for p in passes if (p["way"], p["queries"]) == ("forward", 1)]
    if not found:
        return "not yet measured"
    return f"{_time(3600 * draws * found[0])} (from rows, on {gpu['environment']['gpu']['name']})"


def paper() -> str:
    """The paper's figures, the floor, and what a GPU of ours measured, if it did."""
    model, card = Model(Size()), CARDS["h100"]
    step = model.update(1, DRAWS)
    path = RESULTS / "gpu.json"
    gpu = json.loads(path.read_text()) if path.exists() else {"derived": {}}
    compared = gpu["derived"].get("step_on_an_h100", {})
    ours = compared.get("seconds_by")
    shown = (
        ", ".join(
            f"{_time(s)} ({kind}{', scaled' if compared['scaled'] else ''})" for kind, s in ours.items()
        )
        if ours
        else "not yet measured"
    )
    rows = [
        [
            f"one unlearning step of {DRAWS} timesteps", _time(PAPER_STEP), _share(PAPER_STEP, step.flop),
            *(_time(s) for s in step.seconds(card)), _time(step.seconds(card, REACHED)[1]), shown,
        ]
    ]  # fmt: skip
    for draws in (1, 16):
        work = model.unlearning(TRACKS, draws, 1)
        rows.append([
            f"scores of {TRACKS:,} tracks for one query, {draws} draw{'s' * (draws > 1)}", _time(PAPER_QUERY),
            _share(PAPER_QUERY, work.flop), *(_time(s) for s in work.seconds(card)),
            _time(work.seconds(card, REACHED)[1]), _scored(gpu, draws),
        ])  # fmt: skip
    draws_of = PAPER_QUERY * card.matrix / (2 * TRACKS * model.forward().flop)
    head = ["work", "the paper, H100", "its share of the matrix rate", "floor", "without overlap", f"at {REACHED} of the rate (asked)",
            "ours, measured"]  # fmt: skip
    note = (
        f"The paper does not say how many draws its scores took: 40 GPU-hours at the full matrix rate would be {draws_of:.0f} draws a "
        f"track, at {REACHED} of it {draws_of * REACHED:.0f}."
    )
    return _table(head, rows) + "\n\n" + note


# -- checks -------------------------------------------------------------------------------------------


def checks() -> str:
    """Predicted beside measured, from bench/results: what could be checked without a GPU."""
    rows = [*_fisher_checks(), *_score_checks(), *_process_checks(), *_memory_checks(), *_index_checks()]
    head = ["what", "from", "predicted", "measured", "error"]
    return _table(
        head, [[*r[:2], f"{r[2]:.3g}", f"{r[3]:.3g}", f"{round(100 * (r[2] / r[3] - 1)):+d} %"] for r in rows]
    )


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _fisher_checks() -> list[tuple[str, str, float, float]]:
    cases, out = {c["tokens"]: c for c in _read("fisher")["cases"]}, []

    def case(tokens: int) -> Model:
        c = cases[tokens]
        size = Size(
            width=c["width"], depth=c["depth"], context_width=64, timing_width=64, frames=tokens, context=4
        )
        return Model(size, rows=1, number=WIDE)

    middle = 1024
    measured = {t: {r["way"]: r["median_seconds"] for r in c["rows"]} for t, c in cases.items()}
    for tokens in (t for t in cases if t != middle):
        want = case(tokens).backward().flop / case(middle).backward().flop
        for way in ("backward", "engine"):
            got = measured[tokens][way] / measured[middle][way]
            out.append((f"time of {way} at {tokens} tokens, of that at {middle}", "fisher.json", want, got))
    low, high = min(cases), max(cases)
    grown = [case(t).backward().held for t in (low, high)]
    found = [1e6 * cases[t]["batch_one"]["engine"] for t in (low, high)]
    name = f"MB of a row's backward pass, {high} tokens less {low}"
    return [*out, (name, "fisher.json", (grown[1] - grown[0]) / 1e6, (found[1] - found[0]) / 1e6)]


def _score_checks() -> list[tuple[str, str, float, float]]:
    found, model = _read("score")["queries"], Model(DEMO, 16, WIDE)
    n, t, k = found["tracks"], found["draws"], found["queries"]
    separate = k * model.unlearning(n, t, 1).flop
    want = {"one pass": model.unlearning(n, t, k).flop, "influence": model.influence(n, t, k).flop}
    return [
        (f"time of {way} of {k} queries, of {k} separate runs", "score.json", flop / separate,
         statistics.median(r[way] / r["separate"] for r in found["rounds"]))
        for way, flop in want.items()
    ]  # fmt: skip


def _process_checks() -> list[tuple[str, str, float, float]]:
    """256 tracks, 4 queries: 4 draws for the Fisher, 64 for an update, 8 for a score (bench/processes.py)."""
    median = {r["stage"]: r["median"] for r in _read("processes")["rows"] if r["processes"] == 1}
    model = Model(DEMO, 16, WIDE)
    rate = model.fisher(256, 4).flop / median["fisher"]
    want = {"updates": model.update(4, 64).flop, "scoring": model.unlearning(256, 8, 4).flop}
    return [
        (f"seconds of {stage}, at the rate of the Fisher", "processes.json", flop / rate, median[stage])
        for stage, flop in want.items()
    ]


def _memory_checks() -> list[tuple[str, str, float, float]]:
    out = []
    for row in _read("score")["memory"]["rows"]:
        number = {"bfloat16": 2, "float32": WIDE}[row["dtype"]]
        model = Model(replace(Size(), frames=row["frames"]), 1, number)
        updates = 2 if row["what"] == "two, resident" else 1
        held = model.unlearning(1, 1, 1).held + (updates - 1) * model.group * number
        name = f"GB of scoring, {row['dtype']}, {row['what']}, {row['frames']} frames"
        out.append((name, "score.json", held / 1e9, (row["weights"] + row["beside"]) / 1e9))
    return out


def _index_checks() -> list[tuple[str, str, float, float]]:
    memcpy = {r["threads"]: r["gb_per_s"]["median"] for r in _read("stream")["rows"] if r["name"] == "memcpy"}
    return [
        (f"ms of a query over {r['tracks']:,} x {r['width']} {r['numbers']}, {r['threads']} threads, at the rate of memcpy",
         "index.json, stream.json", r["megabytes"] / memcpy[r["threads"]], 1e3 * r["median"])
        for r in _read("index")["speed"]["rows"] if r["way"].startswith("ours") and "failed" not in r
    ]  # fmt: skip


# -- past one machine ---------------------------------------------------------------------------------


def plan() -> str:
    """What grows with the corpus, by the model above, on H100s at the share that is asked."""
    sets = (
        ("115,000 tracks of two minutes", 115e3, 2584),
        ("5 million windows of 3 s", 5e6, 65),
        ("5 million windows of two minutes", 5e6, 2584),
        ("100 million tracks of two minutes", 100e6, 2584),
    )
    head = ["", *(name for name, _, _ in sets)]
    card, columns = CARDS["h100"], []
    for _, n, frames in sets:
        model = Model(replace(Size(), frames=frames), 4 if frames == 2584 else 64)
        features = model.size.depth * 7 * 16**2

        def time(work: Work) -> str:
            return " to ".join(_time(s) for s in work.seconds(card, REACHED))

        columns.append({
            "latents, float16": _bytes(n * frames * 64 * 2),
            "index of 1,024 numbers, float16": _bytes(n * 1024 * 2),
            "index of 256 numbers, int8": _bytes(n * 256),
            "its units while it is built, rank 16, float32": _bytes(n * features * WIDE),
            "building it, 8 draws": time(model.index(n, 8)),
            "its solve today, float64 on a CPU": f"{solve_flop(n, features) / 1e15:,.3g} PFLOP, {_bytes(8.0 * features**2)}",
            "reading it for one query (1,024, float16) at 12 GB/s": f"{n * 2048 / 12e9:.3g} s",
            "Fisher, one draw a track": time(model.fisher(n, 1)),
            "scores by unlearning, one query, 16 draws": time(model.unlearning(n, 16, 1)),
            "the 300 best of the index again, 16 draws": time(model.unlearning(300, 16, 1)),
        })  # fmt: skip
    rows = [[name, *(c[name] for c in columns)] for name in columns[0]]
    return f"H100s (datasheet) at {REACHED} of the matrix rate, bfloat16; counted, not measured.\n\n" + _table(head, rows)  # fmt: skip
