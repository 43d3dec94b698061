"""EK-FAC against a loop over single rows, hooks on the layers, numpy's eigenvectors and explicit Kronecker products."""

import math

import helpers
import naive
import numpy as np
import pytest
import torch
from torch import nn

from attr_engine import DrawPlan, UserError, fit_fisher
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.ekfac import EKFAC, Basis, Covariances, corrected_eigenvalues, fit_ekfac
from attr_engine.fisher import Fisher, FisherSettings
from attr_engine.persample import add_squares
from attr_engine.unlearn import unlearn_query
from attr_engine.uses import Factors

DENSE = 512  # numbers of a weight up to which H is written out


def unfolded(module, x: torch.Tensor) -> torch.Tensor:
    """What every output token of a layer sees, of one row: ``[groups, T, I]``."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    taps, step, gap, pad = (
        v[0] for v in (module.kernel_size, module.stride, module.dilation, module.padding)
    )
    padded = nn.functional.pad(x[0], (pad, pad))  # [C, F]
    length = (padded.shape[1] - gap * (taps - 1) - 1) // step + 1
    seen = [
        torch.stack([padded[:, t * step + k * gap] for k in range(taps)], dim=1) for t in range(length)
    ]  # T of [C, taps]
    return torch.stack([s.reshape(module.groups, -1) for s in seen], dim=1)


def outgoing(module, g: torch.Tensor) -> torch.Tensor:
    """Gradient of a layer's output, of one row: ``[groups, T, O]``."""
    if isinstance(module, nn.Linear):
        return g.reshape(1, -1, g.shape[-1])
    return g[0].reshape(module.groups, -1, g.shape[2]).transpose(1, 2)


class Rows:
    """Gradients of every parameter, and inputs and output gradients of every layer, one (track, draw) pair at a time."""

    def __init__(self, model, tracks, plan, draws, masked, function) -> None:
        loop = naive.Loop(model, plan)
        self.layers = {
            f"{name}.weight": m
            for name, m in loop.model.module.named_modules()
            if isinstance(m, nn.Linear | nn.Conv1d)
        }
        self.gradients, self.factors, seen = [], [], {}

        def watch(name):
            def hook(module, args, out):
                assert name not in seen, "a layer is used once"
                seen[name] = (module, args[0].detach(), out)

            return hook

        for name, module in self.layers.items():
            module.register_forward_hook(watch(name))
        for item in naive.items(tracks, model.frames):
            for draw in range(draws):
                seen.clear()
                value = getattr(loop, function)(item, "fisher", draw, masked)
                wanted = [*loop.theta.values(), *(out for _, _, out in seen.values())]
                found = torch.autograd.grad(value, wanted, allow_unused=True)
                one = zip(loop.theta, found, strict=False)
                self.gradients.append(
                    {n: np.zeros(loop.theta[n].shape) if g is None else g.numpy() for n, g in one}
                )
                outs = dict(zip(seen, found[len(loop.theta) :], strict=True))
                self.factors.append(
                    {
                        n: (outgoing(m, outs[n]).numpy(), unfolded(m, x).numpy())
                        for n, (m, x, _) in seen.items()
                    }
                )

    def covariances(self, name) -> list[np.ndarray]:
        """G and A of a weight, ``[groups, n, n]``, summed over rows."""
        return [sum(np.einsum("jtm,jtn->jmn", f[name][k], f[name][k]) for f in self.factors) for k in (0, 1)]

    def eigenvalues(self, name, bases) -> np.ndarray:
        """Mean over rows of the squared rotated gradient, in the weight's shape."""
        squares = [turned(g[name], *bases) ** 2 if bases else g[name] ** 2 for g in self.gradients]
        return np.mean(squares, axis=0)


