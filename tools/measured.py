"""Prints what the tests measured as a Markdown table: the worst of each number, over all tests of a file.

python -m pytest tests/test_fisher.py ... --junitxml measured.xml && python tools/measured.py measured.xml
"""

import re
import sys
import xml.etree.ElementTree
from collections import defaultdict


def main() -> int:
    """Read the JUnit file named on the command line and print the table."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for case in xml.etree.ElementTree.parse(sys.argv[1]).iter("testcase"):
        file = (case.get("classname") or "").split(".")[-1]
        for entry in case.iter("property"):
            name = entry.get("name") or ""
            dtype = re.search(r"float\d\d", name) or re.search(r"f32|f64", case.get("name") or "")
            what = (
                re.sub(r"\s*torch\.float\d\d|\s\d$", "", re.sub(r" \d( |$)", r"\1", name)).strip() or file[5:]
            )
            kind = {"f32": "float32", "f64": "float64"}.get(dtype[0], dtype[0]) if dtype else "-"
            found[file, what, kind].append(float(entry.get("value") or "nan"))
    print("| tests | what | dtype | worst | of |\n| --- | --- | --- | --- | --- |")
    for (file, what, kind), values in sorted(found.items()):
        worst = min(values) if what.startswith("spearman") else max(values)
        print(f"| {file} | {what} | {kind} | {worst:.2g} | {len(values)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
