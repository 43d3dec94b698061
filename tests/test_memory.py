"""A bound on memory is kept by every stage, is not wasted, and is refused where nothing fits."""

import helpers
import pytest
import torch

from attr_engine import DrawPlan, Settings, UserError, attribute, fit_fisher, measure_effects
from attr_engine.influence import measure_influence
from attr_engine.jobs import ROWS
from attr_engine.memory import MOST_ROWS, USUAL_ROWS, cpu_rows, fit_rows, peak_bytes
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import select_parameters
from attr_engine.unlearn import unlearn_query

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # 4000 more; a view is nothing
        del a
        b.add_(1)
        c = torch.zeros(500, dtype=torch.float64)  # in place of a
        return b.sum() + c.sum()  # three scalars

    assert 8000 <= peak_bytes(work, CPU) <= 8024


def make(seed, rng, layers=("all",), **options):
    size = {"channels": 8, "frames": 60, "dim": 32, "depth": 3, **options}
    model = helpers.ToyDenoiser(seed, dtype=torch.float32, **size)
    tracks = helpers.make_tracks(rng, 6, model.channels, model.frames)
    return model, tracks, select_parameters(model, layers), DrawPlan(seed, replicates=2)


@pytest.mark.parametrize("gigabytes", [0.004, 0.01])
@pytest.mark.parametrize("layers", ["all", "cross_attn.to_kv"])
def test_every_stage_stays_within_the_bound(gigabytes, layers, seed, rng, measured):
    model, tracks, parameters, plan = make(seed, rng, (layers,))
    batch = tracks.batch(range(4), model.frames)
    rows = fit_rows(model, parameters, tracks.batch([0], model.frames), plan, gigabytes, 4 * 4, 2)
    assert 1 <= rows < MOST_ROWS
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    fisher = fit_fisher(model, tracks, (layers,), plan, 2)
    updates = [unlearn_query(model, tracks, i, fisher, plan, 6, draws=2) for i in range(2)]
    loads = [lambda u=u: u for u in updates]
    held = 4 * sum(p.numel() for p in parameters.values())
    stages = {
        "fisher": (0, lambda n: fit_fisher(model, tracks, (layers,), plan, 40, rows=n)),
        "unlearn": (held, lambda n: unlearn_query(model, tracks, 0, fisher, plan, 6, draws=60, rows=n)),
        "score": (held, lambda n: measure_effects(model, batch, loads, plan, 4, rows=n)),
        "influence": (0, lambda n: measure_influence(model, parameters, batch, loads, plan, 4, rows=n)),
    }
    peaks = {
        name: weights + more + peak_bytes(lambda w=work: w(rows), CPU)
        for name, (more, work) in stages.items()
    }
    for name, peak in peaks.items():
        measured(f"{name} {layers} share of the bound", peak / gigabytes / 1e9)
        assert peak <= gigabytes * 1e9, name
    most = max(weights + more + peak_bytes(lambda w=work: w(rows + 2), CPU) for more, work in stages.values())
    assert most > 0.98 * gigabytes * 1e9 or rows == USUAL_ROWS, "room was wasted"


@pytest.mark.parametrize(("slope", "rows"), [(1e5, 16), (8e6, 15), (40e6, 3), (100e6, 1), (900e6, 1)])
def test_long_rows_are_few_on_a_cpu(slope, rows):
    def work(n):
        return torch.empty(int(slope * n + 4e6) // 4)

    assert cpu_rows(work) == rows


def test_without_a_bound_the_rows_of_a_run_are_chosen_once(seed, rng, tmp_path):
    model, tracks, *_ = make(seed, rng)
    settings = Settings(self_influence=("t0",), replicates=2, fisher_draws=2, update_draws=4, score_draws=2)
    attribute(model, tracks, settings=settings, out=tmp_path / "run")
    assert read_json(tmp_path / "run" / ROWS, "rows")["rows"] == USUAL_ROWS


def test_a_bound_that_nothing_fits_into_is_refused_before_anything_is_computed(seed, rng, tmp_path):
    model, tracks, *_ = make(seed, rng)
    settings = Settings(self_influence=("t0",), memory=1e-4, replicates=2, fisher_draws=2)
    with pytest.raises(
        UserError, match=r"the Fisher takes 0\.00\d+ GB with one row, more than --memory 0\.0001"
    ):
        attribute(model, tracks, settings=settings, out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_keeps_the_rows_that_it_began_with(seed, rng, tmp_path):
    model, tracks, *_ = make(seed, rng)
    options = {
        "self_influence": ("t0",), "replicates": 2, "fisher_draws": 2, "update_draws": 4, "score_draws": 2,
        "layers": ("all",), "functions": ("influence", "loss_change"),
    }  # fmt: skip
    settings = Settings(memory=0.004, **options)
    first = attribute(model, tracks, settings=settings, out=tmp_path / "run")
    rows = read_json(tmp_path / "run" / ROWS, "rows")["rows"]
    assert 1 < rows < MOST_ROWS
    again = attribute(model, tracks, settings=settings, out=tmp_path / "run")
    by_hand = attribute(model, tracks, settings=Settings(rows=rows, **options), out=tmp_path / "other")
    for name in options["functions"]:
        assert (first.values[name] == again.values[name]).all()
        assert (first.values[name] == by_hand.values[name]).all()
