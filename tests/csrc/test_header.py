"""Headers: the C++ parser, the Python parser and safetensors, on what a shard holds and on mutations of it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors

from attr_engine.latents import native
from attr_engine.latents.header import parse_header

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not installed")

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8,
         "I64": 8, "U64": 8}  # fmt: skip
WORDS = [
    "{", "}", "[", "]", ",", ":", '"', "\\", "\\u0061", "\\ud800", "\\ud83d\\ude00", "null", "0", "-1", "-0", "1e3",
    "1.0", "00", "true", "NaN", '"a"', "{}", "[]", '"F16"', '"F8"', '"dtype":', '"shape":[', '"__metadata__":{},',
    '"__metadata__":{"a":"b"},', '"__metadata__":null,', "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "1" * 5000, "[" * 3000, " ", "\t", "\n", "\x00", "\x0b", "\ufeff", "\u00e9", "\x7f",
]  # fmt: skip


def make(rng):
    """(header, bytes of data) of a file with tensors of all kinds, in any order."""
    entries, reached = [], 0
    for number in range(int(rng.integers(0, 5))):
        dtype = str(rng.choice(list(SIZES)))
        shape = [int(n) for n in rng.integers(0, 5, int(rng.integers(0, 9)))]
        begin, reached = reached, reached + SIZES[dtype] * int(np.prod(shape, dtype=np.int64))
        value = [("dtype", dtype), ("shape", shape), ("data_offsets", [begin, reached])]
        entries.append((f"tensor {number}", dict([value[i] for i in rng.permutation(3)])))
    if rng.integers(2):
        metadata = {"format": "pt", "attr_engine": '{"a": "\u00e9\\ud83d\\ude00"}'}
        entries.append(("__metadata__", metadata))
    header = dict([entries[i] for i in rng.permutation(len(entries))])
    text = json.dumps(header, ensure_ascii=bool(rng.integers(2)), indent=[None, 1][int(rng.integers(2))])
    return text.encode() + b" " * int(rng.integers(0, 9)), reached


def mutate(text, rng):
    """Flip, insert, delete, copy, swap: mostly one change, so that some stay valid."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 5]))):
        at, to = (int(x) for x in rng.integers(0, len(text) + 1, 2))
        run = int(rng.integers(1, 8))
        kind = rng.integers(7)
        if kind == 0 and at < len(text):
            text = text[:at] + bytes([text[at] ^ 1 << int(rng.integers(8))]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + str(rng.choice(WORDS)).encode() + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + run :]
        elif kind == 3:
            text = text[:to] + text[at : at + run] + text[to:]
        elif kind == 4:
            digits = [i for i, c in enumerate(text) if chr(c).isdigit()]
            if digits:
                at = int(rng.choice(digits))
                text = text[:at] + str(int(rng.integers(10))).encode() + text[at + 1 :]
        elif kind == 5:  # a space where JSON allows one
            places = [i for i, c in enumerate(text) if c in b"{}[],:"]
            at = int(rng.choice(places)) if places else 0
            text = text[:at] + bytes([b" \t\n\r"[int(rng.integers(4))]]) + text[at:]
        else:  # a list of numbers with a size of zero in it
            text = text.replace(b'"shape": [', b'"shape": [0, ' if rng.integers(2) else b'"shape": [1, ', 1)
    return text


def by_python(text, payload):
    try:
        return {k: (e.dtype, list(e.shape), e.begin, e.end) for k, e in parse_header(text, payload).items()}
    except ValueError:
        return None


def by_native(text, payload):
    try:
        entries = native.reader().parse_header(text, payload)
    except ValueError as error:
        assert str(error)
        return None
    return {name: (dtype, list(shape), begin, end) for name, dtype, shape, begin, end in entries}


def opens_in_safetensors(path, text, payload, names):
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(payload))
    try:
        with safetensors.safe_open(path, "pt") as file:
            return set(file.keys()) == set(names)
    except safetensors.SafetensorError:
        return False


def test_what_native_accepts_python_and_safetensors_accept(tmp_path, rng):
    accepted = 0
    for _ in range(6000):
        text, payload = make(rng)
        changed = mutate(text, rng) if rng.integers(10) else text
        entries = by_native(changed, payload)
        other = by_python(changed, payload)
        if entries is not None:
            accepted += 1
            assert other == entries, changed
            assert opens_in_safetensors(tmp_path / "x.safetensors", changed, payload, entries), changed
        elif (
            other is not None
        ):  # a name with an escape, half a surrogate pair, or the zero -0, and nothing else
            assert b"\\" in changed or b"-0" in changed, changed
    assert accepted > 600


@pytest.mark.parametrize(
    "metadata",
    [r'{"a": "\ud800"}', r'{"a": "\ud800\ud800"}', r'{"a": "\udc00"}', r'{"a": "\ud83d\n"}', r'{"a": "\ud83d\u0061"}',
     r'{"a": "1", "\u0061": "2"}', r'{"a": "1", "a": "2"}', r'{"a": 1}', r'{"a": "\x41"}', r'{"a": "\u12"}', "null",
     "[]", '{"a": "\t"}', '{"a": "b",}', '{"a"}'],
)  # fmt: skip
def test_metadata_that_native_refuses(metadata):
    assert by_native(b'{"__metadata__":' + metadata.encode() + b"}", 0) is None


@pytest.mark.parametrize("metadata", [r'{"a": "\ud83d\ude00\u0041\"\\\/\b\f\n\r\t"}', "{}", '{"": "\x7f"}'])
def test_metadata_that_all_accept(metadata, tmp_path):
    text = b'{"__metadata__":' + metadata.encode() + b"}"
    assert by_native(text, 0) == by_python(text, 0) == {}
    assert opens_in_safetensors(tmp_path / "x.safetensors", text, 0, [])


def test_hostile_arguments():
    parse = native.reader().parse_header
    for text, payload, kind in [
        (None, 0, TypeError),
        ("{}", 0, TypeError),
        (b"{}", 2**63, TypeError),
        (b"{}", None, TypeError),
        (b"{}", -1, ValueError),
        (b"", 0, ValueError),
        (np.zeros((2, 2))[:, 0], 0, ValueError),
    ]:
        with pytest.raises(kind):
            parse(text, payload)


def test_more_tensors_than_any_shard_has():
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for count, taken in [(4096, True), (4097, False)]:
        text = "{" + ",".join(entry % i for i in range(count)) + "}"
        assert (by_native(text.encode(), 0) is not None) == taken