def turned(g, outputs, inputs, back=False):
    """``Q_G^T g Q_A`` of every group, or its inverse."""
    blocks = g.reshape(len(outputs), outputs.shape[1], inputs.shape[1])
    if back:
        return np.stack([q @ b @ p.T for q, b, p in zip(outputs, blocks, inputs, strict=True)]).reshape(
            g.shape
        )
    return np.stack([q.T @ b @ p for q, b, p in zip(outputs, blocks, inputs, strict=True)]).reshape(g.shape)


def solved(v, values, bases, damping):
    """``(H + damping)^-1 v``; of small weights with H written out as a matrix."""
    if not bases:
        return v / (values + damping)
    outputs, inputs = bases
    if values.size > DENSE:
        return turned(turned(v, *bases) / (values + damping), *bases, back=True)
    shape = (len(outputs), outputs.shape[1] * inputs.shape[1])
    out = []
    for q, p, lam, x in zip(outputs, inputs, values.reshape(shape), v.reshape(shape), strict=True):
        u = np.kron(q, p)  # of row-major vectors
        out.append(np.linalg.solve(u @ np.diag(lam) @ u.T + damping * np.eye(len(u)), x))
    return np.concatenate(out).reshape(v.shape)


def random_gradient(rng, shapes, dtype):
    return {n: torch.from_numpy(rng.normal(size=tuple(s))).to(dtype) for n, s in shapes.items()}


def compare(model, rng, layers, plan, draws, masked, function, damping=0.1, tracks=3, rows=5) -> float:
    """Check all of a float64 EK-FAC against the slow one; return the worst relative error of a direction."""
    data = helpers.make_tracks(rng, tracks, model.channels, model.frames)
    ekfac = fit_ekfac(model, data, layers, plan, draws, masked, rows, ROW_FUNCTIONS[function])
    slow = Rows(model, data, plan, draws, masked, function)
    names = [n for n in slow.gradients[0] if naive.GROUPS[layers](n)]
    assert list(ekfac.shapes()) == names and (ekfac.eigenvalues.pairs, ekfac.eigenvalues.unused) == (
        tracks * draws,
        (),
    )
    weights = {n for n in names if n in slow.layers}
    assert set(ekfac.bases) == weights and weights, "every weight of a layer is rotated, and nothing else"
    bases, values = {}, {}
    for n in names:
        bases[n] = [np.linalg.eigh(c)[1] for c in slow.covariances(n)] if n in weights else None
        values[n] = slow.eigenvalues(n, bases[n])
    naive.non_zero(values)
    mean = np.concatenate([values[n].ravel() for n in names]).mean()
    assert math.isclose(ekfac.eigenvalues.mean(), mean, rel_tol=1e-9)
    v = random_gradient(rng, ekfac.shapes(), torch.float64)
    direction = ekfac.precondition(v, damping)
    assert list(direction) == names
    return max(
        naive.relative_error(direction[n], solved(v[n].numpy(), values[n], bases[n], damping * mean))
        for n in names
    )


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_direction_is_that_of_the_formula(objective, function, seed, rng, measured):
    model = helpers.ToyDenoiser(seed, objective)
    for kind, masked in (("track", False), ("shared", True)):
        worst = compare(model, rng, ("all",), DrawPlan(seed, kind, 2), 4, masked, function)
        measured("relative_error", worst)
        assert worst < 1e-8


@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_direction_of_every_layer_group(layers, seed, rng, measured):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    worst = compare(model, rng, layers, DrawPlan(seed, replicates=2), 2, bool(rng.integers(2)), "loss")
    measured("relative_error", worst)
    assert worst < 1e-8


@pytest.mark.parametrize(("global_cond", "patch"), [("prepend", 1), ("adaLN", 4)])
def test_direction_of_a_stable_audio_model(global_cond, patch, seed, rng, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, global_cond=global_cond, patch=patch)
    worst = compare(model, rng, ("all",), DrawPlan(seed, replicates=2), 2, False, "loss", tracks=2)
    measured("relative_error", worst)
    assert worst < 1e-8


