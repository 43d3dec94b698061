"""The same rows through other libraries, where they are installed: `python bench/methods_against_libraries.py` makes such a place."""

import json
import sys
from pathlib import Path

import pytest

for _package in ("captum", "dattri", "kronfluence", "trak"):
    pytest.importorskip(_package)


def test_methods_give_what_other_libraries_give(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "bench"), *sys.path])
    import methods_against_libraries as comparison

    agreed = comparison.compare(seed % 2**31, tmp_path / "result.json")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert agreed, rows
    assert len([r for r in rows if "max_relative_difference" in r]) == 7
