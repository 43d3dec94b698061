"""The method once more, one pair at a time, from the formulas alone.

Nothing here calls the engine's noise, mixing, loss, gradients or scores: only the 64-bit hash is
shared. float64 throughout; parameters are updated in place on a copy of the network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attr_engine.diffusion import _hash64

GOLDEN = 0.6180339887498949


def philox4x32(counter: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Philox-4x32-10 of counters ``[..., 4]`` (uint32 words) under a 64-bit key: uint32 ``[..., 4]``."""
    c = [np.asarray(counter)[..., i].astype(np.uint64) for i in range(4)]
    key = np.asarray(key, dtype=np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key & low, key >> half
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> half) ^ c[1] ^ k0, p1 & low, (p0 >> half) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=-1).astype(np.uint32)


def normals(key: int, channels: int, frames: int) -> np.ndarray:
    """float64 ``[C, F]``: Box-Muller of the first two words of counter ``f * C + c``."""
    counter = np.zeros((frames, channels, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(frames * channels, dtype=np.uint64).reshape(frames, channels)
    words = philox4x32(counter, key)[..., :2].view(np.int32).astype(np.int64)
    uniform = np.where(words < 0, -words - 1, words) * 4.6566127342e-10
    radius = np.sqrt(-2.0 * np.log(np.maximum(uniform[..., 0], 1e-7)))
    return (radius * np.cos(2.0 * np.pi * uniform[..., 1])).T


def owner(plan, track: str) -> str:
    return {"track": track, "shared": ""}[plan.kind]


def key_of(plan, purpose: str, track: str, draw: int) -> int:
    return _hash64("noise", plan.seed, purpose, owner(plan, track), draw)


def time_of(plan, purpose: str, track: str, draw: int) -> float:
    shift = _hash64("t", plan.seed, purpose, owner(plan, track), draw % plan.replicates) / 2**64
    value = shift + GOLDEN * (draw // plan.replicates)
    return value - math.floor(value)


@dataclass
class Item:
    """One track, padded by hand."""

    id: str
    latent: np.ndarray  # [C, F] float64
    valid: int
    conditioning: dict


def items(tracks, frames: int) -> list[Item]:
    out = []
    for name, latent, conditioning in zip(tracks.ids, tracks.raw, tracks.conditioning, strict=True):
        padded = np.repeat(np.asarray(tracks.silence, dtype=np.float64)[:, None], frames, axis=1)
        padded[:, : latent.shape[1]] = latent
        out.append(Item(name, padded, latent.shape[1], conditioning))
    return out


class Loop:
    """A float64 copy of a model, run one (track, draw) pair at a time."""

    def __init__(self, model, plan) -> None:
        self.model, self.plan = model.double_copy(), plan
        self.theta = dict(self.model.module.named_parameters())

    def rows(self, item: Item, purpose: str, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and target of one pair, ``[C, F]`` each."""
        t = time_of(self.plan, purpose, item.id, draw)
        e = normals(key_of(self.plan, purpose, item.id, draw), *item.latent.shape)
        e = e.astype(np.float32).astype(np.float64)  # noise is defined as float32
        if self.model.objective == "v":
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            x_t, target = alpha * item.latent + sigma * e, alpha * e - sigma * item.latent
        else:
            x_t, target = item.latent + t * (e - item.latent), e - item.latent
        prediction = self.model.predict(
            torch.from_numpy(x_t)[None],
            torch.tensor([t], dtype=torch.float64),
            self.model.conditioning([item.conditioning]),
        )[0]
        return prediction, torch.from_numpy(target)

    def loss(self, item: Item, purpose: str, draw: int, masked: bool) -> torch.Tensor:
        prediction, target = self.rows(item, purpose, draw)
        n = item.valid if masked else item.latent.shape[1]
        return ((prediction[:, :n] - target[:, :n]) ** 2).mean()

    def squared_norm(self, item: Item, purpose: str, draw: int, masked: bool) -> torch.Tensor:
        prediction, _ = self.rows(item, purpose, draw)
        return (prediction[:, : item.valid if masked else item.latent.shape[1]] ** 2).mean()

    def gradient(
        self, item: Item, purpose: str, draw: int, masked: bool, function: str = "loss"
    ) -> dict[str, np.ndarray]:
        for p in self.theta.values():
            p.grad = None
        getattr(self, function)(item, purpose, draw, masked).backward()
        return {
            n: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy() for n, p in self.theta.items()
        }

    def fisher(self, training: Sequence[Item], draws: int, masked: bool) -> dict[str, np.ndarray]:
        """Of every parameter; a group's Fisher is a part of it."""
        squares = [
            {n: g**2 for n, g in self.gradient(item, "fisher", d, masked).items()}
            for item in training
            for d in range(draws)
        ]
        return {n: np.mean([s[n] for s in squares], axis=0) for n in self.theta}

    def unlearned(
        self,
        query: Item,
        fisher: dict[str, np.ndarray],
        names: Sequence[str],
        tracks: int,
        strength: float,
        unit: str,
        steps: int,
        draws: int,
        damping: float,
        masked: bool,
        function: str = "loss",
    ) -> tuple["Loop", float]:
        """A loop at theta_q, and the learning rate of the first step."""
        other = Loop(self.model, self.plan)
        mean_fisher = float(np.concatenate([fisher[n].ravel() for n in names]).mean())
        weights = math.sqrt(sum(float((self.theta[n].detach() ** 2).sum()) for n in names))
        rates = []
        for k in range(steps):
            gradients = [
                other.gradient(query, "update", d, masked, function)
                for d in range(k * draws, (k + 1) * draws)
            ]
            step = {
                n: np.mean([g[n] for g in gradients], axis=0) / (fisher[n] + damping * mean_fisher)
                for n in names
            }
            length = math.sqrt(sum(float((s**2).sum()) for s in step.values()))
            rates.append(strength if unit == "lr" else strength / steps * weights / length * tracks)
            with torch.no_grad():
                for n in names:
                    other.theta[n] += rates[-1] / tracks * torch.from_numpy(step[n])
        return other, rates[0]

    def delta(self, other: "Loop") -> dict[str, np.ndarray]:
        return {n: (other.theta[n] - p).detach().numpy() for n, p in self.theta.items()}

    @torch.no_grad()
    def effects(
        self, other: "Loop", training: Sequence[Item], draws: int, masked: bool
    ) -> dict[str, np.ndarray]:
        """Per-draw ``base``, ``unlearned`` and ``displacement``, ``[N, D]``."""
        out: dict[str, list[float]] = {"base": [], "unlearned": [], "displacement": []}
        for item in training:
            n = item.valid if masked else item.latent.shape[1]
            for d in range(draws):
                before, target = self.rows(item, "score", d)
                after, _ = other.rows(item, "score", d)
                out["base"].append(float(((before - target)[:, :n] ** 2).mean()))
                out["unlearned"].append(float(((after - target)[:, :n] ** 2).mean()))
                out["displacement"].append(float(((after - before)[:, :n] ** 2).mean()))
        return {name: np.array(v).reshape(len(training), draws) for name, v in out.items()}

    def influence(
        self, other: "Loop", training: Sequence[Item], draws: int, masked: bool, function: str
    ) -> np.ndarray:
        """Per-draw inner products of the tracks' gradients with the way to ``other``, ``[N, D]``."""
        delta = self.delta(other)
        out = [
            [
                sum(
                    float((g * delta[n]).sum())
                    for n, g in self.gradient(item, "score", d, masked, function).items()
                )
                for d in range(draws)
            ]
            for item in training
        ]
        return np.array(out)


SCORES: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "loss_change": lambda e: e["unlearned"] - e["base"],
    "skew": lambda e: (e["unlearned"] - e["base"]) / (e["unlearned"] + e["base"] + 1e-3),
    "displacement": lambda e: e["displacement"],
    "influence": lambda e: e["influence loss"],
    "norm_influence": lambda e: e["influence squared_norm"],
}

# What is asked for, and what it holds, said without patterns.
GROUPS: dict[tuple[str, ...], Callable[[str], bool]] = {
    ("cross_attn.to_kv",): lambda name: ".cross_attn.to_kv." in name,
    ("cross_attn",): lambda name: ".cross_attn." in name,
    ("self_attn",): lambda name: ".self_attn." in name,
    ("transformer",): lambda name: "transformer.layers." in name,
    ("all",): lambda name: True,
    ("*timestep_embed.?.bias", "cross_attn.to_kv", "*conv.weight"): lambda name: (
        ".cross_attn.to_kv." in name
        or ("timestep_embed." in name and name.endswith(".bias"))
        or name.endswith("conv.weight")
    ),
}


def relative_error(actual, expected, floor: float = 0.0) -> float:
    """Largest difference over the largest expected value, or over ``floor`` where that is larger."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.abs(expected).max()
    assert scale > 0, "the reference is zero: nothing is compared"
    return float(np.abs(actual - expected).max() / max(scale, floor))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two vectors without ties."""
    ra, rb = np.argsort(np.argsort(a)), np.argsort(np.argsort(b))
    return float(np.corrcoef(ra, rb)[0, 1])


def non_zero(gradients: dict[str, np.ndarray]) -> None:
    """Assert that every tensor has signal: zeros compared with zeros prove nothing."""
    silent = [name for name, g in gradients.items() if not np.abs(g).max() > 0]
    assert not silent, f"the reference gradient is zero for {silent}"
