"""Reading model weights from files that may come from anywhere: no pickle is ever executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.errors import UserError, one_line

_EMA_PREFIX = "diffusion_ema.ema_model."


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not JSON, or is not an object.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: check the path")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}): repair the file") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): check its permissions") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors`` file, or of a ``.ckpt`` / ``.pt`` / ``.pth`` file.

    The latter are read with ``weights_only=True``, so that code in them is refused.

    Raises:
        UserError: missing file, unknown ending, damaged file, or content other than tensors.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".ckpt", ".pt", ".pth"):
            if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
                # CVE-2025-32434: there weights_only=True can be made to run code.
                raise UserError(
                    f"checkpoint {path} is only read with torch 2.6 or newer: update torch, or use .safetensors"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"checkpoint {path} ends in {path.suffix!r}, expected .safetensors or .ckpt")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged, or holds more than tensors, which could run code and is not loaded: "
            "save its state_dict as .safetensors where you trust it"
        ) from error
    except Exception as error:  # torch and safetensors raise a dozen kinds; all mean the same here
        first = one_line(error).split(". ")[0]
        raise UserError(
            f"checkpoint {path} cannot be read ({first}): it is damaged or not a weights file"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise UserError(f"checkpoint {path} holds no state dict: save it as {{'state_dict': ...}}")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"checkpoint {path} holds no tensors: it is not a weights file")
    return tensors


def unwrap(state: Mapping[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """Strip what a Lightning training wrapper puts around a stable-audio-tools model.

    ``diffusion.*`` becomes ``*``; where averaged weights of the denoiser are there
    (``diffusion_ema.ema_model.*``, an average of ``model`` only) and ``ema`` is set, they replace
    the plain ones.
    """
    if not any(name.startswith("diffusion.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    out = {n.removeprefix("diffusion."): v for n, v in state.items() if n.startswith("diffusion.")}
    if ema:
        averaged = {n.removeprefix(_EMA_PREFIX): v for n, v in state.items() if n.startswith(_EMA_PREFIX)}
        out.update({f"model.{name}": value for name, value in averaged.items()})
    return out


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: Path, optional: str = "") -> bool:
    """Load weights and refuse anything missing, left over, of another shape or not finite.

    Args:
        module: where to.
        state: the weights.
        path: named in messages.
        optional: parameters under this prefix may be absent all together; they become zero, because
            random ones would give the same model another fingerprint each time.

    Returns:
        Whether everything was there, the optional part too.

    Raises:
        UserError: names the first few differences.
    """
    wanted = module.state_dict()
    optional_names = [name for name in wanted if optional and name.startswith(optional)]
    lacks_optional = bool(optional_names) and not any(name.startswith(optional) for name in state)
    missing = [n for n in wanted if n not in state and not (lacks_optional and n.startswith(optional))]
    extra = [n for n in state if n not in wanted]
    shapes = [
        f"{n} is {list(state[n].shape)} in the file and {list(wanted[n].shape)} in the model"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    for what, names in (("lacks", missing), ("has unknown", extra), ("differs:", shapes)):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"checkpoint {path} does not fit its config: it {what} {listed}; use the config it was trained with"
            )
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"checkpoint {path} holds NaN or infinity in {name}: the training diverged, or the file is damaged"
            )
    module.load_state_dict(dict(state), strict=not lacks_optional)
    if lacks_optional:
        for name in optional_names:
            wanted[name].zero_()  # state_dict shares its memory with the module
    return not lacks_optional


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 over configuration and weights, 64 hex digits."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
