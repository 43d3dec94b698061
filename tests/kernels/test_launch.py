"""How the batch is cut, which row serves a shape, how tensors are read."""

import pytest
import torch

from attr_engine.kernels import launch, table


def test_the_batch_is_cut_where_tiles_are_few():
    assert launch.splits(144, 64, 132) > 1, "1536 x 1536 has 144 tiles for 132 processors"
    assert launch.splits(1152, 64, 132) <= 2
    assert launch.splits(5000, 64, 10**6) == 1, "the workspace would be too large"
    assert launch.splits(4, 1, 132) == 1
    assert launch.splits(1, 3, 132) == 3
    for tiles in (1, 7, 72, 144, 432, 1152):
        for samples in (1, 2, 5, 64):
            s = launch.splits(tiles, samples, 132)
            assert 1 <= s <= min(8, samples)
            time = -(-tiles * s // 132) * -(-samples // s)
            assert time <= 1.05 * -(-tiles // 132) * samples


@pytest.mark.parametrize(
    ("tokens", "kind"), [(0, "none"), (1, "none"), (2, "context"), (511, "context"), (512, "sequence")]
)
def test_tokens_fall_into_classes(tokens, kind):
    assert table.token_class(tokens) == kind


def test_every_shape_has_a_row():
    for arch in launch.ARCHITECTURES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for tokens in (1, 77, 2585):
                row = table.choose(arch, 1000, 999, dtype, tokens)
                assert row.use in ("triton", "bmm")
                assert row.use == "bmm" or dtype != torch.float64
    listed = table.choose("sm_90", 4608, 1536, torch.bfloat16, 2585)
    assert listed is table.TABLE["sm_90", 4608, 1536, "bfloat16", "sequence"]
    assert {row.source for row in table.TABLE.values()} == {"counted"}, "measured rows name their file"


def test_a_descriptor_needs_alignment():
    half = torch.zeros(2, 16, 32, dtype=torch.bfloat16)
    assert launch.reading(half, half) == "descriptor"
    flat = torch.zeros(2 * 16 * 32 + 1, dtype=torch.bfloat16)
    assert launch.reading(flat[1:].view(2, 16, 32), half) == "strided"
    assert launch.reading(half.float(), half.float()) == "pointer"
    assert launch.reading(half.float()[..., :24], half.float()) == "strided"
    assert launch.reading(half[:, :1].expand(2, 16, 32), half) == "pointer"
    assert launch.reading(half.mT.contiguous().mT, half) == "strided"


def test_a_kernel_is_not_triton_until_it_is_used():
    def kernel(x):
        """Nothing."""

    lazy = launch.jit(kernel)
    assert lazy.__name__ == "kernel" and lazy.__doc__ == "Nothing." and lazy._compiled is None


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_stay_exact_whatever_is_allowed_elsewhere(before):
    found = torch.get_float32_matmul_precision()
    backend = torch.backends.mkldnn.matmul
    try:
        torch.set_float32_matmul_precision(before)
        outside = backend.fp32_precision
        with launch.ieee(torch.device("cpu")):
            assert backend.fp32_precision in ("ieee", "none")
        assert backend.fp32_precision == outside and torch.get_float32_matmul_precision() == before
        assert (outside in ("ieee", "none")) == (before == "highest")
    finally:
        torch.set_float32_matmul_precision(found)


def test_gpus_take_the_kernels_that_fit_them(monkeypatch):
    wanted = {
        (7, 5): None,
        (8, 0): "sm_80",
        (8, 9): "sm_80",
        (9, 0): "sm_90",
        (10, 3): "sm_100",
        (12, 0): "sm_80",
    }
    monkeypatch.setattr(launch, "have_triton", lambda: True)
    for capability, arch in wanted.items():
        monkeypatch.setattr(launch, "_capability", lambda index, c=capability: c)
        assert launch.supported(torch.device("cuda", 0)) == (arch is not None)
        assert arch is None or launch.architecture(torch.device("cuda", 0)) == arch
    assert launch.architecture(torch.device("cpu")) == "sm_90"
