"""Weights of published embeddings: what file, from where, under which licence; and reading them without running what they hold.

Nothing is downloaded. A ``.pt`` file is read by torch's restricted unpickler (``weights_only``); what else stands in such files
(configurations, counters of a trainer) becomes an empty object of this module, and a name of any other origin is refused.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.errors import UserError, one_line
from attr_engine.models.checkpoint import read_json

NON_COMMERCIAL = "CC-BY-NC-4.0"


@dataclass(frozen=True)
class Source:
    """Published weights.

    Attributes:
        method: the method that takes them.
        file: name of the file or folder.
        where: who publishes it.
        licence: of the weights.
        restricted: whether the licence forbids some uses, so that a user has to name it.
        unknown: whether it could not be read here, so that a user has to read it and name what it is.
    """

    method: str
    file: str
    where: str
    licence: str
    restricted: bool = False
    unknown: bool = False

    @property
    def text(self) -> str:
        """File, place and licence, for messages."""
        return f"{self.file} of {self.where} (licence: {self.licence})"

    def path(self, checkpoint: str, licence: str = "") -> Path:
        """The path that a user gave as ``checkpoint``, with the licence that the user named.

        Raises:
            UserError: no path, nothing there, or a restricted or unknown licence that was not named; says what to get, and from where.
        """
        if not checkpoint:
            raise UserError(f"{self.method} needs weights: get {self.text} and name it as {self.method}:checkpoint=PATH")  # fmt: skip
        if self.restricted and licence != self.licence:
            raise UserError(
                f"the weights of {self.method} ({self.where}) are under {self.licence}, which forbids commercial use: "
                f"where that is yours, say so with licence={self.licence}"
            )
        if self.unknown and not licence.strip():
            raise UserError(
                f"the licence of the weights of {self.method} is not known here: read it at {self.where}, and where it allows your use, "
                "name it with licence=NAME (of forget: --licence NAME)"
            )
        path = Path(checkpoint)
        if not path.exists():
            raise UserError(f"checkpoint {path} of {self.method} does not exist: get {self.text}")
        return path


SOURCES = {
    s.method: s
    for s in (
        Source("clap", "music_audioset_epoch_15_esc_90.14.pt", "huggingface.co/lukewys/laion_clap", "CC0-1.0"),
        Source(
            "clews", "a CLEWS checkpoint (.ckpt)", "zenodo.org/records/15045900",
            "see that record; the code of github.com/sony/clews is MIT", unknown=True,
        ),
        Source("clmr", "clmr_checkpoint_10000.pt", "github.com/Spijkervet/CLMR, releases", "Apache-2.0"),
        Source("mert", "the folder", "huggingface.co/m-a-p/MERT-v1-95M", NON_COMMERCIAL, True),
        Source(
            "openl3", "torchopenl3_mel256_music_512.pth.tar", "github.com/torchopenl3/torchopenl3-models",
            "Apache-2.0, ported from those of github.com/marl/openl3, which are CC-BY-4.0",
        ),
        Source("muq", "the folder", "huggingface.co/OpenMuQ/MuQ-large-msd-iter", NON_COMMERCIAL, True),
    )
}  # fmt: skip
"""Method to the weights that it was written for."""


class _Inert:
    """What stands in a checkpoint beside tensors: made, and nothing more."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _inert_dict(*args: object) -> dict[Any, Any]:
    return {}


# Numbers of numpy, and what Lightning and OmegaConf keep of a configuration. Every name stands for an object of ours.
_INERT = ("numpy.", "omegaconf.", "typing.", "pytorch_lightning.", "lightning.", "argparse.Namespace")
_INERT_NAMES = {
    "_codecs.encode", *(f"{m}.{t}" for m in ("builtins", "__builtin__") for t in ("dict", "list", "int", "str", "object", "tuple")),
}  # fmt: skip
_DICTS: dict[str, Any] = {
    "collections.defaultdict": _inert_dict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.types.AttributeDict": OrderedDict,
}


def _stand_ins(path: Path) -> list[Any]:
    """Pairs of ours and the name that it stands for, of all that a zip checkpoint names and torch does not know.

    Raises:
        pickle.UnpicklingError: a name that has no place in a checkpoint.
    """
    out = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))):
        if name not in _DICTS and name not in _INERT_NAMES and not name.startswith(_INERT):
            raise pickle.UnpicklingError(f"it names {name}")
        out.append((_DICTS.get(name, _Inert), name))
    return out


