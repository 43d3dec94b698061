"""Tables of long commands are kept without what is of the machine, and printed with their intervals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kept(*arguments):
    command = [sys.executable, str(ROOT / "bench" / "kept.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


CELL = {"layers": "all", "mask_update": True, "mask_score": False, "mean_rank": 1.5, "mean_rank_low": 1.0, "mean_rank_high": 2.25,
        "worst_rank": 3.0, "top_similarity": 0.12345, "bottom_similarity": -0.5, "frechet": None, "run": "abc"}  # fmt: skip
TABLE = {"title": "One", "columns": ["method", "LDS", "low", "high", "seconds"], "rows": [["a", 0.5, 0.25, 0.75, 3], ["b", "", "", "", 4]],
         "note": "Two methods."}  # fmt: skip
ROW = {"forget": [1.0, 0.5, 1.5], "remain": [0.5, 0.5, 0.5], "held_out": None, "similarity_forget": [0.1, 0.0, 0.2],
       "similarity_remain": [0.0, 0.0, 0.0], "frechet": 246.91}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        ({"settings": {"model": "/home/me/model"}, "targets": [1, 2], "frechet_untouched": 12.34, "cells": [CELL]},
         ["2 targets; Frechet distance of the untouched model: 12.3.", "| all | on | off | 1.5 (1 to 2.25) | 3 | 0.123 | -0.5 |  |"]),
        ([TABLE], ["Two methods.", "| method | LDS | seconds |", "| a | 0.5 (0.25 to 0.75) | 3 |", "| b |  | 4 |"]),
        ({"settings": {"model": "/home/me/model"}, "tables": [TABLE]}, ["| a | 0.5 (0.25 to 0.75) | 3 |"]),
        ({"settings": {"method": "mucs"}, "rows": [{"strength": 0.0, **ROW}, {"strength": 0.8, **ROW}]},
         ["| untouched | 1 (0.5 to 1.5) | 0.5 (0.5 to 0.5) |  | 0.1 (0 to 0.2) | 0 (0 to 0) | 246.9 |", "| mucs 0.8 | 1 (0.5 to 1.5)"]),
    ],
    ids=["grid", "list of tables", "tables", "forget"],
)  # fmt: skip
def test_what_a_command_wrote_is_kept_and_printed(found, lines, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(found))
    done = kept("--keep", tmp_path / "in.json", "--command", "attr-engine x", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text)["command"] == "attr-engine x" and "/home/me" not in text
    printed = kept(tmp_path / "out.json").stdout
    for line in lines:
        assert line in printed
    assert kept(tmp_path / "out.json", "--only", "no such title").stdout.strip() == ""


def test_what_is_not_known_is_refused(tmp_path):
    (tmp_path / "in.json").write_text("{}")
    done = kept("--keep", tmp_path / "in.json", "--command", "x", "--out", tmp_path / "out.json")
    assert done.returncode == 1 and "in.json is of none of the commands" in done.stderr
    assert not (tmp_path / "out.json").exists()
    assert kept().returncode == 2
