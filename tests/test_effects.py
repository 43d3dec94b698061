"""Effects by forward passes, tangents and finite differences; and the memory in which the updates live."""

from dataclasses import replace

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, fit_fisher, measure_effects, unlearn_query
from attr_engine.effects import Base, Tangents, measure_tangents
from attr_engine.updates import Directions, Unlearned, Update, applied, unlearned_weights


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks, plan = helpers.make_tracks(rng, 5, model.channels, model.frames), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 2)
    updates = [unlearn_query(model, tracks, i, fisher, plan, 5, draws=4) for i in (0, 3)]
    return model, tracks.batch(range(5), model.frames), plan, updates


def scaled(update: Update, factor: float) -> Update:
    delta = {name: value * factor for name, value in update.delta.items()}
    return replace(update, delta=delta, strength=update.strength * factor)


def nudged(loop: naive.Loop, delta, factor: float) -> naive.Loop:
    """A loop at ``theta + factor * delta``, parameter by parameter."""
    other = naive.Loop(loop.model, loop.plan)
    with torch.no_grad():
        for name, value in delta.items():
            other.theta[name].add_(value.double(), alpha=factor)
    return other


def slow_expansion(model, plan, batch, update, i: int, d: int, masked: bool) -> tuple[float, float]:
    """a and b of one (track, draw) pair from central differences of single float64 passes."""
    n = int(batch.valid[i]) if masked else model.frames
    item = naive.Item(
        batch.ids[i], batch.latents[i].double().numpy(), int(batch.valid[i]), batch.conditioning[i]
    )
    loop, h = naive.Loop(model, plan), 1e-4
    with torch.no_grad():
        before, target = loop.rows(item, "score", d)
        up, down = (nudged(loop, update.delta, f).rows(item, "score", d)[0] for f in (h, -h))
    tangent = (up - down) / (2 * h) / update.strength
    a = (2 * (before - target) * tangent)[:, :n].mean()
    return float(a), float(tangent[:, :n].square().mean())


@pytest.mark.parametrize("masked", [False, True])
def test_tangents_are_the_derivative_of_the_prediction(setting, rng, masked, measured):
    model, batch, plan, updates = setting
    before, rows = model.fingerprint, int(rng.integers(1, 8))
    found = measure_tangents(model, batch, [lambda u=u: u for u in updates], plan, 4, masked, rows)
    assert model.fingerprint == before
    worst = 0.0
    for i, d in zip(rng.integers(5, size=4), rng.integers(4, size=4), strict=True):
        for q, update in enumerate(updates):
            a, b = slow_expansion(model, plan, batch, update, int(i), int(d), masked)
            scale = np.sqrt(b * found.base[i, d])  # of a: it may be near zero
            worst = max(worst, abs(found.slope[q, i, d] - a) / scale, abs(found.curvature[q, i, d] / b - 1))
    measured("relative_error", worst)
    assert worst < 1e-6


@pytest.mark.parametrize("patch", [1, 4])
def test_tangents_of_a_stable_audio_model_and_its_differences_agree(seed, rng, patch):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, patch=patch)
    tracks, plan = helpers.make_tracks(rng, 3, model.channels, model.frames), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 2)
    update = unlearn_query(model, tracks, 1, fisher, plan, 3, 1e-3, draws=4)
    smaller, batch = scaled(update, 0.1), tracks.batch(range(3), model.frames)
    tangent = measure_tangents(model, batch, [lambda: update], plan, 2)
    differences = [
        measure_tangents(model, batch, [lambda u=u: u], plan, 2, way="difference") for u in (update, smaller)
    ]
    for name in ("slope", "curvature"):
        first, closer = (naive.relative_error(getattr(d, name), getattr(tangent, name)) for d in differences)
        assert closer < 0.02 and closer < 0.5 * first


