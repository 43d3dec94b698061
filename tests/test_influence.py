"""First-order influence: the ways of measuring it agree, and it is what small updates do to the loss."""

import helpers
import naive
import numpy as np
import pytest

from attr_engine import DrawPlan, UserError, fit_fisher, influence, measure_effects
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.influence import measure_influence
from attr_engine.models.protocol import select_parameters
from attr_engine.unlearn import unlearn_query


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    tracks, plan = helpers.make_tracks(rng, 5, model.channels, model.frames), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    updates = [unlearn_query(model, tracks, i, fisher, plan, 5, 1e-7, draws=4) for i in (0, 3, 4)]
    return model, tracks.batch(range(5), model.frames), plan, updates


def measure(setting, function="loss", **options):
    model, batch, plan, updates = setting
    parameters = select_parameters(model, ("all",))
    loads = [lambda u=u: u for u in updates]
    found, base = measure_influence(
        model, parameters, batch, loads, plan, 4, True, function=ROW_FUNCTIONS[function], **options
    )
    assert naive.relative_error(base, measure_effects(model, batch, [], plan, 4, True).base) < 1e-12
    return found


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
def test_a_batch_and_single_rows_by_autograd_alone_agree(setting, function, measured):
    batch, loop = (measure(setting, function, gradients=way) for way in ("batch", "loop"))
    assert batch.shape == (3, 5, 4)
    error = naive.relative_error(batch, loop)
    measured("relative_error", error)
    assert error < 1e-11


def test_the_rows_of_a_pass_do_not_change_it(setting):
    assert naive.relative_error(measure(setting, rows=3), measure(setting, rows=20)) < 1e-11


@pytest.mark.parametrize(("room", "passes"), [(1.0, 3), (0.9, 3), (2.0, 2), (2.5, 2), (3.0, 1)])
def test_how_many_updates_a_pass_meets_does_not_change_it(setting, monkeypatch, room, passes):
    whole, plain, seen = measure(setting, rows=20), influence.row_dots, []
    one = sum(v.numel() * v.element_size() for v in setting[3][0].delta.values())
    monkeypatch.setattr(influence, "DIRECTION_BYTES", int(room * one))
    monkeypatch.setattr(influence, "row_dots", lambda *a: seen.append(0) or plain(*a))
    assert naive.relative_error(measure(setting, rows=20), whole) < 1e-11
    assert len(seen) == passes


def test_it_is_the_loss_change_of_a_small_update(setting, measured):
    model, batch, plan, updates = setting
    effects = measure_effects(model, batch, [lambda u=u: u for u in updates], plan, 4, True)
    error = naive.relative_error(measure(setting), effects.unlearned - effects.base)
    measured("relative_error", error)
    assert error < 1e-3


def test_an_update_of_part_of_the_model_meets_that_part(setting):
    model, batch, plan, updates = setting
    part = select_parameters(model, ("self_attn",))
    loads = [lambda u=u: u for u in updates]
    found, _ = measure_influence(model, part, batch, loads, plan, 2)
    assert found.shape == (3, 5, 2) and np.abs(found).max() > 0
    rest = select_parameters(model, ("all",))
    rest = {n: p for n, p in rest.items() if n not in part}
    whole, _ = measure_influence(model, select_parameters(model, ("all",)), batch, loads, plan, 2)
    assert (
        naive.relative_error(found + measure_influence(model, rest, batch, loads, plan, 2)[0], whole) < 1e-11
    )


def test_unusable_settings_are_refused_by_name(setting):
    with pytest.raises(UserError, match="'vmap'"):
        measure(setting, gradients="vmap")
    model, batch, plan, _ = setting
    with pytest.raises(UserError, match="score draws is 3"):
        measure_influence(model, select_parameters(model, ("all",)), batch, [], plan, 3)


def test_no_updates_give_an_empty_table(setting):
    model, batch, plan, _ = setting
    found, base = measure_influence(model, select_parameters(model, ("all",)), batch, [], plan, 2)
    assert found.shape == (0, 5, 2) and np.isnan(base).all()
