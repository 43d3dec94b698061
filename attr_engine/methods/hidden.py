"""The denoiser's own hidden states, and how alike they are for two tracks (LPIPS, Zhang et al. 2018, arXiv 1801.03924).

The states of every transformer layer at a noised track are normalised to length 1 over the channels, token by token; two tracks are
as far apart as the squared differences of these vectors, averaged over tokens, draws and layers. Choi et al. (arXiv 2506.18312) compare
that with unlearning. LPIPS' learned weights of channels have no counterpart here: all channels count alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan, Noised, Purpose, noised_rows
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Batch, Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.passes import Kept, by_set, check_model, keep, rows_a_pass
from attr_engine.models.protocol import Denoiser

_LAYERS, _LAST = "transformer.layers", "transformer.project_out"
_EPSILON = 1e-10  # added to lengths by LPIPS
_QUERY_BYTES = 2**30  # of queries in 16 bits that are in memory at a time


def layer_names(model: Denoiser) -> list[str]:
    """Names of the modules whose outputs are the hidden states: those in ``hidden_layers`` of the denoiser, or in
    ``transformer.layers`` of its module.

    Raises:
        UserError: it has neither.
    """  # noqa: D205
    named = getattr(model, "hidden_layers", None)
    if named is not None:
        return list(named)
    for name, module in model.module.named_modules():
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{_LAYERS}"):
            return [f"{name}.{i}" for i in range(len(module))]
    raise UserError(
        f"the denoiser has no transformer layers (no module {_LAYERS}), whose hidden states are compared: give it an attribute "
        "hidden_layers with the names of such modules"
    )


def last_layer(model: Denoiser) -> str:
    """Name of the module that maps the last hidden states to the prediction: ``last_layer`` of the denoiser, or
    ``transformer.project_out`` of its module.

    Raises:
        UserError: it has neither.
    """  # noqa: D205
    named = getattr(model, "last_layer", None)
    if named is not None:
        return str(named)
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Linear) and f".{name}".endswith(f".{_LAST}"):
            return name
    raise UserError(
        f"the denoiser has no last linear layer (no module {_LAST}), whose inputs are compared: give it an attribute last_layer "
        "with the name of that module"
    )


def tokens_of(model: Denoiser) -> int:
    """How many tokens the frames of a track are: those of a patch are one."""
    found = (getattr(module, "patch_size", None) for module in model.module.modules())
    return model.frames // next((size for size in found if isinstance(size, int)), 1)


def counted_tokens(frames: Tensor, tokens: int) -> Tensor:
    """Tokens with at least one counted frame: bool ``[B, F]`` to bool ``[B, tokens]``."""
    return frames.reshape(len(frames), tokens, -1).any(dim=2)


@contextlib.contextmanager
def watched(model: Denoiser, names: Sequence[str], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keep what some modules last returned, or were given, while the block runs.

    Args:
        model: the denoiser.
        names: of modules of its module.
        inputs: what they were given.

    Yields:
        Name to tensor, filled by every pass.

    Raises:
        UserError: there is no such module.
    """
    modules, seen = dict(model.module.named_modules()), dict[str, Tensor]()
    missing = [name for name in names if name not in modules]
    if missing:
        raise UserError(
            f"the denoiser has no module {missing[0]!r}: correct its attribute hidden_layers or last_layer"
        )

    def hook(name: str, args: tuple, out: Tensor | tuple) -> None:
        value = args[0] if inputs else out
        seen[name] = (value[0] if isinstance(value, tuple) else value).detach()

    with contextlib.ExitStack() as stack:
        for name in names:
            handle = modules[name].register_forward_hook(lambda _, args, out, n=name: hook(n, args, out))
            stack.callback(handle.remove)
        yield seen


def token_states(seen: dict[str, Tensor], name: str, tokens: int) -> Tensor:
    """States of the frames ``[B, tokens, D]``: conditioning and memory tokens, which stand in front, are left out.

    Raises:
        UserError: the module was not called, or has other outputs.
    """
    if name not in seen:
        raise UserError(f"the module {name} was not seen in a pass through the model: use --compile off")
    states = seen[name]
    if states.dim() != 3 or states.shape[1] < tokens:
        raise UserError(
            f"the module {name} has states of shape {list(states.shape)}, expected [rows, at least {tokens} tokens, channels]"
        )
    return states[:, states.shape[1] - tokens :]


@dataclass(frozen=True)
class AtOneTime(DrawPlan):
    """Draws that differ in their noise alone.

    Attributes:
        at: the timestep of all of them, in [0, 1).
    """

    at: float = 0.0

    def timestep(self, purpose: Purpose, track: str, draw: int) -> float:
        """The one timestep."""
        return self.at


def window_means(states: Tensor, valid: Tensor, window: int) -> Tensor:
    """Mean direction of the states in windows of tokens.

    Args:
        states: ``[B, T, D]``.
        valid: bool ``[B, T]``, which tokens count: the first of every row.
        window: tokens a window, the last of a track may have fewer.

    Returns:
        ``[B, W, D]``, zero where a window has no valid token.
    """
    unit = states / (states.norm(dim=2, keepdim=True) + _EPSILON) * valid[:, :, None]
    fill = -states.shape[1] % window
    sums = nn.functional.pad(unit, (0, 0, 0, fill)).unflatten(1, (-1, window)).sum(dim=2)
    counts = nn.functional.pad(valid, (0, fill)).unflatten(1, (-1, window)).sum(dim=2)
    return sums / counts.clamp_min(1)[:, :, None]


