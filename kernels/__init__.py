"""Tensor operations of the engine: they know tensors, not tracks.

``reference`` holds the plain-PyTorch definition of every operation; the engine calls the names
exported here, so that a faster implementation is a change of this file only.
"""

from attr_engine.kernels.reference import mix, noise, per_draw_loss, precondition, v_target

__all__ = ["mix", "noise", "per_draw_loss", "precondition", "v_target"]
