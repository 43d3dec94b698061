"""What the engine needs of a denoiser, and how its parameters are chosen."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from attr_engine.errors import UserError


class Denoiser(Protocol):
    """A latent diffusion model, as the engine sees it.

    Any object with these attributes works; nothing has to be inherited.

    Attributes:
        module: the network whose parameters are attributed. Conditioners and autoencoder are not
            part of it and stay frozen.
        objective: ``"v"`` or ``"rectified_flow"``.
        channels: C.
        frames: F; every track is padded to it, because padded frames attend and are attended.
        layer_groups: group name to patterns of parameter names of ``module``
            (:func:`select_parameters`).
        fingerprint: hex digest that changes when the weights or the configuration change.
    """

    @property
    def module(self) -> nn.Module: ...  # noqa: D102
    @property
    def objective(self) -> str: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def frames(self) -> int: ...  # noqa: D102
    @property
    def layer_groups(self) -> Mapping[str, Sequence[str]]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def conditioning(self, items: Sequence[Mapping[str, Any]]) -> Any:
        """Turn one mapping a row into what ``predict`` takes, without gradient and without dropout."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Prediction ``[B, C, F]`` for noised latents ``[B, C, F]`` at timesteps ``[B]``."""
        ...


def check_inference(model: Denoiser) -> None:
    """Refuse a model in training mode.

    Raises:
        UserError: says what to call.
    """
    if model.module.training:
        raise UserError(
            "the model is in training mode, where dropout would differ from pass to pass: call .eval()"
        )


def select_parameters(model: Denoiser, layers: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of a layer group, by name.

    Args:
        model: the denoiser.
        layers: names of groups (``model.layer_groups``, and ``"all"``), or shell-style patterns of
            parameter names such as ``"*layers.3.*"``; the union is taken.

    Returns:
        Name to parameter, in the module's order; a tied parameter stands once.

    Raises:
        UserError: an entry is neither a known group nor a pattern that matches a parameter, or a
            parameter of the group is frozen.
    """
    parameters = dict(model.module.named_parameters())
    first = {id(p): name for name, p in parameters.items()}
    # A tied parameter is found under each of its names, and stands under the first one.
    names = {n: first[id(p)] for n, p in model.module.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for entry in layers:
        patterns = ["*"] if entry == "all" else model.layer_groups.get(entry, [entry])
        matched = {names[name] for name in names for p in patterns if fnmatch.fnmatchcase(name, p)}
        if not matched:
            groups = ", ".join(sorted({*model.layer_groups, "all"}))
            some = ", ".join(list(parameters)[:3])
            raise UserError(
                f"layers {entry!r} matches no parameter: use one of the groups {groups}, "
                f"or a pattern of parameter names such as {some}"
            )
        chosen |= matched
    if not chosen:
        raise UserError("no layers were named: use a group such as 'transformer', or 'all'")
    group = {name: p for name, p in parameters.items() if name in chosen}
    frozen = [name for name, p in group.items() if not p.requires_grad]
    if frozen:
        raise UserError(
            f"{frozen[0]} is frozen ({len(frozen)} of {len(group)} parameters of the group): "
            "call requires_grad_(True) on it, or leave it out of the layers"
        )
    return group
