"""Which use a model makes of its parameters, and what the backward pass finds at each: see :mod:`attr_engine.persample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from attr_engine.errors import UserError


@dataclass(frozen=True)
class Factors:
    """The gradient of a weight as a product: for row b and group j, ``sum_t g[b, j, t]^T a[b, j, t]``.

    Attributes:
        g: gradient of the layer's output, ``[B, groups, T, O]``.
        a: input of the layer, ``[B, groups, T, I]``; of a convolution the unfolded input.
    """

    g: Tensor
    a: Tensor

    def gradient(self, shape: torch.Size) -> Tensor:
        """``[B, *shape]``, for where factors and other uses have to be added."""
        return (self.g.transpose(2, 3) @ self.a).reshape(self.g.shape[0], *shape)


Sink = Callable[[str, "Factors | Tensor"], None]
"""Takes a parameter's name and its per-sample gradients: :class:`Factors`, or a tensor ``[B, *shape]``."""


class _Derived(Tensor):
    """What was computed from the parameters ``source``: looks like the value, holds one for each row in ``rows``."""

    rows: Tensor
    source: str

    @staticmethod
    def __new__(cls, rows: Tensor, source: str) -> _Derived:
        value = torch.Tensor._make_subclass(cls, rows[0].detach())
        value.rows, value.source = rows, source
        return value

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _only_row(out: Tensor) -> Tensor:
    if out.dim() == 0 or out.shape[0] != 1:
        raise RuntimeError("what comes out has no row for each row that went in")
    return out[0]


