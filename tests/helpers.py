"""Small real models and tracks. ``ToyDenoiser`` needs torch alone; ``tiny_stable_audio`` needs the package."""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attr_engine.latents.memory import MemoryTracks


class Gain(nn.Module):
    """Layer norm with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight=self.gamma)


class Attention(nn.Module):
    """Attention of two heads: fused q, k, v, or a k, v projection of a context."""

    def __init__(self, dim: int, context: int | None = None) -> None:
        super().__init__()
        if context is None:
            self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        else:
            self.to_q = nn.Linear(dim, dim, bias=False)
            self.to_kv = nn.Linear(context, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=context is not None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.pre_norm = Gain(dim)
        self.self_attn = Attention(dim)
        self.cross_attend_norm = Gain(dim)
        self.cross_attn = Attention(dim, context)
        self.ff_norm = Gain(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attn(self.pre_norm(x))
        x = x + self.cross_attn(self.cross_attend_norm(x), context)
        return x + self.ff(self.ff_norm(x))


class Transformer(nn.Module):
    def __init__(self, channels: int, dim: int, context: int, depth: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(channels, dim, bias=False)
        self.layers = nn.ModuleList([Block(dim, context) for _ in range(depth)])
        self.project_out = nn.Linear(dim, channels, bias=False)

    def forward(self, x: Tensor, prepended: Tensor, context: Tensor) -> Tensor:
        x = torch.cat([prepended[:, None], self.project_in(x)], dim=1)  # [B, 1 + F, dim]
        for layer in self.layers:
            x = layer(x, context)
        return self.project_out(x[:, 1:])


class Network(nn.Module):
    """A diffusion transformer in small, with every kind of layer that a Fisher has to cover."""

    def __init__(self, channels: int, dim: int, context: int, depth: int) -> None:
        super().__init__()
        self.preprocess_conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.to_timestep_embed = nn.Sequential(nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.null_token = nn.Parameter(torch.randn(1, 1, context))
        self.transformer = Transformer(channels, dim, context, depth)

    def forward(self, x: Tensor, t: Tensor, token: Tensor) -> Tensor:
        waves = t[:, None] * torch.arange(1, 5, dtype=t.dtype) * math.pi
        embedded = self.to_timestep_embed(torch.cat([waves.cos(), waves.sin()], dim=1))
        context = torch.cat(
            [token[:, None], self.null_token.expand(len(x), -1, -1)], dim=1
        )  # [B, 2, context]
        x = x + self.preprocess_conv(x)
        return self.transformer(x.transpose(1, 2), embedded, context).transpose(1, 2)


class ToyDenoiser:
    """A denoiser in plain torch, by the engine's protocol."""

    layer_groups: Mapping[str, Sequence[str]] = {
        "cross_attn.to_kv": ("*.cross_attn.to_kv.*",),
        "cross_attn": ("*.cross_attn.*",),
        "self_attn": ("*.self_attn.*",),
        "transformer": ("*transformer.layers.*",),
    }

    def __init__(
        self,
        seed: int,
        objective: str = "v",
        dtype: torch.dtype = torch.float64,
        channels: int = 3,
        frames: int = 10,
        dim: int = 8,
        depth: int = 2,
    ) -> None:
        self.context = 6
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.Module = Network(channels, dim, self.context, depth)
            liven(self.module)
        # float32 weights whatever the dtype, so that copies of one seed hold the same numbers
        self.module.eval().to(dtype)
        self.objective, self.channels, self.frames = objective, channels, frames

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.objective.encode())
        for name, p in self.module.named_parameters():
            digest.update(name.encode() + p.detach().double().numpy().tobytes())
        return digest.hexdigest()

    def conditioning(self, items: Sequence[Mapping[str, Any]]) -> Tensor:
        rows = [
            [math.sin(k * float(c["seconds_total"]) + float(c["lead"])) for k in range(self.context)]
            for c in items
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        dtype = self.module.null_token.dtype
        return self.module(x_t.to(dtype), t.to(dtype), conditioning.to(dtype))

    def double_copy(self) -> "ToyDenoiser":
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).double()
        return other


