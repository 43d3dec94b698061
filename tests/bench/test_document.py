"""The documentation says what bench/results says; a block that would drift is found; the cost model's sums are those of loops."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
pytest.importorskip("triton")  # the tables of the kernels are by the module that knows them


def script(name, *arguments, cwd=ROOT):
    command = [sys.executable, str(cwd / "bench" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def modules():
    """Modules of bench/, and no trace of the path afterwards."""
    kept = list(sys.path)
    sys.path[:0] = [str(BENCH)]
    import blocks
    import cost_model
    import cost_tables
    import plots

    yield blocks, cost_model, cost_tables, plots
    sys.path[:] = kept


def test_the_committed_documentation_is_what_the_results_say():
    done = script("document.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_of_a_method_has_figures_or_says_that_nothing_was_measured():
    """Removal, and what is no method, have tables of their own."""
    others = {"forget", "perturbation-curves", "search", "strength"}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert page.stem in others or ("<!-- figures: python bench/methods.py --figures " in text) != (
            "Not measured: " in text
        ), page
    assert script("methods.py", "--figures", "ridge", "clap").returncode == 1


def test_a_changed_figure_is_found_put_right_and_the_text_around_it_stays(tmp_path):
    page = tmp_path / "page.md"
    command = "bench/cost_model.py --floor"
    page.write_text(f"before\n\n<!-- floor: python {command} -->\n| wrong |\n<!-- end -->\nafter\n")
    assert script("document.py", page, "--check").returncode == 1
    assert "| wrong |" in page.read_text()
    assert script("document.py", page).returncode == 0
    printed = script("cost_model.py", "--floor").stdout.strip()
    assert page.read_text() == (
        f"before\n\n<!-- floor: python {command} -->\n\n{printed}\n\n<!-- end -->\nafter\n"
    )
    assert script("document.py", page, "--check").returncode == 0


def test_a_changed_result_makes_its_table_and_its_plot_stale(tmp_path):
    copy = tmp_path / "project"
    for name in ("bench/results", "docs", "attr_engine"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    for path in [*BENCH.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    path = copy / "bench" / "results" / "index.json"
    result = json.loads(path.read_text())
    ours = next(row for row in result["speed"]["rows"] if row["way"].startswith("ours"))
    ours["median"] *= 2
    path.write_text(json.dumps(result))
    done = script("document.py", "--check", cwd=copy)
    assert done.returncode == 1
    assert done.stdout, done.stderr
    assert {Path(line.split(" ")[0]).name for line in done.stdout.splitlines()} == {
        "performance.md",
        "index-time.svg",
    }


def test_plots_that_cannot_be_drawn_are_named_and_are_a_failure(modules, tmp_path, monkeypatch, capsys):
    import document

    plots, drawn = modules[3], []
    monkeypatch.setattr(document, "PAGES", ())
    monkeypatch.setattr(plots, "stale", lambda: [tmp_path / "a.svg"])
    monkeypatch.setattr(plots, "draw", drawn.append)

    def call(installed: bool, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(document, "find_spec", lambda _: object() if installed else None)
        monkeypatch.setattr(sys, "argv", ["document.py", *words])
        return document.main(), *capsys.readouterr()

    code, out, said = call(False)
    assert code == 1 and not out and not drawn and "a.svg; pip install '.[figures]'" in said
    assert call(True) == (0, f"{tmp_path / 'a.svg'} written\n", "") and drawn == [[tmp_path / "a.svg"]]
    for installed in (False, True):
        assert call(installed, "--check") == (1, f"{tmp_path / 'a.svg'} is not as the results are\n", "")
    monkeypatch.setattr(plots, "stale", list)
    assert call(False) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- a: python bench/fisher.py -->\n", "'a' does not end"),
        ("<!-- a: python bench/fisher.py -->\n<!-- b: python bench/fisher.py -->\n<!-- end -->\n", "'a' does not end"),
        ("<!-- a: python bench/fisher.py -->\n<!-- end -->\n" * 2, "two blocks are named 'a'"),
    ],
)  # fmt: skip
def test_broken_blocks_are_refused_by_name(modules, text, problem):
    with pytest.raises(ValueError, match=problem):
        modules[0].renewed(text, lambda command: command)


def test_only_scripts_of_this_folder_are_run_and_one_that_fails_is_named(modules):
    text = "<!-- a: rm -r x -->\n<!-- note: python other.py -->\ntext\n<!-- end -->\n"
    assert modules[0].renewed(text, lambda _: pytest.fail("nothing is to be run")) == text
    with pytest.raises(RuntimeError, match=r"bench/cost_model.py --draws 0"):
        modules[0].prints("bench/cost_model.py --draws 0")


def test_the_cost_model_counts_what_the_model_multiplies(modules, rng):
    """FLOP of a forward and of a backward pass by torch's counter, parameters and weight products by the weights themselves."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("stable_audio_tools")
    from gpu_model import Dit, Size
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    heads = int(rng.integers(2, 5))
    size = Size(
        channels=8, width=64 * heads, depth=int(rng.integers(1, 4)), heads=heads, context_width=64, timing_width=128,
        frames=int(rng.integers(20, 40)), context=5,
    )  # fmt: skip
    model, counted = Dit(size, torch.float32, torch.device("cpu"), 0), modules[1].Model(size, 1, 4)
    x = torch.randn(1, size.channels, size.frames)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.predict(x, torch.tensor([0.5]), model.conditioning([{"row": 0}])).sum()
    assert counted.forward().flop == pytest.approx(counter.get_total_flops(), rel=0.01)
    weights = {n: p for n, p in model.module.named_parameters() if p.ndim > 1}
    assert counted.parameters == pytest.approx(sum(p.numel() for p in weights.values()), rel=0.02)
    layers = [p for n, p in weights.items() if ".layers." in n and n.endswith(".weight")]
    assert counted.group == sum(p.numel() for p in layers)
    tokens = size.frames + 1
    products = sum(
        2 * (size.context if tuple(p.shape) == (2 * 64, 64) else tokens) * p.numel() for p in layers
    )
    assert counted.weight_products() == pytest.approx(products, rel=0.05)


