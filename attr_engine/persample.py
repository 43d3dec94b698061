"""Per-sample gradients, one (track, draw) pair a row: a whole batch of them in one backward pass.

Layout, everywhere: the first axis of what runs through the model is the batch of ``B`` rows, and the gradient of
row b is that of row b's own loss. It is never averaged over rows, and as a rule never stored:

* a weight of a Linear or a convolution has the gradient ``sum_t g[b, t]^T a[b, t]`` for row b, where ``a`` is the layer's
  input and ``g`` the gradient of its output; it is passed on as these two factors (:class:`Factors`), and the
  ordinary product that sums over rows is not computed;
* any other use of a parameter (gains, biases, raw parameters, embeddings, whatever is computed from a parameter
  alone) runs with a copy of the parameter for each row, through :func:`torch.func.vmap` of that one operation; its gradient
  ``[B, *shape]`` is passed on as it is.

Which use a parameter is put to is seen from the calls that the model makes, not from the kinds of its modules: a
:class:`torch.overrides.TorchFunctionMode` looks at each. A parameter that is used more than once has its uses
added before anything is squared. What cannot be covered is refused by name; nothing is skipped.
:func:`check_against_loop` compares a batch with the loop over single rows, which autograd alone computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from attr_engine import kernels
from attr_engine.diffusion import Noised, RowFunction, losses, work_dtype
from attr_engine.errors import UserError
from attr_engine.models.protocol import Denoiser
from attr_engine.uses import Factors, Sink, Uses


def add_squares(total: Tensor, gradient: Factors | Tensor) -> None:
    """``total += sum_b g_b^2``: the sum over rows of the squared per-sample gradients, in place.

    Args:
        total: float32 or float64, contiguous, in the parameter's shape.
        gradient: of the B rows; of :class:`Factors` no per-sample gradient is kept.
    """
    if isinstance(gradient, Tensor):
        total += gradient.to(total.dtype).square().sum(dim=0)
        return
    groups, out, columns = gradient.g.shape[1], gradient.g.shape[3], gradient.a.shape[3]
    squares = total.view(groups, out, columns)
    for j in range(groups):
        kernels.squared_gradient_(squares[j], gradient.g[:, j], gradient.a[:, j])


def summed_gradient(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    rows: Noised,
    function: RowFunction = losses,
) -> dict[str, Tensor | None]:
    """Gradient of the *sum* of the rows' losses, or of another number of each row, by autograd alone.

    Args:
        model: the denoiser.
        parameters: with respect to which.
        rows: noised rows; one row gives a per-sample gradient.
        function: the number of each row, ``[B]``.

    Returns:
        Name to gradient in the parameter's shape and dtype; None where the prediction does not
        depend on the parameter (its gradient is exactly zero).
    """
    with torch.enable_grad():
        total = function(model, rows).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def per_sample_backward(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    rows: Noised,
    sink: Sink,
    function: RowFunction = losses,
) -> set[str]:
    """Pass the per-sample gradients of every row to ``sink``, once for each parameter that is used.

    Args:
        model: the denoiser; its parameters are not changed and their ``grad`` is not touched.
        parameters: with respect to which.
        rows: B noised rows.
        sink: called with a parameter's name and gradients, as soon as they are whole.
        function: the number of each row, ``[B]``, whose gradient is wanted; default the loss.

    Returns:
        Names of the parameters that the prediction depends on.

    Raises:
        UserError: a parameter is used in a way that is not covered, by name.
    """
    uses = Uses(parameters, len(rows.t), sink)
    with torch.enable_grad(), uses:
        total = function(model, rows).sum()
    try:
        total.backward()
    except CheckpointError as error:
        raise UserError(
            "the model computes activations again in its backward pass, where per-sample gradients of a batch cannot watch it: "
            "turn --checkpointing off, or use --gradients loop"
        ) from error
    return uses.finish()


# -- sums of squares, in two ways -----------------------------------------------------------------

Make = Callable[[Sequence[tuple[int, int]]], Noised]
"""Makes the noised rows of (track, draw) pairs."""


def batch_squares(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], make: Make, pairs: Sequence[tuple[int, int]],
    total: Mapping[str, Tensor], function: RowFunction = losses,
) -> set[str]:  # fmt: skip
    """Add ``sum_b g_b^2`` of some pairs to ``total`` in one backward pass; returns the parameters that are used."""
    return per_sample_backward(
        model, parameters, make(pairs), lambda name, gradient: add_squares(total[name], gradient), function
    )


def loop_squares(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], make: Make, pairs: Sequence[tuple[int, int]],
    total: Mapping[str, Tensor], function: RowFunction = losses,
) -> set[str]:  # fmt: skip
    """The same, one pair at a time, by autograd alone."""
    used = set()
    for pair in pairs:
        for name, g in summed_gradient(model, parameters, make([pair]), function).items():
            if g is not None:
                add_squares(total[name], g[None])
                used.add(name)
    return used


SQUARES = {"batch": batch_squares, "loop": loop_squares}

# Relative error of a parameter's sum of squares that rounding explains; mixing rows up costs far more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}


def check_against_loop(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    make: Make,
    pairs: Sequence[tuple[int, int]],
    function: RowFunction = losses,
) -> None:
    """Compare the squared per-sample gradients of a batch with those of single rows.

    Args:
        model: the denoiser.
        parameters: with respect to which.
        make: noised rows of (track, draw) pairs.
        pairs: which to compare; at least 2, so that a mixing of rows shows.
        function: the number of each row, ``[B]``.

    Raises:
        UserError: they differ by more than rounding, by name of the parameter.
    """
    tolerance = _TOLERANCE[next(iter(parameters.values())).dtype]
    found = {name: torch.zeros_like(p, dtype=work_dtype(model)) for name, p in parameters.items()}
    used = batch_squares(model, parameters, make, pairs, found, function)
    expected = {name: torch.zeros_like(value) for name, value in found.items()}
    loop_squares(model, parameters, make, pairs, expected, function)
    scale = max(float(x.abs().max()) for x in expected.values())
    for name in expected:
        want, have = expected[name].double(), found[name].double()
        if not torch.isfinite(want).all() and not torch.isfinite(have).all():
            continue  # the model or the data are at fault, and whoever uses the sum says so
        # A gradient that is zero but for rounding (a bias of keys before a softmax) is compared with the largest.
        error = float((have - want).norm() / (want.norm() + 1e-9 * scale * want.numel() ** 0.5 + 1e-300))
        if not error <= tolerance or (name not in used and bool(want.any())):
            raise UserError(
                f"the per-sample gradients of {name} in a batch differ from those of single rows (relative error {error:.2g}): "
                "the model mixes rows, or uses this parameter in a way that is not covered; use --gradients loop"
            )