def test_a_tied_parameter_carries_its_tangent_wherever_it_is_used(setting):
    model, batch, plan, updates = setting
    layers = model.module.transformer.layers
    layers[1].self_attn.to_out.weight = layers[0].self_attn.to_out.weight
    update = replace(
        updates[0], delta={n: v for n, v in updates[0].delta.items() if "layers.1.self_attn.to_out" not in n}
    )
    found = measure_tangents(model, batch, [lambda: update], plan, 2)
    small = scaled(update, 1e-6 / update.strength)  # the difference errs in proportion
    expected = measure_tangents(model, batch, [lambda: small], plan, 2, way="difference")
    assert naive.relative_error(found.curvature, expected.curvature) < 1e-3
    assert layers[1].self_attn.to_out.weight is layers[0].self_attn.to_out.weight


def test_a_linear_model_has_the_same_effects_at_every_strength_by_every_way(setting, seed):
    """Only the last projection moves, in which the prediction is linear: nothing is left out."""
    model, batch, plan, updates = setting
    model.layer_groups = {"last": ("transformer.project_out.*",)}
    tracks = helpers.make_tracks(np.random.default_rng(seed), 5, model.channels, model.frames)
    fisher = fit_fisher(model, tracks, ("last",), plan, 2)
    strengths = (1e-2, 0.3)
    made = [[unlearn_query(model, tracks, i, fisher, plan, 5, s, draws=4) for s in strengths] for i in (0, 3)]
    exact = measure_effects(model, batch, [lambda u=u: u for row in made for u in row], plan, 4)
    for way in ("tangent", "difference"):
        found = measure_tangents(model, batch, [lambda u=row[0]: u for row in made], plan, 4, way=way).at(
            strengths
        )
        assert np.array_equal(found.base, exact.base)
        assert naive.relative_error(found.unlearned - found.base, exact.unlearned - exact.base) < 1e-9
        assert naive.relative_error(found.displacement, exact.displacement) < 1e-9


def test_tangents_expand_to_queries_times_strengths(rng):
    base, slope, curvature = rng.normal(size=(3, 4)), rng.normal(size=(2, 3, 4)), rng.random((2, 3, 4))
    effects = Tangents(base, slope, curvature).at((0.5, 2.0, 0.1))
    for u, (q, s) in enumerate((q, s) for q in range(2) for s in (0.5, 2.0, 0.1)):
        assert np.allclose(effects.unlearned[u], base + slope[q] * s + curvature[q] * s**2, rtol=1e-14)
        assert np.allclose(effects.displacement[u], curvature[q] * s**2, rtol=1e-14)