def check_file(path: Path, source: Source) -> None:
    """Refuse a web page, a pointer or a cut file that was saved under the name of a checkpoint, before it is read.

    Raises:
        UserError: says what the file is and what was expected.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give {source.text}")
    with open(path, "rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"<"):
        raise UserError(f"{path} is a web page, not a checkpoint: download {source.text} again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull, or get {source.text}"
        )
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(
                f"{path} is cut short or damaged ({one_line(error)}): get {source.text} again"
            ) from error
        # PyTorch stores entries as they are; what unpacks to more than the file is none of its.
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
            sum(e.file_size for e in entries) > path.stat().st_size
        ):
            raise UserError(
                f"{path} is a compressed archive, not a checkpoint: unpack it and give {source.file}"
            )


def read_state(path: Path, source: Source) -> dict[str, Tensor]:
    """State dict of a ``.safetensors`` file, or of a file of ``torch.save``; no code in it is run.

    Tensors of a zip file are mapped, not read, until they are used.

    Args:
        path: the file.
        source: what was expected, for messages.

    Raises:
        UserError: see :func:`check_file`; or a damaged file, one that names code, or one without a state dict.
    """
    check_file(path, source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(path) if zipped else []):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than weights, which could run code and is not loaded "
            f"({one_line(error).split('. ')[0]}): expected {source.text}"
        ) from error
    except Exception as error:  # torch and safetensors raise a dozen kinds; all mean the same here
        raise UserError(
            f"{path} cannot be read ({one_line(error).split('. ')[0]}): it is damaged or not a checkpoint; expected {source.text}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = (
        {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    )
    if not state:
        raise UserError(f"{path} holds no weights: expected {source.text}")
    for name, value in state.items():
        # A tensor of stride zero may claim any shape, and shapes are what a network is built by.
        if value.numel() * value.element_size() > path.stat().st_size:
            raise UserError(
                f"{path}: {name} claims {list(value.shape)}, more than the file holds; expected {source.text}"
            )
    return state


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_state(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, source: Source
) -> dict[str, Tensor]:
    """The tensors that a module needs, found to be there and of its shapes; ``module`` may be on the meta device.

    Args:
        module: all of its tensors are needed, save counters of batches and tables of positions.
        state: the weights; what else they hold is left alone.
        path: named in messages.
        source: what was expected.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    wanted = module.state_dict()
    missing = [
        n for n in wanted if n not in state and not n.endswith(("num_batches_tracked", "position_ids"))
    ]
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise UserError(
            f"{path} holds the weights of another model: it lacks {', '.join(missing[:2])}{more}; expected {source.text}"
        )
    fitting = {n: state[n] for n in wanted if n in state}
    for name, value in fitting.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{path} does not fit: {name} is {list(value.shape)}, expected {list(wanted[name].shape)} as in {source.text}"
            )
    return fitting


def fit_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, source: Source) -> None:
    """Load a module's tensors and put it into evaluation mode; one on the meta device comes to the CPU.

    Raises:
        UserError: see :func:`check_state`; or NaN or infinity.
    """
    fitting = check_state(module, state, path, source)
    for name, value in fitting.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path} holds NaN or infinity in {name}: the file is damaged; get {source.text} again"
            )
    if any(value.is_meta for value in module.state_dict().values()):
        module.to_empty(device="cpu")
    module.load_state_dict(fitting, strict=False)
    module.eval().requires_grad_(False)


def build(make: Callable[[], Any], path: Path) -> Any:
    """What a config.json makes.

    Raises:
        UserError: its numbers make nothing.
    """
    try:
        return make()
    except Exception as error:  # whatever numbers in a config may lead to
        raise UserError(
            f"{path / 'config.json'} cannot be used ({one_line(error)}): get the folder again"
        ) from error


def read_folder(path: Path, source: Source) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], Path]:
    """A folder as transformers saves it.

    Returns:
        config.json, preprocessor_config.json (empty where there is none), the weights, and the file that they came from.

    Raises:
        UserError: a file that is missing or cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the folder with config.json and weights, {source.text}")
    config = read_json(path / "config.json", f"the {source.method} config")
    other = path / "preprocessor_config.json"
    preprocessing = read_json(other, f"the {source.method} preprocessor") if other.exists() else {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).exists():
            return config, preprocessing, read_state(path / name, source), path / name
    raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin: get {source.text}")