class Grouped(nn.Module):
    """A convolution in groups with strides and gaps, and nothing else that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.down = nn.Conv1d(6, 4, 2, stride=2)

    def forward(self, x, t, token):
        y = self.down(torch.tanh(self.conv(x) + t[:, None, None]))
        return torch.nn.functional.interpolate(y, size=x.shape[2])


def test_groups_of_a_convolution_have_eigenvectors_of_their_own(seed, rng, measured):
    model = helpers.ToyDenoiser(seed, channels=4)
    torch.manual_seed(seed)
    model.module = Grouped().double()
    model.predict = lambda x, t, c: model.module(x, t, c)
    model.double_copy = lambda: model
    data, plan = helpers.make_tracks(rng, 3, 4, 10), DrawPlan(seed, replicates=2)
    ekfac = fit_ekfac(model, data, ("all",), plan, 2)
    assert {n: (tuple(b.outputs.shape), tuple(b.inputs.shape)) for n, b in ekfac.bases.items()} == {
        "conv.weight": ((2, 3, 3), (2, 6, 6)),
        "down.weight": ((1, 4, 4), (1, 12, 12)),
    }
    slow = Rows(model, data, plan, 2, False, "loss")
    v = random_gradient(rng, ekfac.shapes(), torch.float64)
    direction, mean = ekfac.precondition(v, 0.1), ekfac.eigenvalues.mean()
    for n in ekfac.bases:
        bases = [np.linalg.eigh(c)[1] for c in slow.covariances(n)]
        want = solved(v[n].numpy(), slow.eigenvalues(n, bases), bases, 0.1 * mean)
        worst = naive.relative_error(direction[n], want)
        measured(n, worst)
        assert worst < 1e-8


def test_in_float32_it_has_the_eigenvectors_and_what_they_imply(seed, rng, measured):
    """Close eigenvalues leave their eigenvectors open to rounding: each step is judged by what the last one gave."""
    model, plan = helpers.ToyDenoiser(seed, dtype=torch.float32), DrawPlan(seed, replicates=2)
    data = helpers.make_tracks(rng, 4, model.channels, model.frames)
    ekfac, slow = (
        fit_ekfac(model, data, ("all",), plan, 4, True),
        Rows(model, data, plan, 4, True, "loss"),
    )
    v = random_gradient(rng, ekfac.shapes(), torch.float32)
    direction, mean = ekfac.precondition(v, 0.1), ekfac.eigenvalues.mean()
    for n, lam in ekfac.eigenvalues.values.items():
        bases = None
        if n in ekfac.bases:
            found = ekfac.bases[n]
            bases = [found.outputs.double().numpy(), found.inputs.double().numpy()]
            for q, c in zip(bases, slow.covariances(n), strict=True):
                within = q.swapaxes(1, 2) @ c @ q
                off = within - np.stack([np.diag(np.diag(x)) for x in within])
                assert np.abs(q.swapaxes(1, 2) @ q - np.eye(q.shape[1])).max() < 1e-5
                assert np.linalg.norm(off) < 1e-5 * np.linalg.norm(c)
        assert lam.dtype == direction[n].dtype == torch.float32
        worst = naive.relative_error(lam, slow.eigenvalues(n, bases))
        measured(n, worst)
        assert worst < 1e-4
        want = solved(v[n].double().numpy(), lam.double().numpy(), bases, 0.1 * mean)
        assert naive.relative_error(direction[n], want) < 1e-4


def test_where_the_fisher_is_a_kronecker_product_it_is_the_whole_fisher(rng, measured):
    """One token a row, and every input with every output gradient: then ``F = G x A``, and EK-FAC has all of it."""
    inputs, outputs = rng.normal(size=(6, 4)), rng.normal(size=(5, 3)) * [1.0, 0.3, 3.0]
    a = torch.from_numpy(np.repeat(inputs, len(outputs), axis=0))[:, None, None]  # [B, 1, 1, I]
    g = torch.from_numpy(np.tile(outputs, (len(inputs), 1)))[:, None, None]
    rows = np.einsum("bo,bi->boi", g[:, 0, 0].numpy(), a[:, 0, 0].numpy()).reshape(len(g), -1)
    dense = rows.T @ rows / len(rows)
    covariances = Covariances()
    for k in range(0, len(g), 7):
        covariances.add("w", Factors(g[k : k + 7], a[k : k + 7]))
    bases = covariances.bases(torch.float64)
    values = torch.zeros(3, 4, dtype=torch.float64)
    add_squares(values, bases["w"].rotated_rows(Factors(g, a)))
    ekfac = EKFAC(Fisher({"w": values / len(g)}, len(g)), bases)
    v = rng.normal(size=(3, 4))
    for damping in (1e-3, 0.1, 10.0):
        damped = dense + damping * np.trace(dense) / len(dense) * np.eye(len(dense))
        want = np.linalg.solve(damped, v.ravel()).reshape(3, 4)
        worst = naive.relative_error(ekfac.precondition({"w": torch.from_numpy(v)}, damping)["w"], want)
        measured(damping, worst)
        assert worst < 1e-9
    diagonal = v / (np.diag(dense).reshape(3, 4) + 0.1 * np.trace(dense) / len(dense))
    assert naive.relative_error(ekfac.precondition({"w": torch.from_numpy(v)}, 0.1)["w"], diagonal) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_with_no_rotation_it_is_the_diagonal_fisher(dtype, seed, rng):
    model, plan = helpers.ToyDenoiser(seed, dtype=dtype), DrawPlan(seed, replicates=2)
    data = helpers.make_tracks(rng, 37, 3, 10)
    settings = FisherSettings(("all",), plan, 2, rows=4)
    fisher = fit_fisher(model, data, ("all",), plan, 2, rows=4)
    fitted = fit_ekfac(model, data, ("all",), plan, 2, rows=4)
    identity = {
        n: Basis(*(torch.eye(q.shape[1], dtype=dtype).expand(q.shape) for q in (b.outputs, b.inputs)))
        for n, b in fitted.bases.items()
    }
    none = corrected_eigenvalues(model, data, settings, {})
    assert all(torch.equal(none.values[n], v) for n, v in fisher.values.items())
    turned_by_1 = corrected_eigenvalues(model, data, settings, identity)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert all(naive.relative_error(turned_by_1.values[n], v) < tolerance for n, v in fisher.values.items())
    g = random_gradient(rng, fisher.shapes(), dtype)
    want = fisher.precondition(g, 0.1)
    found = EKFAC(turned_by_1, identity).precondition(g, 0.1)
    assert all(naive.relative_error(found[n], v) < 10 * tolerance for n, v in want.items())
    assert any(naive.relative_error(fitted.precondition(g, 0.1)[n], v) > 1e-2 for n, v in want.items())


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks, plan = helpers.make_tracks(rng, 3, model.channels, model.frames), DrawPlan(seed, replicates=2)
    return model, tracks, plan, fit_ekfac(model, tracks, ("transformer",), plan, 2)


def test_a_rotation_keeps_sums_of_squares_and_so_the_mean(setting):
    model, tracks, plan, ekfac = setting
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 2)
    for n, v in fisher.values.items():
        assert math.isclose(float(ekfac.eigenvalues.values[n].sum()), float(v.sum()), rel_tol=1e-9)
    assert math.isclose(ekfac.eigenvalues.mean(), fisher.mean(), rel_tol=1e-9)


def test_a_bfloat16_model_is_added_up_in_float32(seed, rng):
    model, plan = helpers.ToyDenoiser(seed, dtype=torch.bfloat16), DrawPlan(seed, replicates=2)
    data = helpers.make_tracks(rng, 3, model.channels, model.frames)
    ekfac, fisher = fit_ekfac(model, data, ("all",), plan, 2), fit_fisher(model, data, ("all",), plan, 2)
    update = unlearn_query(model, data, 0, ekfac, plan, 3, 1e-1, draws=2)
    numbers = [*ekfac.eigenvalues.values.values(), *(b.inputs for b in ekfac.bases.values())]
    assert {v.dtype for v in (*numbers, *update.delta.values())} == {torch.float32}
    for n, v in fisher.values.items():
        assert math.isclose(float(ekfac.eigenvalues.values[n].sum()), float(v.sum()), rel_tol=1e-4)


def test_much_damping_leaves_the_plain_gradient(setting, rng):
    *_, ekfac = setting
    g = random_gradient(rng, ekfac.shapes(), torch.float64)
    largest = max(float(v.max()) for v in ekfac.eigenvalues.values.values()) / ekfac.eigenvalues.mean()
    damping = 1e9 * largest
    for n, d in ekfac.precondition(g, damping).items():
        assert naive.relative_error(d * damping * ekfac.eigenvalues.mean(), g[n].numpy()) < 1e-8


def test_it_is_symmetric_positive_and_a_plain_product_of_rotated_gradients(setting, rng):
    *_, ekfac = setting
    a, b = (random_gradient(rng, ekfac.shapes(), torch.float64) for _ in range(2))

    def dot(x, y):
        return sum(float((x[n] * y[n]).sum()) for n in x)

    ab, ba = dot(a, ekfac.precondition(b, 0.01)), dot(b, ekfac.precondition(a, 0.01))
    scale = math.sqrt(dot(a, ekfac.precondition(a, 0.01)) * dot(b, ekfac.precondition(b, 0.01)))
    assert abs(ab) < scale and abs(ab - ba) < 1e-10 * scale
    rotated = dot(ekfac.rotated(a), ekfac.eigenvalues.precondition(ekfac.rotated(b), 0.01))
    assert abs(rotated - ab) < 1e-10 * scale
    assert math.isclose(dot(ekfac.rotated(a), ekfac.rotated(b)), dot(a, b), abs_tol=1e-10 * dot(a, a))


def test_unlearning_takes_it_in_the_place_of_the_fisher(setting):
    model, tracks, plan, ekfac = setting
    before = model.fingerprint
    update = unlearn_query(model, tracks, 1, ekfac, plan, 3, 1e-2, draws=4, damping=0.1)
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 2)
    other = unlearn_query(model, tracks, 1, fisher, plan, 3, 1e-2, draws=4, damping=0.1)
    loop, query = naive.Loop(model, plan), naive.items(tracks, model.frames)[1]
    gradients = [loop.gradient(query, "update", d, True) for d in range(4)]
    mean = {n: torch.from_numpy(np.mean([g[n] for g in gradients], axis=0)) for n in ekfac.shapes()}
    want = {n: update.lr / 3 * d for n, d in ekfac.precondition(mean, 0.1).items()}
    assert list(update.delta) == list(want) == list(other.delta)
    assert all(naive.relative_error(update.delta[n], want[n].numpy()) < 1e-9 for n in want)
    assert any(naive.relative_error(update.delta[n], other.delta[n].numpy()) > 1e-2 for n in want)
    assert math.isclose(update.size, 1e-2, rel_tol=1e-9) and model.fingerprint == before
    assert sum(float((mean[n] * d).sum()) for n, d in update.delta.items()) > 0, "the loss rises"


def test_it_is_the_same_bits_again_and_the_model_is_as_it_was(setting):
    model, tracks, plan, ekfac = setting
    before, seen = model.fingerprint, []
    again = fit_ekfac(
        model, tracks, ("transformer",), plan, 2, progress=lambda done, total: seen.append((done, total))
    )
    assert same(again, ekfac) and model.fingerprint == before
    assert all(p.grad is None for p in model.module.parameters())
    assert seen[0] == (0, 6) and seen[-1] == (6, 6) and seen == sorted(seen)


def same(a, b) -> bool:
    values = [e.eigenvalues.values for e in (a, b)]
    return (
        [list(x) for x in values] == [list(values[0])] * 2
        and list(a.bases) == list(b.bases)
        and all(torch.equal(values[0][n], values[1][n]) for n in values[0])
        and all(
            torch.equal(a.bases[n].outputs, b.bases[n].outputs)
            and torch.equal(a.bases[n].inputs, b.bases[n].inputs)
            for n in a.bases
        )
    )


def test_a_saved_one_comes_back_bit_for_bit_and_in_order(setting, tmp_path):
    model, tracks, plan, ekfac = setting
    path = tmp_path / "e.safetensors"
    ekfac.save(path, "k")
    again = EKFAC.load(path, "k")
    assert same(again, ekfac)
    assert (again.eigenvalues.pairs, again.eigenvalues.unused) == (6, ())
    with pytest.raises(UserError, match="other settings"):
        EKFAC.load(path, "another")
    fit_fisher(model, tracks, ("transformer",), plan, 2).save(path, "k")
    with pytest.raises(UserError, match=r"e\.safetensors holds no EK-FAC"):
        EKFAC.load(path, "k")


def test_a_parameter_that_the_prediction_does_not_see_is_named(seed, rng):
    model = helpers.ToyDenoiser(seed)
    model.module.idle = nn.Linear(2, 3).double()
    ekfac = fit_ekfac(model, helpers.make_tracks(rng, 2, 3, 10), ("all",), DrawPlan(0, replicates=1), 1)
    assert set(ekfac.eigenvalues.unused) == {"idle.weight", "idle.bias"}
    assert "idle.weight" not in ekfac.bases and not ekfac.eigenvalues.values["idle.weight"].any()


def test_a_weight_that_has_another_use_keeps_its_diagonal(seed, rng):
    model, plan = helpers.ToyDenoiser(seed), DrawPlan(seed, replicates=2)
    data, name = helpers.make_tracks(rng, 3, 3, 10), "transformer.project_out.weight"
    inner, weight = model.module.forward, model.module.transformer.project_out.weight
    model.module.forward = lambda x, t, token: inner(x, t, token) * weight.square().mean()
    ekfac = fit_ekfac(model, data, ("all",), plan, 2)
    fisher = fit_fisher(model, data, ("all",), plan, 2, gradients="loop")
    assert not any(v.requires_grad for v in ekfac.eigenvalues.values.values()), "no graph is kept"
    assert name not in ekfac.bases and "transformer.project_in.weight" in ekfac.bases
    assert naive.relative_error(ekfac.eigenvalues.values[name], fisher.values[name]) < 1e-9


def test_unusable_input_is_refused_by_name(setting, rng):
    model, tracks, plan, ekfac = setting
    g = random_gradient(rng, ekfac.shapes(), torch.float64)
    name = list(g)[1]
    for damping, named in ((0.0, "above 0"), (-0.1, "damping is -0.1"), (math.inf, "inf"), (math.nan, "nan")):
        with pytest.raises(UserError, match=named):
            ekfac.precondition(g, damping)
    for curvature in (ekfac, ekfac.eigenvalues):
        with pytest.raises(UserError, match=f"gradient of '{name}'.*another model"):
            curvature.precondition({**g, name: g[name][..., :1]}, 0.1)
        with pytest.raises(UserError, match="gradient of 'extra'"):
            curvature.precondition({"extra": g[name]}, 0.1)
    with pytest.raises(UserError, match="another model"):
        unlearn_query(helpers.ToyDenoiser(0, dim=4), tracks, 0, ekfac, plan, 3, draws=2)
    with pytest.raises(UserError, match="Fisher draws is 3"):
        fit_ekfac(model, tracks, ("all",), plan, 3)
    with pytest.raises(UserError, match="at least one row"):
        fit_ekfac(model, tracks, ("all",), plan, 2, rows=0)
    with torch.no_grad():
        model.module.null_token[0, 0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        fit_ekfac(model, tracks, ("self_attn",), plan, 2)