class Uses(TorchFunctionMode):
    """Sees every call of the forward pass, and books what its backward pass finds."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch: int, sink: Sink) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters, self._batch, self._sink = dict(parameters), batch, sink
        # Makes autograd visit layers whose input needs no gradient.
        device = next(iter(parameters.values())).device if parameters else None
        self._anchor = torch.zeros((), requires_grad=True, device=device)
        self._leaves: dict[str, Tensor] = {}
        self._expected: dict[str, int] = {}
        self._found: dict[str, list[Factors | Tensor]] = {}
        self._emitted: set[str] = set()

    # -- forward ------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _only_values(args) and (not kwargs or _only_values(kwargs.values())):
            return func(*args, **(kwargs or {}))  # most calls: nothing to look at any closer
        kwargs = kwargs or {}
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if not any(isinstance(x, nn.Parameter | _Derived) for x in flat):
            return func(*args, **kwargs)
        if not any(self._tracked(x) for x in flat):  # a frozen parameter: no gradient for it
            flat = [x.detach() if isinstance(x, nn.Parameter) else x for x in flat]
            args, kwargs = pytree.tree_unflatten(flat, spec)
            return func(*args, **kwargs)
        if func in _PROPERTIES:
            return func(*args, **kwargs)
        if func in _LAYERS and self._plain(flat):
            return self._layer(_LAYERS[func], *args, **kwargs)
        if func in _NORMS and self._plain(flat):
            return self._norm(*args, **kwargs)
        try:
            return self._mapped(func, flat, spec)
        except Exception as error:
            names = [self._name(x) for x in flat if self._tracked(x)]
            raise UserError(
                f"{names[0]} is used by {getattr(func, '__name__', func)} in a way that per-sample gradients of a batch do not "
                f"cover ({type(error).__name__}: {' '.join(str(error).split())[:200]}): use --gradients loop"
            ) from error

    def _tracked(self, x: Any) -> bool:
        return isinstance(x, _Derived) or (isinstance(x, nn.Parameter) and id(x) in self._names)

    def _plain(self, flat: Sequence[Any]) -> bool:
        return not any(isinstance(x, _Derived) for x in flat)

    def _name(self, x: Any) -> str:
        return x.source if isinstance(x, _Derived) else self._names[id(x)]

    def _rows(self, x: Tensor) -> Tensor:
        """One value of a parameter for each row, ``[B, *shape]``, without memory of its own."""
        if isinstance(x, _Derived):
            return x.rows
        name = self._names[id(x)]
        if name not in self._leaves:
            self._leaves[name] = x.detach()[None].expand(self._batch, *x.shape).requires_grad_()
        return self._leaves[name]

    def _mapped(self, func: Any, flat: list[Any], spec: Any) -> Any:
        """Run one operation row by row, with each row's own copy of the parameters."""
        if func in (Tensor.expand, Tensor.repeat):
            out = self._spread(
                func, flat[0], [n for x in flat[1:] for n in (x if isinstance(x, torch.Size) else [x])]
            )
            if out is not None:
                return out
        mixed = [i for i, x in enumerate(flat) if self._has_rows(x)]
        places = sorted([*mixed, *(i for i, x in enumerate(flat) if self._tracked(x))])
        values = [self._rows(flat[i]) if self._tracked(flat[i]) else flat[i] for i in places]
        detached = [x.detach() if isinstance(x, nn.Parameter) and not self._tracked(x) else x for x in flat]

        def one(*row: Tensor) -> Any:
            filled = list(detached)
            for i, value in zip(places, row, strict=True):
                filled[i] = value[None] if i in mixed else value  # a batch of one, as the operation knows it
            args, kwargs = pytree.tree_unflatten(filled, spec)
            out = func(*args, **kwargs)
            return pytree.tree_map_only(Tensor, _only_row, out) if mixed else out

        with torch._C.DisableTorchFunctionSubclass():
            out = torch.func.vmap(one)(*values)
        if mixed:
            return out
        source = ", ".join(self._name(x) for x in flat if self._tracked(x))
        return pytree.tree_map_only(Tensor, lambda rows: _Derived(rows, source), out)

    def _spread(self, func: Any, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """What a model gets that itself makes a copy of a parameter for each row; None where it does not."""
        rows = self._rows(x)
        if len(sizes) == x.dim() and x.dim() > 0 and x.shape[0] == 1:
            rows = rows.squeeze(1)  # [B, *shape[1:]]
        elif len(sizes) != x.dim() + 1:
            return None
        if sizes[0] != self._batch:
            return None
        return func(rows, self._batch if func is Tensor.expand else 1, *sizes[1:])

    def _has_rows(self, x: Any) -> bool:
        plain = isinstance(x, Tensor) and not isinstance(x, nn.Parameter | _Derived)
        return plain and x.dim() > 0 and x.shape[0] == self._batch

    def _layer(
        self,
        kind: type[torch.autograd.Function],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        use = self._use(x, weight, bias)
        plain = (weight.detach(), None if bias is None else bias.detach())
        return kind.apply(x, *plain, self._anchor.to(x.device), use, *_settings(kind, rest, named))

    def _norm(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        use = self._use(x, weight, bias)
        plain = [None if p is None else p.detach() for p in (weight, bias)]
        return _LayerNorm.apply(x, *plain, self._anchor.to(x.device), use, list(shape), eps)

    def _use(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Use:
        """Book one use of a weight and a bias by a layer with the input ``x``."""
        names = [self._names[id(p)] if self._tracked(p) else None for p in (weight, bias)]
        if x.shape[0] % self._batch:
            raise UserError(
                f"{names[0] or names[1]} sees an input of shape {list(x.shape)}, whose "
                f"first axis is not the batch of {self._batch} rows: use --gradients loop"
            )
        for name in names:
            if name is not None:
                self._expected[name] = self._expected.get(name, 0) + 1

        def found(*gradients: Factors | Tensor | None) -> None:
            for name, gradient in zip(names, gradients, strict=True):
                if name is not None and gradient is not None:
                    self._book(name, gradient)

        return _Use(self._batch, names[0] is not None, names[1] is not None, found)

    # -- backward -----------------------------------------------------------------------------------

    def _book(self, name: str, gradient: Factors | Tensor) -> None:
        found = self._found.setdefault(name, [])
        found.append(gradient)
        if len(found) == self._expected[name] and name not in self._leaves:
            self._emit(name)

    def _emit(self, name: str) -> None:
        found = self._found.pop(name, [])
        if not found:
            return
        self._emitted.add(name)
        factors = [x for x in found if isinstance(x, Factors)]
        if len(factors) == len(found) and len({x.g.shape[1] for x in factors}) == 1:
            g = factors[0].g if len(factors) == 1 else torch.cat([x.g for x in factors], dim=2)
            a = factors[0].a if len(factors) == 1 else torch.cat([x.a for x in factors], dim=2)
            self._sink(name, Factors(g, a))
            return
        shape = self._parameters[name].shape
        whole = [x.gradient(shape) if isinstance(x, Factors) else x for x in found]
        self._sink(name, whole[0] if len(whole) == 1 else torch.stack(whole).sum(dim=0))

    @torch.no_grad()  # as in the backward pass: factors hold inputs that belong to the graph
    def finish(self) -> set[str]:
        """Pass on what is left, and say which parameters were used."""
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._found.setdefault(name, []).append(leaf.grad)
        for name in list(self._found):
            self._emit(name)
        return self._emitted


@dataclass(frozen=True)
class _Use:
    """One use of a weight and a bias by a layer."""

    batch: int
    weight: bool
    bias: bool
    found: Callable[[Factors | None, Tensor | None], None]


class _Linear(torch.autograd.Function):
    """``x W^T + b`` whose backward pass books the factors in place of the gradient of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, use: _Use
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.use = use
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        use: _Use = ctx.use
        rows = g.reshape(use.batch, 1, -1, g.shape[-1])
        factors = Factors(rows, x.reshape(use.batch, 1, -1, x.shape[-1])) if use.weight else None
        use.found(factors, rows.sum(dim=(1, 2)) if use.bias else None)
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Conv1d(torch.autograd.Function):
    """A convolution whose backward pass books the factors in place of the gradient of its weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, use: _Use, stride: int, padding: int,
        dilation: int, groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.use, ctx.settings = use, (stride, padding, dilation, groups)
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        use: _Use = ctx.use
        stride, padding, dilation, groups = ctx.settings
        factors = None
        if use.weight:
            taps = weight.shape[2]
            # [B, I * taps, T]: what each output frame sees
            seen = x if taps == 1 and stride == 1 and padding == 0 else F.unfold(
                x[:, :, None], (1, taps), (1, dilation), (0, padding), (1, stride)
            )  # fmt: skip
            split = (use.batch, groups, -1, g.shape[2])
            factors = Factors(g.reshape(split).transpose(2, 3), seen.reshape(split).transpose(2, 3))
        use.found(factors, g.sum(dim=2) if use.bias else None)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = conv1d_input(x.shape, weight, g, stride, padding, dilation, groups)
        return (gx, *[None] * 8)


class _LayerNorm(torch.autograd.Function):
    """A layer norm that keeps nothing but its input, and books the gradients of its gain and bias row by row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor, use: _Use, shape: list[int],
        eps: float,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.use, ctx.shape, ctx.eps = use, shape, eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        use, shape = ctx.use, ctx.shape
        rows = (use.batch, -1, *shape)
        gain = None
        if use.weight:  # mean and rstd may be kept in 16 bits: normalised again, in the work dtype
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            normal = torch.native_layer_norm(x.to(wide), shape, None, None, ctx.eps)[0]
            gain = normal.mul_(g).reshape(rows).sum(dim=1)
        use.found(gain, g.reshape(rows).sum(dim=1) if use.bias else None)
        gx = None
        if ctx.needs_input_grad[0]:
            wanted = [True, False, False]
            gx = torch.ops.aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, wanted)[0]
        return (gx, *[None] * 6)


def _settings(kind: type, rest: Sequence[Any], named: Mapping[str, Any]) -> list[int]:
    """Stride, padding, dilation and groups of a convolution, as numbers; nothing for a Linear."""
    if kind is _Linear:
        return []
    out = []
    for i, (name, default) in enumerate({"stride": 1, "padding": 0, "dilation": 1, "groups": 1}.items()):
        value = named.get(name, rest[i] if i < len(rest) else default)
        value = value[0] if isinstance(value, list | tuple) else value
        if not isinstance(value, int):
            raise UserError(f"a convolution has the {name} {value!r}: use --gradients loop")
        out.append(value)
    return out


_LAYERS: dict[Any, type[torch.autograd.Function]] = {
    F.linear: _Linear,
    F.conv1d: _Conv1d,
    torch.conv1d: _Conv1d,
}
_NORMS = {F.layer_norm, torch.layer_norm}
_VALUES = {Tensor, int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size}


def _only_values(values: Iterable[Any]) -> bool:
    """Whether there is surely no parameter among the arguments of a call, nor anything that was computed from one."""
    for x in values:
        kind = type(x)
        if kind in _VALUES:
            continue
        if kind is slice:
            x = (x.start, x.stop, x.step)
        elif kind is not tuple and kind is not list:
            return False
        if not _only_values(x):
            return False
    return True


# Looking at a parameter does not use it.
_PROPERTIES = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn", "is_leaf")
} | {Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.element_size,
     Tensor.data_ptr, Tensor.__len__, Tensor.is_complex}  # fmt: skip
