"""Vectors, functions and ONNX models of the user's own: the same scores, or one sentence."""

import json
import sys
import types

import numpy as np
import pytest
from audio_sets import RATE, audio_tracks

from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.methods import Workspace, parse
from attr_engine.methods.plugins import onnx_embedder


def save_rows(folder, ids, values) -> str:
    folder.mkdir(exist_ok=True)
    np.save(folder / "rows.npy", values)
    (folder / "ids.json").write_text(json.dumps(list(ids)))
    return f"embedding:path={folder / 'rows.npy'}"


def test_vectors_in_a_file_are_compared_by_cosine(rng, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "a", [0.1] * 5)
    queries = audio_tracks(rng, tmp_path / "b", [0.1] * 3, "q")
    rows = {name: rng.normal(size=6) for name in ["other", *tracks.ids, *queries.ids]}
    text = save_rows(tmp_path, rows, np.stack(list(rows.values())))
    fitted = parse(text)[1].fit(None, tracks, Workspace(tmp_path / "work"))
    found = fitted.score([Query(queries, 2, ""), Query(tracks, 3, ""), Query(queries, 0, "", "g", (0, 1))])

    def cosine(a: str, b: str) -> float:
        return float(rows[a] @ rows[b] / np.sqrt(rows[a] @ rows[a]) / np.sqrt(rows[b] @ rows[b]))

    expected = [
        [cosine(queries.ids[2], t) for t in tracks.ids],
        [cosine(tracks.ids[3], t) for t in tracks.ids],
        [max(cosine(queries.ids[0], t), cosine(queries.ids[1], t)) for t in tracks.ids],
    ]
    assert found.shape == (3, 5) and np.abs(found - expected).max() < 1e-6
    np.testing.assert_array_equal(fitted.score([Query(tracks, 3, "")])[0], found[1])


