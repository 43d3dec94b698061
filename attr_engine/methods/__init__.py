"""Every way to attribute behind one interface: :data:`METHODS` by name, :func:`parse` from what a user writes."""

from attr_engine.methods import (  # noqa: F401 - these register their methods
    ascent,
    clap,
    cosine,
    features,
    gradients,
    hidden,
    hidden_states,
    mucs,
    networks,
    openl3,
    plugins,
    rps,
    runs,
    trak,
)
from attr_engine.methods.base import METHODS, Entry, Fitted, Method, Workspace, method, option, parse

__all__ = ["METHODS", "Entry", "Fitted", "Method", "Workspace", "method", "option", "parse"]
