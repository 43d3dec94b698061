"""The engine on a GPU against itself on the CPU in float64: ``python -m pytest -m gpu``."""

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, Settings, attribute, fit_fisher
from attr_engine.kernels import launch
from attr_engine.memory import fit_rows, peak_bytes
from attr_engine.models.protocol import select_parameters
from attr_engine.score import SCORE_FUNCTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not launch.have_triton(), reason="needs a GPU and Triton"
    ),
]
SETTINGS = Settings(
    self_influence=("t1", "t3"), replicates=2, fisher_draws=2, update_draws=8, score_draws=2, layers=("all",),
    functions=tuple(SCORE_FUNCTIONS),
)  # fmt: skip


def on_gpu(model):
    """The same model on the GPU."""
    pytest.importorskip("stable_audio_tools")
    model.wrapper.to("cuda")
    model.device = torch.device("cuda")
    return model


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(objective, seed, rng, measured, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch allows it for convolutions
    model = helpers.tiny_stable_audio(seed, torch.float32, objective=objective)
    tracks = helpers.make_tracks(rng, 6, model.channels, model.frames)
    exact = attribute(model.double_copy(), tracks, settings=SETTINGS)
    found = attribute(on_gpu(model), tracks, settings=SETTINGS)
    again = attribute(model, tracks, settings=SETTINGS)
    for name in SCORE_FUNCTIONS:
        assert np.array_equal(found.values[name], again.values[name]), "not the same bits"
        for u in range(2):
            error = naive.relative_error(
                found.values[name][u], exact.values[name][u], 1e-2 * exact.base.max()
            )
            measured(name, error)
            assert error < 1e-3


def test_bfloat16_runs(seed, rng):
    model = on_gpu(helpers.tiny_stable_audio(seed, torch.bfloat16))
    tracks = helpers.make_tracks(rng, 4, model.channels, model.frames)
    result = attribute(model, tracks, settings=SETTINGS)
    assert all(np.isfinite(v).all() for v in result.values.values())


def test_the_bound_on_memory_is_kept(seed, rng):
    model = on_gpu(helpers.tiny_stable_audio(seed, torch.float32))
    tracks, plan = helpers.make_tracks(rng, 6, model.channels, model.frames), DrawPlan(seed)
    parameters = select_parameters(model, ("all",))
    weights = sum(x.numel() * x.element_size() for x in model.module.state_dict().values())
    rows = fit_rows(model, parameters, tracks.batch([0], model.frames), plan, 0.5, 16)
    peak = peak_bytes(
        lambda: fit_fisher(model, tracks, ("all",), plan, 4 * rows, rows=rows), torch.device("cuda")
    )
    assert weights + peak <= 0.5e9