def test_the_methods_add_up(modules, rng):
    cost = modules[1]
    from gpu_model import Size

    model = cost.Model(replace(Size(), frames=int(rng.integers(50, 2584))), int(rng.integers(1, 8)))
    n, t, k = (int(rng.integers(2, 50)) for _ in range(3))
    forward = model.forward().flop
    loop = sum(forward for _ in range(n) for _ in range(t) for _ in range(1 + k))
    assert model.unlearning(n, t, k).flop == pytest.approx(loop)
    assert model.fisher(n, t).flop == pytest.approx(3 * forward * n * t)
    assert model.update(k, t, 2).flop == pytest.approx(k * 2 * t * 3 * forward)
    assert model.influence(n, t, k).flop == pytest.approx(n * t * (3 * forward + 2 * k * model.group))
    assert model.index(n, t, 1).flop < model.fisher(n, t).flop
    assert model.race(n, 256, 1, 1.0).flop == pytest.approx(model.unlearning(n, 256, 1).flop)
    card = cost.Card("", 1e12, 1e9, "")
    for work in (model.fisher(n, t), cost.Work(2e12, 1e9)):
        least, apart = work.seconds(card, 0.5)
        assert least == pytest.approx(max(work.flop / 5e11, work.traffic / 1e9))
        assert apart == pytest.approx(work.flop / 5e11 + work.traffic / 1e9)


def test_scaled_figures_are_marked_and_missing_ones_said(modules, tmp_path, monkeypatch):
    tables = modules[2]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.paper().count("not yet measured") == 3
    step = {"seconds_by": {"matrix": 90.0}, "scaled": True}
    (tmp_path / "gpu.json").write_text(json.dumps({"derived": {"step_on_an_h100": step}}))
    assert "90 s (matrix, scaled)" in tables.paper()


def test_measured_scores_stand_beside_the_papers_with_their_card(modules, tmp_path, monkeypatch, rng):
    tables = modules[2]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    hours = float(rng.uniform(1, 5))
    passes = [
        {"way": way, "queries": q, "gpu_hours_a_draw": h}
        for way, q, h in (("forward", 1, hours), ("forward", 4, 99.0), ("first_order", 1, 98.0))
    ]
    gpu = {"environment": {"gpu": {"name": "Card X"}}, "derived": {"data_set_pass": passes}}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    one, sixteen = (
        next(line for line in tables.paper().splitlines() if f", {draws} |" in line)
        for draws in ("1 draw", "16 draws")
    )
    assert f"| {hours:.3g} GPU-h (from rows, on Card X) |" in one
    assert f"| {16 * hours:.3g} GPU-h (from rows, on Card X) |" in sixteen
    assert tables.paper().count("not yet measured") == 1
