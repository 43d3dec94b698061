"""The DiT of the 2.0 text-to-audio model with random weights, as the engine sees it, and its arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.latents.batch import Batch
from attr_engine.models.stable_audio import LAYER_GROUPS, cast, quiet

MILLIONS = 1056.828544  # parameters of Size()


@dataclass(frozen=True)
class Size:
    """Shape of the model and of what it is fed."""

    channels: int = 64
    width: int = 1536
    depth: int = 24
    heads: int = 24
    context_width: int = 768
    timing_width: int = 1536
    frames: int = 2584
    context: int = 79

    def forward_flops(self) -> float:
        """Of one row: two for each product and sum, as ``torch.utils.flop_counter`` counts."""
        tokens, width, square = self.frames + 1, self.width, self.width**2
        # to_qkv 3, to_out 1, to_q 1, to_out 1, ff.ff.0.proj 8, ff.ff.2 4
        layer = 18 * tokens * square
        layer += 2 * self.context * self.context_width**2  # to_kv
        layer += 2 * tokens * tokens * width + 2 * tokens * self.context * width  # attention
        ends = 2 * self.channels * (tokens * width + self.channels * self.frames) - self.channels * width
        once = 2 * self.context * self.context_width**2 + self.timing_width * width + square
        once += 256 * width + square + 128  # timestep
        return 2.0 * (self.depth * layer + ends + once)

    def flops(self) -> dict[str, float]:
        """Of one row, by pass: a backward pass multiplies twice what the forward pass multiplied once."""
        forward = self.forward_flops()
        return {"forward": forward, "forward + backward": 3 * forward}


TINY = Size(channels=8, width=128, depth=2, heads=2, context_width=64, timing_width=128, frames=24, context=5)


def transformer(size: Size, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The network; parameters that start at zero are small random numbers, so that nothing is compared with zeros."""
    with quiet():
        kind = class_of_dit()
    with torch.device(device):
        module = kind(
            io_channels=size.channels, embed_dim=size.width, depth=size.depth, num_heads=size.heads,
            cond_token_dim=size.context_width, global_cond_dim=size.timing_width, project_cond_tokens=False,
            transformer_type="continuous_transformer",
        ).eval()  # fmt: skip
    if torch.device(device).type != "meta":
        with torch.no_grad():
            for p in module.parameters():
                if not p.any():
                    p.normal_(std=0.02)
    cast(module, dtype)
    return module


def class_of_dit() -> Any:
    """``DiffusionTransformer``, without what else its package imports: audio, training, downloads."""
    name = "stable_audio_tools"
    if name not in sys.modules:
        found = find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ImportError("stable-audio-tools is not installed: pip install stable-audio-tools==0.0.19")
        for package, folder in ((name, ""), (f"{name}.models", "/models")):
            empty = ModuleType(package)
            empty.__path__ = [path + folder for path in found.submodule_search_locations]
            sys.modules[package] = empty
    from stable_audio_tools.models.dit import DiffusionTransformer

    return DiffusionTransformer


class Dit:
    """A :class:`attr_engine.models.protocol.Denoiser` over the network, with conditioning that is random and known."""

    objective = "v"
    layer_groups: Mapping[str, Sequence[str]] = LAYER_GROUPS
    fingerprint = "random weights"

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.size, self.device = size, device
        self.channels, self.frames = size.channels, size.frames
        self.module = transformer(size, dtype, device)
        generator = torch.Generator().manual_seed(seed)
        self._text = torch.randn(64, size.context, size.context_width, generator=generator).to(device)
        self._timing = torch.randn(64, size.timing_width, generator=generator).to(device)

    def conditioning(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Inputs of the rows; an item is ``{"row": number}``."""
        index = torch.tensor([item["row"] % 64 for item in items], device=self.device)
        return {"cross_attn_cond": self._text[index], "global_embed": self._timing[index]}

    def predict(self, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """As the engine's adapter calls it: no guidance, no dropout, no activation checkpointing."""
        return self.module(
            x_t, t, **conditioning, cfg_scale=1.0, cfg_dropout_prob=0.0, use_checkpointing=False
        )

    def batch(self, tracks: int, seed: int) -> Batch:
        """Tracks of random latents, the first of them whole and the others shorter."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(tracks, self.frames, self.channels, generator=generator).mT
        valid = torch.tensor([max(1, self.frames - self.frames * i // (2 * tracks)) for i in range(tracks)])
        return Batch([f"t{i}" for i in range(tracks)], latents, valid, [{"row": i} for i in range(tracks)])
