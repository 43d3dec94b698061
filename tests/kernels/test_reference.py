"""The definitions in plain PyTorch against numpy and against published vectors."""

import math

import naive
import numpy as np
import pytest
import torch

from attr_engine.kernels import reference

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def philox(counter: int, key: int) -> list[int]:
    out = reference.philox(torch.tensor([counter]), torch.tensor([signed(key)]))
    return [int(x) for x in out]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_oracle_knows_the_published_vectors(counter, key, result):
    k0, k1 = words(key)
    assert naive.philox4x32(np.array(words(counter)), k0 | k1 << 32).tolist() == words(result)


def test_philox_of_zero_is_the_published_vector():
    assert philox(0, 0) == words(KNOWN[0][2])


def test_philox_is_philox_for_any_key_and_counter(rng):
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    counters = np.concatenate([edges, rng.integers(0, 2**32, 5000, dtype=np.uint64)]).astype(np.uint64)
    keys = rng.integers(0, 2**64, len(counters), dtype=np.uint64)
    keys[:6] = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    full = np.zeros((len(counters), 4), dtype=np.uint64)
    full[:, 0] = counters
    expected = naive.philox4x32(full, keys)
    out = reference.philox(torch.from_numpy(counters.astype(np.int64)), torch.from_numpy(keys.view(np.int64)))
    assert np.array_equal(torch.stack(out, dim=-1).numpy(), expected.astype(np.int64))


def test_noise_is_box_muller_of_its_place(rng):
    keys = rng.integers(0, 2**64, 7, dtype=np.uint64)
    out = reference.noise(torch.from_numpy(keys.view(np.int64)), 5, 301)
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (7, 5, 301))
    expected = np.stack([naive.normals(int(k), 5, 301) for k in keys])
    assert np.abs(out.numpy() - expected).max() < 6e-7, "half a float32 step below 8"
    assert (out.numpy() == expected.astype(np.float32)).mean() > 0.9999


def test_noise_does_not_see_padding_nor_batch(rng):
    keys = torch.from_numpy(rng.integers(0, 2**64, 6, dtype=np.uint64).view(np.int64))
    whole = reference.noise(keys, 4, 50)
    assert torch.equal(reference.noise(keys, 4, 17), whole[:, :, :17])
    assert torch.equal(reference.noise(keys[3:4], 4, 50), whole[3:4])
    order = torch.from_numpy(rng.permutation(6))
    assert torch.equal(reference.noise(keys[order], 4, 50), whole[order])


def test_noise_is_standard_normal_and_keys_are_independent(rng):
    keys = rng.integers(0, 2**64 - 1, 2, dtype=np.uint64)
    keys = np.array([keys[0], keys[0] + np.uint64(1), keys[1], keys[0] ^ np.uint64(2**40)], dtype=np.uint64)
    x = reference.noise(torch.from_numpy(keys.view(np.int64)), 16, 4096).double().numpy().reshape(4, -1)
    n = x.shape[1]
    assert np.abs(x.mean(axis=1)).max() < 6 / math.sqrt(n)
    assert np.abs(x.var(axis=1) - 1).max() < 6 * math.sqrt(2 / n)
    assert np.abs((x**3).mean(axis=1)).max() < 6 * math.sqrt(15 / n)
    assert np.abs((x**4).mean(axis=1) - 3).max() < 6 * math.sqrt(96 / n)
    assert np.abs(np.corrcoef(x) - np.eye(4)).max() < 6 / math.sqrt(n)
    neighbours = [(x[:, :-k] * x[:, k:]).mean(axis=1) for k in (1, 2, 16)]
    assert np.abs(neighbours).max() < 6 / math.sqrt(n - 16)
    assert 3.7 < np.abs(x).max() < math.sqrt(-2 * math.log(1e-7))


def test_more_elements_than_counters_are_refused():
    with pytest.raises(ValueError, match="counters"):
        reference.noise(torch.tensor([1]), 2**16, 2**16 + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixing_and_targets_follow_the_objectives(dtype, rng):
    x, e = rng.normal(size=(2, 3, 4, 5)).astype(np.float32).astype(np.float64)
    t = rng.uniform(size=3)
    wide = t[:, None, None]
    angle = np.pi / 2 * wide
    expected = {
        "v": (np.cos(angle) * x + np.sin(angle) * e, np.cos(angle) * e - np.sin(angle) * x),
        "rectified_flow": ((1 - wide) * x + wide * e, e - x),
    }
    arguments = torch.from_numpy(x).to(dtype), torch.from_numpy(e).float(), torch.from_numpy(t)
    for objective, (x_t, target) in expected.items():
        for function, wanted in ((reference.mix, x_t), (reference.v_target, target)):
            out = function(*arguments, objective)
            assert out.dtype == dtype
            assert naive.relative_error(out, wanted) < (1e-15 if dtype == torch.float64 else 3e-7)


def test_an_unknown_objective_is_refused_by_name():
    x = torch.zeros(1, 1, 1)
    for function in (reference.mix, reference.v_target):
        with pytest.raises(ValueError, match="'epsilon'"):
            function(x, x, torch.zeros(1), "epsilon")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_square_over_each_rows_own_frames(dtype, rng):
    b, c, f = 5, 3, 40
    prediction = torch.from_numpy(rng.normal(size=(b, c, f))).to(dtype)
    target = torch.from_numpy(rng.normal(size=(b, c, f)))
    target = target if dtype == torch.float64 else target.float()
    counted = torch.from_numpy(rng.random((b, f)) < 0.5)
    counted[0], counted[1], counted[1, 7] = True, False, True
    out = reference.per_draw_loss(prediction, target, counted)
    assert out.dtype == torch.float64
    for row in range(b):
        kept = counted[row].numpy()
        d = prediction[row].double().numpy()[:, kept] - target[row].double().numpy()[:, kept]
        assert math.isclose(out[row], (d**2).mean(), rel_tol=1e-14 if dtype == torch.float64 else 3e-7)


def test_loss_and_its_gradient_ignore_what_is_not_counted(rng):
    prediction = torch.from_numpy(rng.normal(size=(2, 3, 6))).requires_grad_()
    target = torch.zeros(2, 3, 6, dtype=torch.float64)
    counted = torch.arange(6)[None] < torch.tensor([[4], [6]])
    loss = reference.per_draw_loss(prediction, target, counted)
    loss.sum().backward()
    assert not prediction.grad[0, :, 4:].any()
    expected = 2 * prediction.detach() * counted[:, None] / (counted.sum(1)[:, None, None] * 3)
    assert torch.allclose(prediction.grad, expected, rtol=1e-14)
    changed = prediction.detach().clone()
    changed[0, :, 4:] = 1e6
    assert torch.equal(reference.per_draw_loss(changed, target, counted), loss)


def test_precondition_divides_by_fisher_plus_damping(rng):
    g, f = rng.normal(size=(2, 4, 5))
    out = reference.precondition(torch.from_numpy(g), torch.from_numpy(f**2), 0.3)
    assert naive.relative_error(out, g / (f**2 + 0.3)) < 1e-15