def distance(a: Tensor, b: Tensor) -> float:
    """Mean over draws, layers and the windows that both have of ``|a - b|^2``: of ``[draws, layers, W, D]`` and ``[.., V, D]``."""
    both = min(a.shape[2], b.shape[2])
    return float((a[:, :, :both] - b[:, :, :both]).square().sum(dim=3, dtype=torch.float64).mean())


@method("lpips", "representation", "distance of the model's own hidden states (LPIPS as in Choi et al. 2025)")
@dataclass(frozen=True)
class Lpips:
    """Minus the distance of hidden states, under the same noise for all.

    Tracks of different lengths are compared over the first tokens, as many as both have.
    """

    layer: int = option(-1, "one layer alone, counted from 0; -1: the mean over all layers")
    timestep: float = option(0.1, "of all draws, in [0, 1); below 0: those of the draw plan")
    draws: int = option(4, "noises that every track and query meets")
    window: int = option(1, "tokens averaged before they are compared; 0: all valid ones of a track")
    gigabytes: float = option(20.0, "most that may be kept on disk")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedLpips:
        """Keep the directions of the tracks' hidden states, in float16.

        Raises:
            UserError: an option that cannot be, no transformer layers, or more to keep than is allowed.
        """
        check_model(model, tracks)
        names = self._layers(model)
        s = work.settings
        plan: DrawPlan = DrawPlan(s.seed, "shared", 1)
        if self.timestep >= 0:
            plan = AtOneTime(s.seed, "shared", 1, self.timestep)
        states = States(model, names, plan, self.draws, self.window, rows_a_pass(model, tracks, s))
        size = states.track_bytes(tracks)
        if size * len(tracks) > self.gigabytes * 1e9:
            raise UserError(
                f"lpips would keep {size * len(tracks) / 1e9:.3g} GB ({size / 1e6:.3g} MB a track), more than "
                f"gigabytes={self.gigabytes:g}: allow more, or compare less with draws=1, with one layer=, or with window=0"
            )
        identity = [names, self.timestep, self.draws, self.window, s.seed, states.rows]

        def make(unit: range) -> dict[str, Tensor]:
            means, windows = states(tracks.batch(unit, model.frames))
            return {"means": means.half(), "windows": windows}

        kept = keep(work, "lpips", model, tracks, identity, make, size)
        return FittedLpips(states, kept, len(tracks))

    def _layers(self, model: Denoiser) -> list[str]:
        names = layer_names(model)
        if not -1 <= self.layer < len(names):
            raise UserError(
                f"layer={self.layer}: the denoiser has layers 0 to {len(names) - 1}; -1 for all of them"
            )
        if not self.timestep < 1 or self.draws < 1 or self.window < 0:
            raise UserError(
                f"timestep={self.timestep:g}, draws={self.draws}, window={self.window}: use a timestep below 1, at least 1 draw, "
                "and a window of 0 or more"
            )
        return names if self.layer < 0 else [names[self.layer]]


@dataclass(frozen=True)
class States:
    """Makes the directions that are compared; attributes as of :class:`Lpips`."""

    model: Denoiser
    layers: Sequence[str]
    plan: DrawPlan
    draws: int
    window: int
    rows: int

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Directions ``[B, draws, layers, W, D]`` and windows of each track ``[B]``, on the CPU."""
        tokens, count = tokens_of(self.model), len(batch.ids)
        valid = counted_tokens(batch.mask(), tokens)
        pairs = [(i, d) for i in range(count) for d in range(self.draws)]
        found = []
        for first in range(0, len(pairs), self.rows):
            some = pairs[first : first + self.rows]
            noised = noised_rows(self.model, batch, some, self.plan, "score", False)
            here = valid[torch.tensor([i for i, _ in some])].to(noised.x.device)
            found.append(self._means(noised, here, tokens).cpu())
        means = torch.cat(found)
        windows = -(-valid.sum(dim=1) // (self.window or tokens))
        return means.unflatten(0, (count, self.draws))[:, :, :, : int(windows.max())], windows

    def _means(self, noised: Noised, valid: Tensor, tokens: int) -> Tensor:
        """``[B, layers, W, D]`` of noised rows."""
        window = self.window or tokens
        with watched(self.model, self.layers) as seen:
            self.model.predict(noised.x_t, noised.t, noised.conditioning)
            states = [token_states(seen, name, tokens).to(noised.x.dtype) for name in self.layers]
        return torch.stack([window_means(x, valid, window) for x in states], dim=1)

    def track_bytes(self, tracks: Tracks) -> int:
        """Bytes that are kept of a track, at most."""
        batch = tracks.batch([int(np.argmax(tracks.lengths))], self.model.frames)
        means, windows = States(self.model, self.layers, self.plan, 1, self.window, 1)(batch)
        return 2 * means.numel() * self.draws + windows.element_size()


@dataclass(frozen=True)
class FittedLpips:
    """:class:`Lpips` that knows the training tracks."""

    states: States
    kept: Kept
    tracks: int

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Minus the distance of every query to every track."""
        model, scores = self.states.model, np.empty((len(queries), self.tracks))
        for tracks, places in by_set(queries):
            check_model(model, tracks, "query")
            together = max(1, _QUERY_BYTES // self.states.track_bytes(tracks))
            for first in range(0, len(places), together):
                some = range(first, min(first + together, len(places)))
                asked = [self.states(tracks.batch([i], model.frames))[0][0] for i in some]
                for i, x in enumerate(self._tracks()):
                    scores[[places[k] for k in some], i] = [-distance(x, query) for query in asked]
        return scores

    def _tracks(self) -> Iterator[Tensor]:
        """What is kept of every track, ``[draws, layers, W, D]`` with its own number of windows."""
        for unit in self.kept:
            for means, windows in zip(unit["means"], unit["windows"], strict=True):
                yield means[:, :, : int(windows)].float()
