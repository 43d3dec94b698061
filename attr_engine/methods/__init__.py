"""Every way to attribute behind one interface: :data:`METHODS` by name, :func:`parse` from what a user writes."""

from attr_engine.methods import runs as _runs  # noqa: F401 - registers its methods
from attr_engine.methods.base import METHODS, Entry, Fitted, Method, Workspace, method, option, parse

__all__ = ["METHODS", "Entry", "Fitted", "Method", "Workspace", "method", "option", "parse"]
