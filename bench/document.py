"""Put what bench/results says into the documentation: tables between their comments, and plots.

    python bench/document.py                    all pages with such tables, and docs/plots, for which stale ones need matplotlib
    python bench/document.py --check            says what is not as the results are, and changes nothing; exit code 1 then
    python bench/document.py docs/evidence.md   only that file

A table is what the command in its comment prints. Every other line is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import blocks  # noqa: E402 - needs the path
import plots  # noqa: E402

PAGES = (
    *("performance.md", "evidence.md", "methods.md", "index.md"),
    *sorted(f"methods/{path.name}" for path in (ROOT / "docs" / "methods").glob("*.md")),
)


def main() -> int:
    """Renew, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files (all that have such tables)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    old = []
    for path in args.pages or [ROOT / "docs" / name for name in PAGES]:
        text = path.read_text(encoding="utf-8")
        new = blocks.renewed(text)
        if new != text:
            old.append(str(path))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    stale = [] if args.pages else plots.stale()
    undrawn = bool(stale) and not args.check and find_spec("matplotlib") is None
    if stale and not args.check and not undrawn:
        plots.draw(stale)
    for name in [*old, *([] if undrawn else map(str, stale))]:
        print(f"{name} {'is not as the results are' if args.check else 'written'}")
    if undrawn:
        names = ", ".join(path.name for path in stale)
        reason = f"matplotlib is not installed, so these plots are not as the results are: {names}"
        print(f"{reason}; pip install '.[figures]'", file=sys.stderr)
    return int(undrawn or (args.check and bool(old or stale)))


if __name__ == "__main__":
    sys.exit(main())
