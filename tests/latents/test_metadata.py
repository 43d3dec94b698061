"""Metadata come through as they stand in the file, or the file is refused with the row that is wrong."""

import json

import pytest

from attr_engine.errors import UserError
from attr_engine.latents.metadata import conditioning_of, read_metadata

HOSTILE = [
    "<script>alert(1)</script>", 'say "hello", twice', "a\nb", "  spaces  ", "=cmd|' /C calc'!A0", "\u202egpj.wav",
    "日本語 🎵", "\x1b[31mred", "'; DROP TABLE tracks; --", "../../etc/passwd", "NaN", "null", "007", "1_000", "1e5",
    "１２", "0x10", "True", "-0", "1.10",
]  # fmt: skip


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_metadata(path, **options)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.fixture
def table(tmp_path):
    """Write a metadata file and return its path."""

    def write(content, name="tracks.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_csv_with_or_without_bom_is_read_by_path(table, bom, newline):
    path = table(bom + newline.join([b"path,title", b"a.wav,One", b"./b/c.wav,Two", b""]))
    assert read_metadata(path) == {
        "a.wav": {"path": "a.wav", "title": "One"},
        "b/c.wav": {"path": "./b/c.wav", "title": "Two"},
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_csv_is_kept_verbatim(table, text):
    quoted = text.replace('"', '""')
    rows = read_metadata(table(f'path,title,artist\na.wav,"{quoted}",x\n'))
    assert rows["a.wav"]["title"] == text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_json_is_kept_verbatim(table, text):
    expected = {"a.wav": {"path": "a.wav", "title": text}}
    assert read_metadata(table(json.dumps([{"path": "a.wav", "title": text}]), "x.json")) == expected
    assert read_metadata(table(json.dumps({"a.wav": {"title": text}}), "y.JSON")) == expected


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1", "-2", "+3"], [1, -2, 3]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (["120", " 90 "], [120, 90]),
        (["1", ""], [1, ""]),
        (["1999", "Prince"], ["1999", "Prince"]),
        (["1", "nan"], ["1", "nan"]),
        (["1", "inf"], ["1", "inf"]),
        (["1", "1e999"], ["1", "1e999"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["9" * 25, "2"], [1e25, 2.0]),
        (["9" * 5000, "2"], ["9" * 5000, "2"]),
        (["１２", "2"], ["１２", "2"]),
    ],
)
def test_a_named_column_is_numeric_where_all_of_it_is_and_another_stays_text(table, texts, values):
    lines = "".join(f"{i}.wav,{text},{text}\n" for i, text in enumerate(texts))
    rows = read_metadata(table("path,tempo,title\n" + lines), numbers=["tempo", "absent"])
    assert [row["tempo"] for row in rows.values()] == values
    assert [type(row["tempo"]) for row in rows.values()] == [type(value) for value in values]
    assert [row["title"] for row in rows.values()] == texts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("title,artist\nOne,x\n", "row 1 has no 'path'.*'title'"),
        ("path,title\na.wav,x\n,y\n", "row 2 has no 'path'"),
        ("path;title\na.wav;x\n", "no 'path'"),
        ("path,title\na.wav,x\nb.wav,y\n./a.wav,z\n", "'./a.wav' stands twice"),
        ("path,title\na.wav,One, with a comma\n", "line 2 has more fields"),
        ('path,title\na.wav,"no end\nb.wav,x\n', "cannot be read"),
        ("path,title\na.wav," + "x" * (1 << 20) + "x\n", "field larger"),
        (b"path,title\na.wav,\xff\xfe\n", "UTF-8"),
        ("path,title\na.wav,x\n".encode("utf-16"), "cannot be read"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused_by_row(table, content, says):
    import re

    assert re.search(says, refusal(table(content)), re.DOTALL)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "17", "null", '"text"', "[1]", '[["path", "a.wav"]]', '{"a.wav": 3}', '[{"title": "x"}]', '[{"path": ""}]',
        '[{"path": "a.wav"}, {"path": "a.wav"}]', '{"a.wav": {}, "a.wav": {}}', '[{"path": "a", "x": 1, "x": 2}]',
        "[" * 100_000, '[{"path": "a", "x": ' + "9" * 5000 + "}]", b"\xff\xff",
    ],
)  # fmt: skip
def test_json_that_cannot_be_meant_is_refused(table, content):
    refusal(table(content, "tracks.json"))


def test_a_field_as_long_as_the_limit_is_read(table):
    text = "x" * ((1 << 20) - 1)
    assert read_metadata(table(f"path,title\na.wav,{text}\n"))["a.wav"]["title"] == text


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refusal(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    refusal(tmp_path / "folder.csv")


def test_a_file_of_more_than_a_gigabyte_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.csv"
    with open(path, "wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: takes no space
    assert "larger than 1 GiB" in refusal(path)


def test_an_empty_table_has_no_rows(table):
    assert (
        read_metadata(table(""))
        == read_metadata(table("path,title\n"))
        == read_metadata(table("[]", "a.json"))
        == {}
    )


def test_conditioning_is_taken_by_name_and_zero_and_false_count():
    row = {"path": "a", "tempo": 0, "vocal": False, "key": "C"}
    assert conditioning_of(row, ["tempo", "vocal"], "a") == {"tempo": 0, "vocal": False}
    assert conditioning_of({}, [], "a") == {}


@pytest.mark.parametrize("row", [{}, {"tempo": ""}, {"tempo": None}])
def test_missing_conditioning_is_refused_by_track_and_name(row):
    with pytest.raises(UserError, match="'a.wav' has no metadata 'tempo'"):
        conditioning_of(row, ["tempo"], "a.wav")
