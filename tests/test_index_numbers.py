"""Rows in few bits are near what they stand for, their products are those of float64, and the largest are those of a sort."""

import naive
import numpy as np
import pytest
import torch

from attr_engine import index_numbers
from attr_engine.index_numbers import NUMBERS, largest, products, stored

# Largest error of a number, of the largest of its row: half a step of its format.
HALF_STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "int8": 0.5 / 127 * (1 + 1e-9)}


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_stored_row_is_near_what_it_stands_for(numbers, rng):
    rows = rng.normal(size=(50, 30)) * np.exp(rng.normal(size=(50, 1)) * 20)  # rows of any length
    rows[7] = 0
    kept, scales = stored(rows, numbers)
    assert kept.dtype == NUMBERS[numbers] and scales.shape == (50,) and scales.dtype == np.float64
    error = np.abs(kept.astype(np.float64) * scales[:, None] - rows).max(axis=1)
    assert (error <= HALF_STEP[numbers] * np.abs(rows).max(axis=1) + 2.0**-25 * scales).all()
    assert scales[7] == 0 and not kept[7].any()


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("block", [1, 64, 2**19])
def test_products_are_those_of_float64(numbers, block, rng, monkeypatch, measured):
    monkeypatch.setattr(index_numbers, "_BLOCK", block)
    rows = stored(rng.normal(size=(101, 37)), numbers)[0]
    vectors = torch.from_numpy(rng.normal(size=(3, 37))).float()
    found = products(rows, vectors)
    expected = vectors.double().numpy() @ rows.astype(np.float64).T
    assert found.shape == (3, 101) and found.dtype == torch.float32
    lengths = np.linalg.norm(vectors.double().numpy(), axis=1)[:, None] * np.linalg.norm(
        rows.astype(np.float64), axis=1
    )
    error = float((np.abs(found.double().numpy() - expected) / lengths).max())
    measured("error of products", error)
    assert error < 1e-6
    assert naive.relative_error(products(rows, vectors[:1]), expected[:1]) < 1e-5


def test_products_never_convert_more_than_a_block(rng, monkeypatch, tmp_path):
    np.save(tmp_path / "rows.npy", stored(rng.normal(size=(40, 16)), "int8")[0])
    rows = np.load(tmp_path / "rows.npy", mmap_mode="c")
    monkeypatch.setattr(index_numbers, "_BLOCK", 64)
    sizes = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: (sizes.append(b.numel()), copy(a, b))[1])
    products(rows, torch.zeros(1, 16))
    assert sizes == [64] * 10


def test_the_largest_are_those_of_a_stable_sort(rng):
    for scores in (
        rng.normal(size=200),
        rng.integers(0, 6, 200).astype(float),
        np.zeros(5),
        np.full(3, -np.inf),
    ):
        for count in (1, 2, 7, len(scores) - 1, len(scores), len(scores) + 3):
            assert np.array_equal(largest(scores, count), np.argsort(-scores, kind="stable")[:count])
    assert largest(np.zeros(3), 0).shape == (0,)
