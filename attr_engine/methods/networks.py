"""CLMR and CLEWS, written from their papers and the names of their published weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attr_engine.errors import UserError
from attr_engine.methods.base import method
from attr_engine.methods.checkpoints import SOURCES, fit_state, part, read_state
from attr_engine.methods.pretrained import Pretrained, Restricted, TorchEmbedder
from attr_engine.models.checkpoint import fingerprint

CLMR_RATE, CLMR_SAMPLES = 22050, 59049  # 3 ** 10: one vector a window after ten divisions by three
_CLMR_WIDTHS = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512)


class SampleCNN(nn.Module):
    """SampleCNN of CLMR (Spijkervet and Burgoyne 2021; Lee et al. 2018), without its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv1d(1, 128, 3, stride=3), nn.BatchNorm1d(128), nn.ReLU())
        blocks = [
            nn.Sequential(nn.Conv1d(a, b, 3, padding=1), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(3))
            for a, b in zip(_CLMR_WIDTHS[:-1], _CLMR_WIDTHS[1:], strict=True)
        ]
        last = nn.Sequential(nn.Conv1d(512, 512, 3, padding=1), nn.BatchNorm1d(512), nn.ReLU())
        self.sequential = nn.Sequential(first, *blocks, last)

    def forward(self, audio: Tensor) -> Tensor:
        """Representation ``[b, 512]`` of audio ``[b, 59049]`` at 22050 Hz."""
        return self.sequential(audio[:, None])[:, :, 0]


