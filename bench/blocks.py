"""Parts of a Markdown file that a command prints, between comments that name it; the text around them is written by hand.

<!-- fisher: python bench/fisher.py --table bench/results/fisher.json -->
...
<!-- end -->
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
_BEGIN = re.compile(r"^<!-- ([\w-]+): python (bench/\w+\.py( .*)?) -->$")


def renewed(text: str, printing: Callable[[str], str] | None = None) -> str:
    """The text with what its commands print now between their comments.

    Args:
        text: Markdown.
        printing: gives what a command prints, the command without ``python``; default :func:`prints`.

    Raises:
        ValueError: a block that does not end, or a name that stands twice.
    """
    out, names, inside = [], list[str](), False
    for line in text.splitlines():
        found = _BEGIN.match(line)
        if inside and found:
            raise ValueError(f"the block {names[-1]!r} does not end: put {END} after it")
        inside = inside and line != END
        if not inside:
            out.append(line)
        if found:
            if found[1] in names:
                raise ValueError(f"two blocks are named {found[1]!r}: name each once")
            names.append(found[1])
            out += ["", (printing or prints)(found[2]).strip(), ""]
            inside = True
    if inside:
        raise ValueError(f"the block {names[-1]!r} does not end: put {END} after it")
    return "\n".join(out) + "\n"


def prints(command: str) -> str:
    """What a script of this folder prints, run in this process (one import of torch for all) from the root of the project.

    Raises:
        RuntimeError: it did not end well.
    """
    script, *arguments = shlex.split(command)
    kept, out = (sys.argv, list(sys.path), Path.cwd()), io.StringIO()
    sys.argv = [script, *arguments]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"python {command} ended with {end.code}") from end
    finally:
        sys.argv, sys.path[:] = kept[0], kept[1]
        os.chdir(kept[2])
    return out.getvalue()
