"""The model, the rows, and the ways to a diagonal Fisher that need no library but torch and the engine.

A way gives, for each parameter that it covers, the sum over rows of the squared gradients of each row's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 64
COND = 64  # features of a conditioning token and of the global condition
COND_TOKENS = 4
Sums = dict[str, Tensor]
Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """Size of a case: latent frames, width and depth of the DiT, rows of the batch."""

    tokens: int
    width: int
    depth: int
    batch: int


def dit() -> type[nn.Module]:
    """The class of stable-audio-tools."""
    from attr_engine.models.stable_audio import quiet

    with quiet():
        from stable_audio_tools.models.dit import DiffusionTransformer
    return DiffusionTransformer


class Velocity(nn.Module):
    """The DiT with its inner forward pass as ``forward``, which hooks and ``functional_call`` need.

    The DiT's own ``forward`` adds guidance and dropout of conditions, and casts every input.
    """

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor, t: Tensor, cross: Tensor, glob: Tensor) -> Tensor:
        inner: Any = self.m._forward
        return inner(x, t, cross_attn_cond=cross, global_embed=glob, use_checkpointing=False)


class Case:
    """A DiT with random weights, none of them zero, and a batch of random rows."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        module = dit()(
            io_channels=CHANNELS, embed_dim=size.width, depth=size.depth, num_heads=size.width // 64, cond_token_dim=COND,
            global_cond_dim=COND, project_cond_tokens=False, transformer_type="continuous_transformer",
        ).eval()  # fmt: skip
        with torch.no_grad():
            for p in module.parameters():
                # The output convolutions start at zero, which would stop all gradients.
                if not p.any():
                    p.normal_(std=0.02)
        # Everything is drawn in float32 first, so that every precision sees the same numbers.
        self.model = Velocity(module).to(dtype)
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        shape = (size.batch, CHANNELS, size.tokens)
        rows = (torch.randn(shape), torch.rand(size.batch), torch.randn(size.batch, COND_TOKENS, COND),
                torch.randn(size.batch, COND), torch.randn(shape))  # fmt: skip
        self.rows: Rows = tuple(x.to(dtype) for x in rows)

    def loss(self, rows: Rows, model: Callable[..., Tensor] | None = None) -> Tensor:
        """Mean squared error of each row, ``[B]``."""
        *inputs, target = rows
        return ((model or self.model)(*inputs) - target).square().mean(dim=(1, 2))

    def zeros(self, names: Sequence[str]) -> Sums:
        return {name: torch.zeros_like(self.parameters[name]) for name in names}


@dataclass(frozen=True)
class Way:
    """A way that is ready to run on a case.

    Attributes:
        run: what is timed.
        read: what ``run`` returned, as sums by the DiT's parameter names; None where it is no Fisher.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Sums] | None = dict


Make = Callable[[Case, Sequence[str]], Way]
"""Makes a way; the names are those of the parameters that are wanted, which only some ways can restrict."""


def backward(case: Case, only: Sequence[str]) -> Way:
    """A plain pass: what a step of training costs. Its result is not the Fisher."""
    parameters = [case.parameters[name] for name in only]
    return Way(lambda: torch.autograd.grad(case.loss(case.rows).sum(), parameters), None)


def engine(case: Case, only: Sequence[str], together: int | None = None) -> Way:
    """Per-sample gradients of so many rows in one backward pass; by default as many as the engine takes on a CPU."""
    from attr_engine.memory import cpu_rows
    from attr_engine.persample import add_squares, per_sample_backward

    parameters = {name: case.parameters[name] for name in only}
    model, count = SimpleNamespace(module=case.model), len(case.rows[1])

    def one_pass(total: Sums, rows: tuple[Tensor, ...]) -> None:
        per_sample_backward(
            model, parameters, SimpleNamespace(t=rows[1]),  # type: ignore[arg-type]  # only the function looks at them
            lambda name, gradient: add_squares(total[name], gradient), lambda *_: case.loss(rows),
        )  # fmt: skip

    def first(n: int) -> None:
        one_pass(case.zeros(only), tuple(x[[0] * n] for x in case.rows))

    step = together or cpu_rows(first)

    def run() -> Sums:
        total = case.zeros(only)
        for k in range(0, count, step):
            one_pass(total, tuple(x[k : k + step] for x in case.rows))
        return total

    return Way(run)


def whole_batch(case: Case, only: Sequence[str]) -> Way:
    """The engine with all rows in one backward pass."""
    return engine(case, only, len(case.rows[1]))


def loop(case: Case, only: Sequence[str]) -> Way:
    """One row at a time, by autograd alone."""
    parameters = [case.parameters[name] for name in only]

    def run() -> Sums:
        total = case.zeros(only)
        for b in range(len(case.rows[1])):
            row = tuple(x[b : b + 1] for x in case.rows)
            gradients = torch.autograd.grad(case.loss(row).sum(), parameters)
            for value, g in zip(total.values(), gradients, strict=True):
                value.addcmul_(g, g)
        return total

    return Way(run)


def vmap(case: Case, only: Sequence[str]) -> Way:
    weights = {f"m.{name}": case.parameters[name].detach() for name in only}

    def one(values: Sums, *row: Tensor) -> Tensor:
        def model(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(case.model, values, inputs)

        return case.loss(tuple(x[None] for x in row), model).sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, *[0] * len(case.rows)))

    def run() -> Sums:
        # In place: the gradients are no longer needed, and a second copy of B x parameters would cost time.
        return {
            name.removeprefix("m."): g.square_().sum(dim=0) for name, g in each(weights, *case.rows).items()
        }

    return Way(run)


WAYS: dict[str, Make] = {
    "backward": backward,
    "engine": engine,
    "engine, all rows a pass": whole_batch,
    "loop": loop,
    "vmap": vmap,
}


def errors(found: Sums, want: Sums) -> dict[str, float]:
    """Norm of the difference over the norm, of each parameter's sum of squares, in float64."""
    return {
        name: float((value.detach().double() - want[name]).norm() / want[name].norm())
        for name, value in found.items()
    }