def test_what_was_kept_of_theta_0_is_not_measured_again(setting):
    model, batch, plan, updates = setting
    loads, kept = [lambda u=u: u for u in updates], []
    passes, predict = [], model.predict
    model.predict = lambda *a: passes.append(0) or predict(*a)

    def keep(measure):
        kept.extend([] if kept else [measure()])
        return kept[0]

    first = measure_effects(model, batch, loads, plan, 4, rows=5, keep=keep)
    whole = len(passes)
    again = measure_effects(model, batch, loads, plan, 4, rows=5, keep=keep)
    assert (whole, len(passes) - whole) == (12, 8)  # 20 rows are 4 passes: under theta_0 and two updates
    for name in ("base", "unlearned", "displacement"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert isinstance(kept[0], Base) and kept[0].predictions.shape == (20, model.channels, model.frames)


def test_a_range_of_draws_is_a_part_of_all(setting):
    model, batch, plan, updates = setting
    loads = [lambda u=u: u for u in updates]
    whole = measure_effects(model, batch, loads, plan, 6, rows=1)
    part = measure_effects(model, batch, loads, plan, range(2, 6), rows=1, which=[1])
    assert np.array_equal(part.base, whole.base[:, 2:])
    assert np.array_equal(part.unlearned, whole.unlearned[1:, :, 2:])
    with pytest.raises(UserError, match="from 1 on"):
        measure_effects(model, batch, loads, plan, range(1, 3))


def test_a_tick_comes_before_every_pass_and_ends_it(setting):
    model, batch, plan, updates = setting
    ticks, passes, predict, before = [], [], model.predict, model.fingerprint
    model.predict = lambda *a: passes.append(0) or predict(*a)

    def tick():
        ticks.append(0)
        if len(ticks) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_effects(model, batch, [lambda: updates[0]], plan, 4, rows=5, tick=tick)
    assert len(passes) == 5 and model.fingerprint == before


# -- where updates live -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resident_and_paged_weights_are_the_same_bits(seed, rng, dtype):
    model = helpers.ToyDenoiser(seed, dtype=dtype)
    tracks, plan = helpers.make_tracks(rng, 3, 3, 10), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    updates = [unlearn_query(model, tracks, i, fisher, plan, 3, 1e-1, draws=2) for i in range(3)]
    size = sum(p.numel() * p.element_size() for p in model.module.parameters())
    reads = []
    loads = [lambda i=i: reads.append(i) or updates[i] for i in range(3)]
    batch, before = tracks.batch(range(3), model.frames), model.fingerprint
    found, read = {}, {}
    for name, room in (("paged", 0), ("one", size), ("all", 3 * size)):
        held, reads[:] = Unlearned(model, loads, room), []
        found[name] = [measure_effects(model, batch, held, plan, 2).unlearned for _ in range(2)]
        read[name] = list(reads)
    assert read == {"paged": [0, 1, 2, 0, 1, 2], "one": [0, 1, 2, 1, 2], "all": [0, 1, 2]}
    assert all(np.array_equal(x, found["paged"][0]) for pair in found.values() for x in pair)
    assert model.fingerprint == before


def test_a_model_whose_passes_are_recorded_keeps_its_addresses(setting):
    model, _, _, updates = setting
    places = [p.data_ptr() for p in model.module.parameters()]
    swapped = unlearned_weights(model, updates[0].delta)
    model.fixed_addresses = True
    before = model.fingerprint
    with applied(model, updates[0].delta):
        assert [p.data_ptr() for p in model.module.parameters()] == places
        assert all(torch.equal(p, swapped[n]) for n, p in model.module.named_parameters() if n in swapped)
    assert model.fingerprint == before


def test_directions_are_read_once_where_all_fit_and_in_parts_where_not(setting):
    model, _, _, updates = setting
    parameters = {n: p for n, p in model.module.named_parameters() if n in updates[0].delta}
    size = sum(v.numel() * v.element_size() for v in updates[0].delta.values())
    for room, parts, reads in ((2 * size, [2], 2), (2 * size - 1, [1, 1], 4), (0, [1, 1], 4)):
        read: list[int] = []
        loads = [lambda u=u, read=read: read.append(0) or u for u in updates]
        directions = Directions(parameters, loads, room)
        for _ in range(2):
            chunks = list(directions.chunks())
            assert [len(next(iter(c.values()))) for c in chunks] == parts
            for name in parameters:
                assert torch.equal(
                    torch.cat([c[name] for c in chunks]), torch.stack([u.delta[name] for u in updates])
                )
        assert len(read) == reads


def test_updates_in_bfloat16_take_half_and_differ_by_rounding_alone(setting, tmp_path):
    model, _, _, updates = setting
    updates[0].save(tmp_path / "full", "k")
    updates[0].save(tmp_path / "half", "k", torch.bfloat16)
    full, half = (Update.load(tmp_path / name, "k") for name in ("full", "half"))
    assert all(torch.equal(full.delta[n], v) for n, v in updates[0].delta.items())
    assert {v.dtype for v in half.delta.values()} == {torch.bfloat16}
    for name, value in updates[0].delta.items():
        assert bool(((half.delta[name].double() - value).abs() <= 2.0**-8 * value.abs() + 1e-45).all())