def liven(module: nn.Module) -> None:
    """Fill zero parameters and move constant ones, so that no gradient is zero for want of signal."""
    with torch.no_grad():
        for p in module.parameters():
            if (p == p.flatten()[0]).all():
                p += 0.2 * torch.randn_like(p)


def stable_audio_config(
    objective: str = "v",
    global_cond: str = "prepend",
    patch: int = 1,
    frames: int = 16,
    depth: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """Configuration of a DiT that stable-audio-tools builds in a moment, without an autoencoder."""
    numbers = {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 24}}
    lead = {"id": "lead", "type": "int", "config": {"min_val": 0, "max_val": 8}}
    return {
        "model_type": "diffusion_cond",
        "sample_size": frames,
        "sample_rate": 16000,
        "audio_channels": 1,
        "model": {
            "io_channels": 3,
            "conditioning": {"cond_dim": 32, "configs": [numbers, lead]},
            "diffusion": {
                "type": "dit",
                "diffusion_objective": objective,
                "cross_attention_cond_ids": ["lead", "seconds_total"],
                "global_cond_ids": ["seconds_total"],
                "config": {
                    "io_channels": 3,
                    "embed_dim": 64,
                    "depth": depth,
                    "num_heads": 2,
                    "patch_size": patch,
                    "cond_token_dim": 32,
                    "project_cond_tokens": False,
                    "global_cond_dim": 32,
                    "global_cond_type": global_cond,
                    "transformer_type": "continuous_transformer",
                    **more,
                },
            },
        },
    }


def tiny_stable_audio(seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny ``StableAudioDenoiser`` with no zero parameter, and its float64 twin as ``double_copy``."""
    from attr_engine.models.stable_audio import StableAudioDenoiser, create_model

    config = stable_audio_config(**options)

    def build(kind: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapper = create_model(config)
            liven(wrapper.model)
        model = StableAudioDenoiser(wrapper, config, kind)
        if weights is not None:
            with torch.no_grad():
                for name, p in model.module.named_parameters():
                    p.copy_(weights[name])
        model.double_copy = lambda: build(torch.float64, dict(model.module.named_parameters()))
        return model

    return build(dtype)


class ToyTracks(MemoryTracks):
    """Tracks in memory that also show the arrays that they were made from."""

    def __init__(self, ids, latents, conditioning, silence, info=None) -> None:
        super().__init__(ids, latents, conditioning, info, padding=silence)
        self.raw, self.silence = latents, silence

    def subset(self, indices: Sequence[int]) -> "ToyTracks":
        return ToyTracks(
            [self.ids[i] for i in indices],
            [self.raw[i] for i in indices],
            [self.conditioning[i] for i in indices],
            self.silence,
            [self.info[i] for i in indices],
        )


def make_tracks(rng: np.random.Generator, n: int, channels: int, frames: int, prefix: str = "t") -> ToyTracks:
    """Tracks of any length up to ``frames``; the first one is full, the second one short. Padding is not zero."""
    lengths = rng.integers(2, frames + 1, n)
    lengths[0] = frames
    if n > 1:
        lengths[1] = 2
    latents = [
        (rng.normal(size=(channels, length)) * rng.uniform(0.5, 2) + rng.normal()).astype(np.float32)
        for length in lengths
    ]
    conditioning = [
        {"seconds_total": float(rng.integers(1, 20)), "lead": int(rng.integers(0, 8))} for _ in range(n)
    ]
    return ToyTracks(
        [f"{prefix}{i}" for i in range(n)],
        latents,
        conditioning,
        rng.normal(size=channels).astype(np.float32),
    )


def write_world(root: Path, count: int, info: Callable[[str], dict[str, Any]]) -> Path:
    """A tiny model in ``model`` and tracks in ``latents``, as commands read them; ``info`` gives a track's metadata by id."""
    from attr_engine.latents import LatentWriter
    from attr_engine.models.stable_audio import save_model

    save_model(tiny_stable_audio(3).wrapper, stable_audio_config(), root / "model")
    tracks = make_tracks(np.random.default_rng(3), count, 3, 16)
    with LatentWriter(root / "latents", padding=tracks.silence) as writer:
        for name, latent, conditioning in zip(tracks.ids, tracks.raw, tracks.conditioning, strict=True):
            writer.add(name, latent, conditioning, info(name))
    return root
