"""What is installed, what is missing, and what a missing part costs."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from importlib import metadata

from attr_engine.latents import native

# module, distribution, extra, what is lost without it
_PARTS = (
    ("torch", "torch", "", "nothing works"),
    ("numpy", "numpy", "", "nothing works"),
    ("safetensors", "safetensors", "", "nothing works"),
    ("pyarrow", "pyarrow", "", "no data sets, no score tables"),
    ("tqdm", "tqdm", "", "no progress bars"),
    ("soundfile", "soundfile", "audio", "no audio in, no compressed players in the report"),
    ("soxr", "soxr", "audio", "no audio in"),
    (
        "stable_audio_tools",
        "stable-audio-tools",
        "stable-audio",
        "no stable-audio-tools models, no training, no demo; own denoisers work",
    ),
    ("triton", "triton", "triton", "no kernels on a GPU; plain PyTorch is used"),
    ("matplotlib", "matplotlib", "", "no attr-engine figures"),
    ("laion_clap", "laion-clap", "clap", "no CLAP embeddings"),
)


def _part(module: str, distribution: str, extra: str, lost: str) -> str:
    hint = f" (pip install 'attr-engine[{extra}]')" if extra else ""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"missing  {distribution}: {lost}{hint}"
    if module == "laion_clap":  # its import reaches for a model hub
        return f"ok       {distribution} {version} (not imported here)"
    try:
        from attr_engine.models.stable_audio import quiet

        with quiet():
            importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        return f"broken   {distribution} {version}: {type(error).__name__}: {str(error).splitlines()[0]}; {lost}{hint}"
    return f"ok       {distribution} {version}"


def examine() -> str:
    """The findings, a line each."""
    import torch

    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [_part(*part) for part in _PARTS]
    if native.available():
        lines.append("ok       C++ extension: latents are read, checked and cast in C++")
    else:
        lines.append(
            "missing  C++ extension: latents are read in Python, slower, with the same results (g++ and Python headers, then reinstall)"
        )
    if torch.cuda.is_available():
        lines.append(f"ok       GPU {torch.cuda.get_device_name(0)}")
    else:
        lines.append(
            f"missing  GPU: everything runs on {torch.get_num_threads()} CPU threads; too slow for a billion parameters"
        )
    free, memory = shutil.disk_usage(".").free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines.append(
        f"note     {memory / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB free on the disk of this folder"
    )
    if sys.version_info >= (3, 12):
        lines.append("note     stable-audio-tools 0.0.19 pins numpy 1.23.5 and needs Python 3.10 or 3.11")
    return "\n".join(lines)