def clmr_embedder(path: Path, device: str = "cpu") -> TorchEmbedder:
    """CLMR from a checkpoint of its first (a state dict) or second release (of Lightning).

    A window that is longer than 59049 samples is cut into pieces, of which the last ends where the window ends: its embedding is
    the mean of theirs. A shorter one is repeated.

    Raises:
        UserError: not such a checkpoint.
    """
    source = SOURCES["clmr"]
    state = read_state(path, source)
    found = part(state, "model.encoder.") or part(state, "encoder.")
    module = SampleCNN()
    fit_state(module, found or state, path, source)
    module.to(device)

    def forward(windows: np.ndarray) -> Tensor:
        audio = torch.from_numpy(windows).to(device)
        if audio.shape[1] < CLMR_SAMPLES:
            audio = audio.repeat(1, -(-CLMR_SAMPLES // audio.shape[1]))[:, :CLMR_SAMPLES]
        last = audio.shape[1] - CLMR_SAMPLES
        pieces = [module(audio[:, s : s + CLMR_SAMPLES]) for s in [*range(0, last, CLMR_SAMPLES), last]]
        return torch.stack(pieces).mean(dim=0)

    return TorchEmbedder(
        "CLMR", CLMR_RATE, CLMR_SAMPLES / CLMR_RATE, 1.0, fingerprint(module, {"clmr": 1}), forward
    )


@method(
    "clmr",
    "black box",
    "cosine of CLMR embeddings of windows, the largest (Spijkervet et al. 2021; Barnett et al. 2024)",
    "checkpoint=",
)
@dataclass(frozen=True)
class Clmr(Pretrained):
    """:func:`clmr_embedder`."""

    method: ClassVar[str] = "clmr"

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`clmr_embedder`."""
        return clmr_embedder(SOURCES["clmr"].path(self.checkpoint), device)


CLEWS_RATE, CLEWS_SECONDS = 16000, 20.0
_CLEWS_HOP, _CLEWS_POOL = 320, 5  # samples of a frame of the CQT; frames of a column
_CLEWS_STRIDES = (1, 2, 2, 1)  # of the four stages
_EPSILON = 1e-6


class Cqt(nn.Module):
    """Constant-Q magnitudes by the kernels in the checkpoint, scaled by the root of their lengths, averaged over five frames."""

    cqt_kernels_real: Tensor
    cqt_kernels_imag: Tensor
    lenghts: Tensor

    def __init__(self, bins: int, width: int) -> None:
        super().__init__()
        self.register_buffer("cqt_kernels_real", torch.empty(bins, 1, width))
        self.register_buffer("cqt_kernels_imag", torch.empty(bins, 1, width))
        self.register_buffer("lenghts", torch.empty(bins))  # so spelt in the checkpoint

    def forward(self, audio: Tensor) -> Tensor:
        """``[b, bins, columns]`` of audio ``[b, n]``."""
        half = self.cqt_kernels_real.shape[-1] // 2
        padded = F.pad(audio[:, None], (half, half), mode="reflect")
        real = F.conv1d(padded, self.cqt_kernels_real, stride=_CLEWS_HOP)
        imag = F.conv1d(padded, self.cqt_kernels_imag, stride=_CLEWS_HOP)
        magnitude = torch.hypot(real, imag) * self.lenghts.sqrt()[:, None]
        return F.avg_pool1d(magnitude, _CLEWS_POOL)


class Prepare(nn.Module):
    """Square root of magnitudes, from 0 to 1 within a window, then gain and bias.

    The published network adds uniform noise of 1e-6 here, also when it is used; that is left out, so that an embedding does not
    depend on a draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[b, 1, bins, columns]`` to the same."""
        x = x.clamp(min=0).sqrt()
        x = x - x.amin(dim=(2, 3), keepdim=True)
        return self.gain * x / (x.amax(dim=(2, 3), keepdim=True) + _EPSILON) + self.bias


class HalfNorm(nn.Module):
    """Batch normalisation of the first half of the channels, instance normalisation of the second (IBN, Pan et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels // 2)
        self.inst = nn.InstanceNorm2d(channels // 2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, channels, bins, columns]`` to the same."""
        batch, instance = x.chunk(2, dim=1)
        return torch.cat([self.bn(batch), self.inst(instance)], dim=1)


class Conv3(nn.Module):
    """A convolution of 3 by 3 that keeps the size, without bias."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, before, h, w]`` to ``[b, after, h / stride, w / stride]``."""
        return self.conv(x)


class Block(nn.Module):
    """Residual block with normalisation before the convolutions and a learned gain."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        middle = max(1, max(before, after) // 2)
        middle += middle % 2
        self.convs = nn.Sequential(
            HalfNorm(before), nn.ReLU(), Conv3(before, middle, stride),
            nn.BatchNorm2d(middle), nn.ReLU(), Conv3(middle, after),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.skip = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), Conv3(before, after, stride))
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[b, before, h, w]`` to ``[b, after, h / stride, w / stride]``."""
        return self.gain * self.convs(x) + self.skip(x)


class PowerMean(nn.Module):
    """Generalised mean over all positions with a learned exponent (Radenovic et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[b, channels, h, w]`` to ``[b, channels]``."""
        power = 1 + F.softplus(self.p)
        return x.flatten(2).clamp(min=_EPSILON).pow(power).mean(dim=-1).pow(1 / power[..., 0])


class ClewsNet(nn.Module):
    """CLEWS (Serra et al. 2025).

    Args:
        bins: of the CQT.
        width: samples of its longest kernel.
        front: channels of the two convolutions before the blocks.
        blocks: channels of each block, in four stages; a stage begins where the channels change.
        size: E, of the embedding.
    """

    def __init__(
        self, bins: int, width: int, front: tuple[int, int], blocks: tuple[int, ...], size: int
    ) -> None:
        super().__init__()
        self.cqt = nn.Sequential(Cqt(bins, width))
        self.frontend = nn.Sequential(
            Prepare(), nn.Conv2d(1, front[0], (12, 3), stride=(1, 2), bias=False), nn.BatchNorm2d(front[0]), nn.ReLU(),
            nn.Conv2d(front[0], front[1], (12, 3), stride=2, bias=False),
        )  # fmt: skip
        made, before, stage = [], front[1], 0
        for i, after in enumerate(blocks):
            begins = i > 0 and after != blocks[i - 1]
            stage += begins
            made.append(Block(before, after, _CLEWS_STRIDES[stage] if begins else 1))
            before = after
        self.backbone = nn.Sequential(*made)
        self.pool = PowerMean()
        self.proj = nn.Sequential(nn.BatchNorm1d(before), nn.Linear(before, size, bias=False))

    def forward(self, audio: Tensor) -> Tensor:
        """``[b, E]`` of audio ``[b, n]`` at 16 kHz."""
        return self.proj(self.pool(self.backbone(self.frontend(self.cqt(audio)[:, None]))))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], path: Path) -> ClewsNet:
        """A network without numbers of the shapes in a checkpoint.

        Raises:
            UserError: the shapes are not those of CLEWS.
        """
        expected = SOURCES["clews"].text
        names = ("cqt.0.cqt_kernels_real", "frontend.1.weight", "frontend.4.weight", "proj.1.weight")
        lacking = [n for n in names if n not in state]
        if lacking:
            raise UserError(
                f"{path} holds the weights of another model: it lacks {lacking[0]}; expected {expected}"
            )
        blocks: list[int] = []
        while (weight := state.get(f"backbone.{len(blocks)}.convs.5.conv.weight")) is not None:
            blocks.append(len(weight) if weight.ndim else 0)
        kernels, first, second, last = (state[n] for n in names)
        stages = 1 + sum(a != b for a, b in zip(blocks[:-1], blocks[1:], strict=True))
        if [x.ndim for x in (kernels, first, second, last)] != [3, 4, 4, 2] or stages != 4 or min(blocks) < 1:
            raise UserError(f"{path} is not CLEWS, which has four stages of blocks: expected {expected}")
        with torch.device("meta"):  # no memory before all shapes are known to fit
            return cls(
                kernels.shape[0], kernels.shape[2], (len(first), len(second)), tuple(blocks), len(last)
            )


def clews_embedder(path: Path, device: str = "cpu") -> TorchEmbedder:
    """CLEWS from a checkpoint of its authors; a window of less than 20 s is repeated as a whole until it has them, as they do.

    Raises:
        UserError: not such a checkpoint.
    """
    source = SOURCES["clews"]
    state = read_state(path, source)
    module = ClewsNet.of(state, path)
    fit_state(module, state, path, source)
    module.to(device)

    def forward(windows: np.ndarray) -> Tensor:
        copies = -(-int(CLEWS_RATE * CLEWS_SECONDS) // windows.shape[1])
        return module(torch.from_numpy(windows).to(device).repeat(1, copies))

    return TorchEmbedder("CLEWS", CLEWS_RATE, CLEWS_SECONDS, 5.0, fingerprint(module, {"clews": 1}), forward)


@method(
    "clews",
    "black box",
    "cosine of CLEWS embeddings of windows, the largest (Serra et al. 2025; Choi et al. 2025)",
    "checkpoint= and licence=",
)
@dataclass(frozen=True)
class Clews(Restricted):
    """:func:`clews_embedder`."""

    method: ClassVar[str] = "clews"

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`clews_embedder`."""
        return clews_embedder(SOURCES["clews"].path(self.checkpoint, self.licence), device)
