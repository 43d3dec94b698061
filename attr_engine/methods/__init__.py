"""Every way to attribute behind one interface: :data:`METHODS` by name, :func:`parse` from what a user writes."""

from attr_engine.methods import ascent as _ascent  # noqa: F401 - registers its methods
from attr_engine.methods import gradients as _gradients  # noqa: F401 - these register their methods
from attr_engine.methods import hidden as _hidden  # noqa: F401
from attr_engine.methods import mucs as _mucs  # noqa: F401 - registers its method
from attr_engine.methods import rps as _rps  # noqa: F401
from attr_engine.methods import runs as _runs  # noqa: F401
from attr_engine.methods import trak as _trak  # noqa: F401
from attr_engine.methods.base import METHODS, Entry, Fitted, Method, Workspace, method, option, parse

__all__ = ["METHODS", "Entry", "Fitted", "Method", "Workspace", "method", "option", "parse"]
