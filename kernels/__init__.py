"""Tensor operations of the engine: they know tensors, not tracks.

``reference`` holds the plain-PyTorch definition of noise, mixing, target, loss and preconditioning. Every other file holds
one operation: its Triton kernel and launcher for a GPU, its plain-PyTorch equal for a CPU, behind one name
of ``torch.library``; ``normal``, ``launch``, ``table`` and ``gate`` serve them. Triton is imported when a kernel is launched, never before.

``precondition`` is the reference's function; the operation in place is ``precondition_``.
"""

from attr_engine.kernels import reference
from attr_engine.kernels.launch import fused
from attr_engine.kernels.noised import noised
from attr_engine.kernels.normal import noise
from attr_engine.kernels.precondition import precondition_
from attr_engine.kernels.project import project, projection
from attr_engine.kernels.query_dot import query_dot, query_dot_low_rank
from attr_engine.kernels.reference import mix, per_draw_loss, philox, precondition, v_target
from attr_engine.kernels.squared_gradient import squared_gradient_
from attr_engine.kernels.v_loss import v_loss

__all__ = [
    "fused",
    "mix",
    "noise",
    "noised",
    "per_draw_loss",
    "philox",
    "precondition",
    "precondition_",
    "project",
    "projection",
    "query_dot",
    "query_dot_low_rank",
    "reference",
    "squared_gradient_",
    "v_loss",
    "v_target",
]