def test_files_that_cannot_be_are_named(rng, tmp_path):
    tracks, queries = (
        audio_tracks(rng, tmp_path / "a", [0.1] * 2),
        audio_tracks(rng, tmp_path / "b", [0.1], "q"),
    )
    work = Workspace(tmp_path / "work")
    method = parse(save_rows(tmp_path / "x", tracks.ids, rng.normal(size=(2, 3))))[1]
    with pytest.raises(UserError, match=f"no row for the track '{queries.ids[0]}'"):
        method.fit(None, tracks, work).score([Query(queries, 0, "")])
    np.save(tmp_path / "x" / "rows.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="Python objects.*without pickle"):
        method.fit(None, tracks, work)


@pytest.fixture
def module(monkeypatch, tmp_path):
    """A module of the user's, with a function of windows."""
    path = tmp_path / "users_own.py"
    path.write_text(
        "import numpy as np\n"
        "def mean(windows, rate):\n"
        "    return np.stack([windows.mean(1), windows.std(1), windows[:, 0], windows[:, -1]], axis=1)\n"
        "def short(windows, rate):\n    return windows.mean(1)\n"
        "def broken(windows, rate):\n    raise RuntimeError('no\\nluck')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_own"
    sys.modules.pop("users_own", None)


def test_a_function_embeds_windows(rng, tmp_path, module):
    tracks = audio_tracks(rng, tmp_path / "a", [0.3, 0.5, 0.8])
    text = f"embedding:callable={module}:mean,rate={RATE},window=0.2,hop=0.1"
    fitted = parse(text)[1].fit(None, tracks, Workspace(tmp_path / "work"))
    assert fitted.cut.window == 0.2 and fitted.cut.hop == 0.1
    first = tracks.audio[1][:1600].astype(np.float64)
    row = np.array([first.mean(), first.std(), first[0], first[-1]])
    mine = fitted.windows.vectors[fitted.windows.bounds[1]]
    assert np.abs(mine - row / np.sqrt(row @ row)).max() < 1e-4
    assert fitted.score([Query(tracks, 2, "")]).argmax() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs one of path="),
        ("path=a.npy,onnx=b.onnx", "needs one of path="),
        ("callable=users_own", "write package.module:function"),
        ("callable=users_own:nothing", "cannot be imported .*PYTHONPATH"),
        ("callable=there_is_no_such:f", "cannot be imported .*PYTHONPATH"),
        ("callable=users_own:short", "it has to give one row a window"),
        ("callable=users_own:broken", r"users_own:broken failed on 1 windows of 40000 samples \(no luck\)"),
        ("callable=users_own:mean,rate=0", "a rate of 0 Hz cannot be"),
        ("callable=users_own:mean,window=9", "lasts 0.5 s, a window 9 s"),
        ("callable=users_own:mean,short=zero", "use repeat or refuse"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(rng, tmp_path, module, options, message):
    tracks = audio_tracks(rng, tmp_path / "a", [0.5])
    rate = "" if "rate" in options else f"rate={RATE}"
    with pytest.raises(UserError, match=message):
        parse(f"embedding:{options},{rate}")[1].fit(None, tracks, Workspace(tmp_path / "work"))


def test_another_version_or_source_embeds_anew(module, tmp_path):
    from attr_engine.methods.plugins import function_embedder

    one = function_embedder(f"{module}:mean", RATE, "")
    assert one.fingerprint == function_embedder(f"{module}:mean", RATE, "").fingerprint
    others = [
        function_embedder(f"{module}:mean", RATE, "2"),
        function_embedder(f"{module}:mean", 2 * RATE, ""),
    ]
    path = tmp_path / "users_own.py"
    path.write_text(path.read_text() + "\n# changed\n")
    others.append(function_embedder(f"{module}:mean", RATE, ""))
    assert len({one.fingerprint, *(x.fingerprint for x in others)}) == 4


class FakeSession:
    """A model of one input, as onnxruntime shows it."""

    inputs: list = []

    def __init__(self, data: bytes, providers: list[str]) -> None:
        if data != b"model":
            raise RuntimeError("it is\nno model")

    def get_inputs(self) -> list:
        return self.inputs

    def run(self, outputs, feeds):
        (windows,) = feeds.values()
        return [windows[:, :3]]


def test_models_of_another_shape_are_refused(rng, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=FakeSession))
    path = tmp_path / "m.onnx"
    with pytest.raises(UserError, match="there is no ONNX model"):
        onnx_embedder(path, RATE)
    path.write_bytes(b"something")
    with pytest.raises(UserError, match=r"cannot be read as an ONNX model \(it is no model\)"):
        onnx_embedder(path, RATE)
    path.write_bytes(b"model")

    def given(*inputs):
        FakeSession.inputs = [
            types.SimpleNamespace(name="x", type=kind, shape=shape) for kind, shape in inputs
        ]

    one = ("tensor(float)", ["n", 4000])
    for bad in (
        [("tensor(float)", [1, 4000])],
        [("tensor(double)", ["n", 4000])],
        [("tensor(float)", ["n", 1, 4000])],
        [one, one],
        [],
    ):
        given(*bad)
        with pytest.raises(UserError, match=r"export it with one input of float \[n, samples\]"):
            onnx_embedder(path, RATE)
    given(one)
    embedder = onnx_embedder(path, RATE)
    assert (embedder.window, embedder.hop) == (0.5, 0.25)
    windows = rng.normal(size=(2, 4000)).astype(np.float32)
    np.testing.assert_array_equal(embedder.embed(windows), windows[:, :3])
    with pytest.raises(UserError, match="takes windows of 4000 samples, these have 100: use window=0.5"):
        embedder.embed(windows[:, :100])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'attr-engine\[onnx\]'"):
        onnx_embedder(path, RATE)


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer: a number, or bytes."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def linear_model(weights: np.ndarray) -> bytes:
    """ONNX of ``y = x W`` for x float32 ``[n, samples]``, by the fields of onnx.proto."""

    def tensor(name: str, *dims: str | int) -> bytes:
        shape = b"".join(field(1, field(1, d) if isinstance(d, int) else field(2, d.encode())) for d in dims)
        return field(1, name.encode()) + field(2, field(1, field(1, 1) + field(2, shape)))

    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"MatMul")
    dims = b"".join(field(1, d) for d in weights.shape)
    constant = dims + field(2, 1) + field(8, b"w") + field(9, weights.astype("<f4").tobytes())
    graph = field(1, node) + field(2, b"g") + field(5, constant)
    graph += field(11, tensor("x", "n", weights.shape[0])) + field(12, tensor("y", "n", weights.shape[1]))
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13))


def test_an_onnx_model_embeds_windows(rng, tmp_path):
    pytest.importorskip("onnxruntime")
    tracks, weights = audio_tracks(rng, tmp_path / "a", [0.3, 0.5, 0.8]), rng.normal(size=(800, 5))
    (tmp_path / "m.onnx").write_bytes(linear_model(weights))
    fitted = parse(f"embedding:onnx={tmp_path / 'm.onnx'},rate={RATE}")[1].fit(
        None, tracks, Workspace(tmp_path / "work")
    )
    assert fitted.cut.window == 0.1 and fitted.cut.hop == 0.05
    row = tracks.audio[2][:800].astype(np.float64) @ weights.astype(np.float32)
    mine = fitted.windows.vectors[fitted.windows.bounds[2]]
    assert np.abs(mine - row / np.sqrt(row @ row)).max() < 1e-5
    (tmp_path / "m.onnx").write_bytes(linear_model(weights)[:-40])
    with pytest.raises(UserError, match="cannot be read as an ONNX model"):
        onnx_embedder(tmp_path / "m.onnx", RATE)
