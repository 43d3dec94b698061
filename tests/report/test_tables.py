from attr_engine.report.data import Table
from attr_engine.report.tables import markdown


def test_a_markdown_table_keeps_its_columns_whatever_its_cells_hold():
    hostile = "a|b\n| c | <script>`*[x](y)_\\"
    text = markdown([Table("t", ["one", "two"], [[hostile, 0.25], [None, 3]], "note")])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    for row in rows:
        unescaped = sum(1 for i, c in enumerate(row) if c == "|" and row[i - 1] != "\\")
        assert unescaped == 3, row
    assert "<script" not in text.replace("\\<", "")
    assert "| 0.25 |" in rows[2] and rows[3] == "|  | 3 |"
