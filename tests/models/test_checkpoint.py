"""Weights come from files that anyone may have made: all of them arrive, or the file is refused by name; no code runs."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from attr_engine.errors import UserError
from attr_engine.models import checkpoint
from attr_engine.models.checkpoint import fingerprint, load_into, read_json, read_weights, unwrap
from attr_engine.models.stable_audio import load_model, quiet


@pytest.fixture
def files(tmp_path, config, build):
    """The config of a model in a file, its wrapper, and a writer of weights files."""
    settings = config()
    (tmp_path / "model.json").write_text(json.dumps(settings))
    wrapper = build(settings)

    def save(name: str, content):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({k: v.clone() for k, v in content.items()}, path)
        else:
            torch.save(content, path)
        return path

    return tmp_path / "model.json", wrapper, save


def same(model, state) -> bool:
    got = model.wrapper.state_dict()
    return got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- where weights come from ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.pt", "w.pth"])
def test_plain_weights_of_every_kind_of_file_arrive(files, name):
    path, wrapper, save = files
    state = wrapper.state_dict()
    assert same(load_model(path, save(name, state)), state)


def test_weights_under_state_dict_arrive_with_other_things_beside_them(files):
    path, wrapper, save = files
    content = {
        "state_dict": wrapper.state_dict(),
        "epoch": 3,
        "optimizer_states": [{"lr": 0.1}],
        "note": "text",
    }
    assert same(load_model(path, save("w.ckpt", content)), wrapper.state_dict())


def test_the_prefix_of_data_parallel_is_stripped(files):
    path, wrapper, save = files
    state = {f"module.{k}": v for k, v in wrapper.state_dict().items()}
    assert same(load_model(path, save("w.safetensors", state)), wrapper.state_dict())


def test_half_precision_weights_become_float32(files):
    path, wrapper, save = files
    state = {k: v.half() if v.is_floating_point() else v for k, v in wrapper.state_dict().items()}
    model = load_model(path, save("w.safetensors", state))
    assert all(p.dtype == torch.float32 for p in model.module.parameters())
    assert same(model, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def test_a_real_training_checkpoint_loses_nothing(files, config, build):
    """Averaged weights replace those of the denoiser, and only those, if they are wanted."""
    pytest.importorskip("pytorch_lightning")
    with quiet():
        from stable_audio_tools.training.diffusion import DiffusionCondTrainingWrapper

        training = DiffusionCondTrainingWrapper(build(config()), lr=1e-4, use_ema=True)
    with torch.no_grad():
        for p in training.diffusion_ema.ema_model.parameters():
            p.mul_(0.5)
    path, _, save = files
    full, plain = training.state_dict(), training.diffusion.state_dict()
    averaged = training.diffusion_ema.ema_model.state_dict()
    weights = save("w.ckpt", {"state_dict": full, "global_step": 7})
    assert same(load_model(path, weights, ema=False), plain)
    got = load_model(path, weights, ema=True).wrapper.state_dict()
    assert averaged and {f"model.{k}" for k in averaged} == {k for k in got if k.startswith("model.")}
    for name in got:
        source = averaged[name.removeprefix("model.")] if name.startswith("model.") else plain[name]
        assert torch.equal(got[name], source), name
    used = {f"diffusion.{k}" for k in plain} | {f"diffusion_ema.ema_model.{k}" for k in averaged}
    rest = {k for k in full if k not in used}
    assert all(k.startswith(("diffusion_ema.", "losses.")) for k in rest), rest

    no_averages = {k: v for k, v in full.items() if not k.startswith("diffusion_ema.")}
    assert same(load_model(path, save("w.ckpt", {"state_dict": no_averages}), ema=True), plain)

    unknown = {**full, "diffusion_ema.ema_model.more": torch.ones(1)}
    assert "model.more" in refusal(load_model, path, save("w.ckpt", {"state_dict": unknown}))


def test_averages_that_lack_a_weight_leave_the_plain_one():
    state = {"diffusion.model.a": torch.ones(1), "diffusion.model.b": torch.ones(1),
             "diffusion_ema.ema_model.a": torch.zeros(1), "diffusion_ema.step": torch.ones(())}  # fmt: skip
    assert {k: float(v) for k, v in unwrap(state, True).items()} == {"model.a": 0.0, "model.b": 1.0}
    assert {k: float(v) for k, v in unwrap(state, False).items()} == {"model.a": 1.0, "model.b": 1.0}


# -- hostile and damaged files --------------------------------------------------------------------


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth"])
def test_a_checkpoint_with_code_is_refused_and_the_code_not_run(tmp_path, suffix, legacy):
    path = tmp_path / f"evil.{suffix}"
    content = {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": Code(tmp_path / "executed")}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(read_weights, path)
    assert f"evil.{suffix}" in message and "safetensors" in message
    path.write_bytes(pickle.dumps(content["hyper_parameters"]))
    refusal(read_weights, path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_named_safetensors_is_refused_and_not_run(tmp_path):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Code(tmp_path / "executed")))
    assert "evil.safetensors" in refusal(read_weights, path)
    assert not (tmp_path / "executed").exists()


def test_a_torch_that_runs_code_in_spite_of_weights_only_is_refused(tmp_path, monkeypatch):
    """CVE-2025-32434: before 2.6 ``weights_only=True`` could be made to run code."""
    path = tmp_path / "w.ckpt"
    torch.save({"a": torch.ones(1)}, path)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    assert "2.6" in refusal(read_weights, path)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    assert list(read_weights(path)) == ["a"]


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(100), b"\xff" * 64])
def test_a_file_of_garbage_is_refused_by_name(tmp_path, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    assert f"bad.{suffix}" in refusal(read_weights, path)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_cut_file_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    state = {"a": torch.ones(100), "b": torch.ones(3)}
    if suffix == "ckpt":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size])
        assert f"cut.{suffix}" in refusal(read_weights, path)


def test_an_archive_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "w.ckpt" in refusal(read_weights, tmp_path / "w.ckpt")


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}}, {"state_dict": 3}, [torch.ones(1)], {"a": 1}, torch.ones(3), 7]
)
def test_a_checkpoint_without_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.ckpt")
    assert "w.ckpt" in refusal(read_weights, tmp_path / "w.ckpt")


def test_a_missing_file_a_folder_and_an_unknown_ending_are_refused_by_name(tmp_path):
    assert "nowhere.ckpt does not exist" in refusal(read_weights, tmp_path / "nowhere.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    assert "folder.ckpt" in refusal(read_weights, tmp_path / "folder.ckpt")
    (tmp_path / "w.bin").write_bytes(b"x")
    assert "'.bin'" in refusal(read_weights, tmp_path / "w.bin")


# -- weights that do not fit ----------------------------------------------------------------------


def test_a_missing_weight_is_named(files):
    path, wrapper, save = files
    state = wrapper.state_dict()
    name = next(k for k in state if k.startswith("conditioner."))
    del state[name]
    message = refusal(load_model, path, save("w.safetensors", state))
    assert name in message and "w.safetensors" in message


def test_an_extra_weight_is_named(files):
    path, wrapper, save = files
    state = {**wrapper.state_dict(), "model.surplus": torch.ones(1)}
    assert "model.surplus" in refusal(load_model, path, save("w.safetensors", state))


def test_a_weight_of_another_shape_is_named_with_both_shapes(files):
    path, wrapper, save = files
    state = wrapper.state_dict()
    name = next(k for k, v in state.items() if k.startswith("model.") and v.ndim == 2)
    shape = list(state[name].shape)
    state[name] = torch.zeros(shape[0] + 1, shape[1])
    message = refusal(load_model, path, save("w.safetensors", state))
    assert name in message and str(shape) in message and str([shape[0] + 1, shape[1]]) in message


def test_many_missing_weights_are_counted(files):
    path, wrapper, save = files
    state = {k: v for k, v in wrapper.state_dict().items() if not k.startswith("model.")}
    count = len(wrapper.state_dict()) - len(state)
    assert f"and {count - 3} more" in refusal(load_model, path, save("w.safetensors", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(files, value):
    path, wrapper, save = files
    state = {k: v.clone() for k, v in wrapper.state_dict().items()}
    name = [k for k, v in state.items() if v.is_floating_point()][-1]
    state[name].view(-1)[0] = value
    message = refusal(load_model, path, save("w.safetensors", state))
    assert name in message and "NaN or infinity" in message


def test_a_model_is_not_half_loaded_when_something_is_wrong(config, build):
    target, other = build(config(), seed=1), build(config(), seed=2).state_dict()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    del other[next(iter(other))]
    refusal(load_into, target, other, "w.ckpt")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_weights_without_the_autoencoder_make_a_model_without_one(files):
    path, wrapper, save = files
    state = {k: v for k, v in wrapper.state_dict().items() if not k.startswith("pretransform.")}
    weights = save("w.safetensors", state)
    models = [load_model(path, weights) for _ in range(2)]
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].frames == 24 and models[0].samples_per_frame == 256
    for call in (lambda m: m.encode(torch.zeros(1, 1, 512)), lambda m: m.decode(torch.zeros(1, 4, 2))):
        assert "no autoencoder" in refusal(call, models[0])


def test_a_part_of_the_autoencoder_is_not_enough(files):
    path, wrapper, save = files
    state = wrapper.state_dict()
    name = next(k for k in state if k.startswith("pretransform."))
    del state[name]
    assert name in refusal(load_model, path, save("w.safetensors", state))


# -- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_a_broken_config_is_refused_by_name(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    message = refusal(read_json, tmp_path / "c.json", "model config")
    assert message.startswith("model config") and "c.json" in message


def test_a_missing_config_is_refused_by_name(tmp_path):
    assert "nowhere.json does not exist" in refusal(read_json, tmp_path / "nowhere.json", "model config")
    assert "nowhere" in refusal(load_model, tmp_path / "nowhere", None)


# -- fingerprint ----------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_any_weight_and_with_the_config(config, build):
    wrapper = build(config())
    first = fingerprint(wrapper, config())
    assert fingerprint(build(config()), config()) == first
    assert fingerprint(wrapper, {**config(), "sample_rate": 44100}) != first
    assert fingerprint(build(config(), seed=1), config()) != first
    for name, value in wrapper.state_dict().items():
        if value.is_floating_point():
            kept = value.view(-1)[-1].clone()
            value.view(-1)[-1] += 1.0
            assert fingerprint(wrapper, config()) != first, name
            value.view(-1)[-1] = kept
    assert fingerprint(wrapper, config()) == first


def test_the_file_makes_no_difference_to_the_fingerprint(files):
    path, wrapper, save = files
    a = load_model(path, save("a.safetensors", wrapper.state_dict()))
    b = load_model(
        path, save("b.ckpt", {"state_dict": {f"diffusion.{k}": v for k, v in wrapper.state_dict().items()}})
    )
    assert a.fingerprint == b.fingerprint == checkpoint.fingerprint(wrapper, a.config)
