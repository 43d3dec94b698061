"""Text and numbers on their way into HTML. Everything that is printed goes through ``esc``."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence

import numpy as np

#: Longest title, id, ... that is printed: beyond it the page would be one track's name.
LABEL_CHARACTERS = 160

#: Longest note, warning or configuration value.
PROSE_CHARACTERS = 2000

NOT_AVAILABLE = "not available"

_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)

# Controls that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# Overrides and embeddings turn text around ("gpj.exe"): shown by name. The marks that Arabic needs stay.
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")

_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029]")


def clean(text: object, limit: int = LABEL_CHARACTERS) -> str:
    """Return ``text`` without what a page must not hold, cut to ``limit`` characters and saying so."""
    line = str(text)
    if len(line) > limit:
        line = f"{line[:limit]}\u2026 [{len(line)} characters]"
    line = _LINE_BREAK.sub("\n", line)
    line = _FORBIDDEN.sub("\ufffd", line)
    return _DIRECTION.sub(lambda match: f"[U+{ord(match.group()):04X}]", line)


def esc(text: object, limit: int = LABEL_CHARACTERS) -> str:
    """Return ``text`` clean and escaped, fit for HTML text and for double-quoted attributes."""
    return html.escape(clean(text, limit), quote=True)


def bdi(text: object, css: str = "", limit: int = LABEL_CHARACTERS) -> str:
    """Return ``text`` in an element of its own direction, so that no title rearranges its neighbours.

    Args:
        text: anything; escaped.
        css: class names, ours and not escaped.
        limit: characters that are printed.
    """
    return f'<bdi class="{css}">{esc(text, limit)}</bdi>' if css else f"<bdi>{esc(text, limit)}</bdi>"


def json_block(value: object) -> str:
    """Return JSON that can stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def power(exponent: int) -> str:
    """Return "10⁻⁶" for -6."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def number(value: float, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits, "not finite" for NaN and infinities."""
    value = float(value)
    if not math.isfinite(value):
        return "not finite"
    if value == 0.0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return _fixed(value, _decimals(value, digits))
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}\u00d7{power(int(exponent))}".replace("-", "\u2212")


def column(values: Sequence[float]) -> list[str]:
    """Return the numbers of a column under one another: the largest has 4 significant digits.

    Where the smallest would keep fewer than 2 digits, each gets 4 of its own instead.
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0.0]
    if not sizes or not 1e-4 <= min(sizes) or not max(sizes) < 1e6:
        return [number(value) for value in values]
    decimals = _decimals(max(sizes), 4)
    if min(sizes) < 9.5 * 10.0**-decimals:
        return [number(value) for value in values]
    return [_fixed(value, decimals) if math.isfinite(value) else number(value) for value in values]


def _decimals(value: float, digits: int) -> int:
    """Return the decimals that show ``digits`` significant digits of ``value``, which is not 0."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _fixed(value: float, decimals: int) -> str:
    """Return ``value`` with ``decimals`` decimals and a true minus sign."""
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def column_texts(values: Sequence[str | float | int | None]) -> list[str]:
    """Return the cells of a table's column as plain text, not yet escaped; floats share their decimals."""
    floats = [value for value in values if isinstance(value, (float, np.floating))]
    shown = iter(column([float(value) for value in floats]))
    return [next(shown) if isinstance(value, (float, np.floating)) else _other(value) for value in values]


def _other(value: object) -> str:
    """Return a cell that is not a float as plain text."""
    if value is None:
        return NOT_AVAILABLE
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))
    return str(value)


def unit_exponent(values: Sequence[float]) -> int:
    """Return the power of ten in which a column is printed: 0, or a multiple of 3 far from 1."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest = max(finite, default=0.0)
    if largest == 0.0 or 1e-2 <= largest < 1e4:
        return 0
    return max(-300, 3 * math.floor(math.log10(largest) / 3))  # 1e300 is still a float, 1e324 is not


def duration(seconds: float) -> str:
    """Return "2:05" or "1:02:05", and "12.3 s" (the space does not break) below a minute."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOT_AVAILABLE
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percentages(parts: Sequence[float]) -> list[str]:
    """Return parts of 1 as percentages that still sum to exactly 100 as printed (largest remainders).

    Args:
        parts: each >= 0, summing to 1; the last one is "everything else" and does not choose the decimals.

    Returns:
        One text a part, without the sign; as many decimals (1 to 4) as two digits of the largest share need.
    """
    largest = max(parts[:-1], default=0.0)
    decimals = 1 if largest <= 0 else min(4, max(1, 1 - math.floor(math.log10(largest * 100))))
    whole = 100 * 10**decimals
    exact = [max(part, 0.0) * whole for part in parts]
    units = [math.floor(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda i: units[i] - exact[i])
    for i in order[: max(0, whole - sum(units))]:
        units[i] += 1
    return [f"{unit / 10**decimals:.{decimals}f}" for unit in units]
