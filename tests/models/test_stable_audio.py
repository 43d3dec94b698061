"""The adapter gives the model's own numbers, row by row, in every dtype, and says what it cannot use."""

import builtins
import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attr_engine.errors import UserError
from attr_engine.models.protocol import select_parameters
from attr_engine.models.stable_audio import StableAudioDenoiser, create_model, load_model, save_model

FRAMES = 24


@pytest.fixture(scope="module")
def model(config, build):
    return StableAudioDenoiser(build(config()), config())


def inputs(n: int, dtype=torch.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = torch.as_tensor(rng.normal(size=(n, 4, FRAMES)), dtype=dtype)
    return x, torch.as_tensor(rng.uniform(size=n), dtype=dtype)


# -- what the engine reads ------------------------------------------------------------------------


@pytest.mark.parametrize(("autoencoder", "samples"), [(True, 256), (False, 1)])
def test_channels_frames_and_rates_are_those_of_the_config(config, build, autoencoder, samples):
    settings = config(autoencoder=autoencoder)
    model = StableAudioDenoiser(build(settings), settings)
    assert (model.channels, model.frames, model.sample_rate) == (4, FRAMES, 16000)
    assert (model.objective, model.samples_per_frame) == ("v", samples)
    assert model.device == torch.device("cpu")


def test_only_the_denoiser_has_gradients(model):
    assert all(p.requires_grad for p in model.module.parameters())
    assert not any(p.requires_grad for p in model.wrapper.conditioner.parameters())
    assert not any(p.requires_grad for p in model.wrapper.pretransform.parameters())
    assert not any(module.training for module in model.wrapper.modules())


def test_layer_groups_name_the_parameters_that_they_say(model):
    groups = {g: set(select_parameters(model, [g])) for g in (*model.layer_groups, "all")}
    assert groups["cross_attn.to_kv"] and all(
        n.endswith("cross_attn.to_kv.weight") for n in groups["cross_attn.to_kv"]
    )
    assert groups["cross_attn.to_kv"] < groups["cross_attn"] < groups["transformer"] < groups["all"]
    assert groups["self_attn"] and not groups["self_attn"] & groups["cross_attn"]
    assert groups["self_attn"] < groups["transformer"]
    assert groups["all"] == {n for n, _ in model.module.named_parameters()}


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_a_prediction_is_that_of_the_wrapper_itself(config, build, rows, objective):
    wrapper = build(config(objective))
    model = StableAudioDenoiser(wrapper, config(objective))
    x, t = inputs(3)
    with torch.no_grad():
        tensors = wrapper.conditioner(rows, "cpu")
        expected = wrapper(x, t, cond=tensors, cfg_scale=1.0, cfg_dropout_prob=0.0)
        got = model.predict(x, t, model.conditioning(rows))
    assert model.objective == objective
    assert got.shape == x.shape and got.abs().max() > 0
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_there_is_no_dropout_and_no_guidance(model, rows):
    x, t = inputs(3)
    with torch.no_grad():
        a, b = (model.predict(x, t, model.conditioning(rows)) for _ in range(2))
    assert torch.equal(a, b)


# -- dtype ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-4), (torch.bfloat16, 0.05)])
def test_another_dtype_predicts_the_same_to_its_precision(config, build, model, rows, dtype, error):
    other = StableAudioDenoiser(build(config()), config(), dtype)
    assert {p.dtype for p in other.module.parameters()} == {dtype}
    (x, t), (y, s) = inputs(3), inputs(3, dtype)
    with torch.no_grad():
        expected = model.predict(x, t, model.conditioning(rows)).double()
        conditioning = {k: None if v is None else v.to(dtype) for k, v in other.conditioning(rows).items()}
        got = other.predict(y, s, conditioning)
    assert got.dtype == dtype
    assert float((got.double() - expected).norm() / expected.norm()) < error


@pytest.mark.slow
def test_compiled_forward_passes_predict_the_same(config, build, rows):
    plain = StableAudioDenoiser(build(config()), config())
    other = StableAudioDenoiser(build(config()), config(), compiled="forward")
    conditioning = plain.conditioning(rows[:2])
    with torch.no_grad():
        for seed in (0, 1):
            x, t = inputs(2, seed=seed)
            assert torch.allclose(
                other.predict(x, t, conditioning), plain.predict(x, t, conditioning), atol=1e-5
            )
            for model in (plain, other):  # what unlearning writes into the weights is seen
                for p in model.module.parameters():
                    p.mul_(1.01)
    x, t = inputs(2)
    assert other.predict(x, t, conditioning).requires_grad
    assert torch.equal(other.predict(x, t, conditioning), plain.predict(x, t, conditioning))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotary_frequencies_stay_float32_and_the_same_bits(config, build, model, dtype):
    other = StableAudioDenoiser(build(config()), config(), dtype)
    plain = {n: b for n, b in model.module.named_buffers() if n.endswith("inv_freq")}
    kept = {n: b for n, b in other.module.named_buffers() if n.endswith("inv_freq")}
    assert plain and kept.keys() == plain.keys()
    for name, buffer in kept.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, plain[name])


def test_the_dtype_makes_no_difference_to_the_fingerprint_of_the_model(config, build):
    prints = {
        StableAudioDenoiser(build(config()), config(), d).fingerprint for d in (torch.float32, torch.bfloat16)
    }
    assert len(prints) == 1


# -- conditioning ---------------------------------------------------------------------------------


def test_conditioning_is_the_same_bits_alone_and_in_any_batch(config, build, rows):
    def fresh():
        return StableAudioDenoiser(build(config()), config())

    whole = fresh().conditioning(rows)
    assert any(v is not None for v in whole.values())
    for order in ([0], [1], [2], [2, 0], [1, 1, 0, 2]):
        part = fresh().conditioning([rows[i] for i in order])
        for name, value in whole.items():
            assert (part[name] is None) == (value is None)
            if value is not None:
                assert torch.equal(part[name], value[order]), name


def test_conditioning_is_that_of_the_conditioners(model, rows):
    with torch.no_grad():
        expected = model.wrapper.get_conditioning_inputs(model.wrapper.conditioner(rows, "cpu"))
    got = model.conditioning(rows)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (
            got[name] is None
            if value is None
            else torch.allclose(got[name].float(), value.float(), atol=1e-6)
        )


def test_rows_that_differ_in_one_value_are_conditioned_differently(model, rows):
    for change in ({"seconds_total": 9}, {"lead": 5}, {"style": "house"}):
        a, b = model.conditioning(rows[:1]), model.conditioning([{**rows[0], **change}])
        assert any(v is not None and not torch.equal(v, b[k]) for k, v in a.items()), change


def test_what_no_conditioner_reads_makes_no_difference(model, rows):
    a, b = model.conditioning(rows[:1]), model.conditioning([{**rows[0], "title": "x", "more": [1, {}]}])
    assert all(v is None or torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("name", ["seconds_total", "lead", "style"])
def test_a_missing_conditioning_key_is_named(model, rows, name):
    del rows[1][name]
    with pytest.raises(UserError, match=name):
        model.conditioning(rows)


@pytest.mark.parametrize(
    "change",
    [{"seconds_total": "long"}, {"seconds_total": None}, {"seconds_total": {}}, {"lead": "first"}, {"lead": None},
     {"seconds_total": float("nan")}, {"seconds_total": "nan"}],
)  # fmt: skip
def test_a_value_that_a_conditioner_cannot_take_is_named(model, rows, change):
    with pytest.raises(UserError) as caught:
        model.conditioning([{**rows[0], **change}])
    (name, value), *_ = change.items()
    assert f"{name} = {value!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_long_arrays_that_differ_in_one_value_are_not_taken_for_each_other(model):
    from attr_engine.latents.batch import stable_text

    a, b = np.zeros(5000), np.zeros(5000)
    b[2500] = 1
    assert stable_text({"clap": a}) != stable_text({"clap": b})


def test_no_rows_are_no_conditioning(model):
    assert model.conditioning([]) == {}


# -- sampling, encoding, decoding -----------------------------------------------------------------


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_samples_have_the_models_shape_and_the_same_bits_for_one_seed(config, build, rows, objective):
    model = StableAudioDenoiser(build(config(objective)), config(objective))
    first = model.sample(rows, seed=3, steps=3, guidance=2.0)
    assert first.shape == (3, 4, FRAMES) and first.dtype == torch.float32 and not first.requires_grad
    assert torch.isfinite(first).all()
    assert torch.equal(model.sample(rows, seed=3, steps=3, guidance=2.0), first)
    assert not torch.equal(model.sample(rows, seed=4, steps=3, guidance=2.0), first)


def test_a_seed_of_minus_one_is_a_seed_like_any_other(model, rows):
    assert torch.equal(model.sample(rows[:1], seed=-1, steps=2), model.sample(rows[:1], seed=-1, steps=2))


def test_sampling_leaves_the_random_states_and_the_output_alone(model, rows, capfd):
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model.sample(rows, seed=3, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_a_sampling_that_fails_leaves_the_random_state_alone(model, rows):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    with pytest.raises(Exception):  # noqa: B017
        model.sample([{}], seed=3, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_decoding_gives_the_audio_of_the_wrapper(model):
    latents, _ = inputs(2)
    with torch.no_grad():
        expected = model.wrapper.pretransform.decode(latents)
    got = model.decode(latents)
    assert got.shape == (2, 1, FRAMES * 256) and torch.equal(got, expected) and not got.requires_grad


def test_encoding_gives_the_mean_over_the_scale_in_any_dtype(config, build, model):
    audio = torch.as_tensor(np.random.default_rng(0).normal(size=(2, 1, 2048)), dtype=torch.float32)
    with torch.no_grad():
        mean = model.wrapper.pretransform.model.encode(audio, skip_bottleneck=True)[:, :4] / 1.5
    assert torch.equal(model.encode(audio), mean)
    half = StableAudioDenoiser(build(config()), config(), torch.bfloat16)
    assert torch.equal(half.encode(audio), mean)


def test_a_model_without_autoencoder_says_so(config, build):
    settings = config(autoencoder=False)
    model = StableAudioDenoiser(build(settings), settings)
    for call in (
        lambda: model.encode(torch.zeros(1, 1, 256)),
        lambda: model.decode(torch.zeros(1, 4, 2)),
        lambda: model.audio_channels,
    ):
        with pytest.raises(UserError, match="no autoencoder"):
            call()


# -- files ----------------------------------------------------------------------------------------


def test_a_saved_folder_loads_to_the_same_model(config, build, model, rows, tmp_path):
    save_model(build(config()), config(), tmp_path / "folder")
    loaded = load_model(tmp_path / "folder")
    assert loaded.fingerprint == model.fingerprint
    x, t = inputs(3)
    with torch.no_grad():
        assert torch.equal(
            loaded.predict(x, t, loaded.conditioning(rows)), model.predict(x, t, model.conditioning(rows))
        )
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "model.safetensors",
        "model_config.json",
    ]


def change(settings, path, value):
    *parents, last = path
    for name in parents:
        settings = settings[name]
    if value is None:
        del settings[last]
    else:
        settings[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["model_type"], None),
        (["model_type"], "diffusion_uncond"),
        (["model_type"], "poem"),
        (["model"], None),
        (["sample_rate"], None),
        (["sample_size"], None),
        (["sample_size"], "long"),
        (["sample_size"], 100),
        (["sample_size"], -24 * 256),
        (["model", "diffusion"], None),
        (["model", "diffusion", "type"], "unicorn"),
        (["model", "diffusion", "config"], {"depth": "deep"}),
        (["model", "diffusion", "diffusion_objective"], "epsilon"),
        (["model", "io_channels"], "four"),
        (["model", "conditioning", "configs"], [{"id": "x", "type": "telepathy", "config": {}}]),
        (["model", "pretransform"], {"type": "autoencoder", "config": {}}),
        (["model", "pretransform"], {"type": "wish"}),
    ],
)
def test_a_wrong_config_is_refused_by_file_in_one_line(config, build, tmp_path, path, value):
    settings = config()
    save_file({k: v.clone() for k, v in build(settings).state_dict().items()}, tmp_path / "w.safetensors")
    change(settings, path, value)
    (tmp_path / "wrong.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "wrong.json", tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "wrong.json" in message and "\n" not in message


def test_weights_must_be_named_for_a_config_and_are_known_for_a_folder(config, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(config()))
    with pytest.raises(UserError, match=r"c\.json.*give a \.safetensors or \.ckpt"):
        load_model(tmp_path / "c.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder/model_config\.json does not exist"):
        load_model(tmp_path / "folder")
    (tmp_path / "folder" / "model_config.json").write_text(json.dumps(config()))
    with pytest.raises(UserError, match=r"folder/model\.safetensors does not exist"):
        load_model(tmp_path / "folder")


def test_an_unknown_dtype_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="float32, bfloat16, float64"):
        load_model(tmp_path, dtype="float8")


@pytest.mark.parametrize("broken", ["missing", "incompatible"])
def test_without_the_package_the_message_names_the_extra(config, monkeypatch, broken):
    for name in [n for n in sys.modules if n.startswith("stable_audio_tools")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("stable_audio_tools"):
            text = f"No module named {name!r}" if broken == "missing" else "cannot import name 'EMA'"
            raise ImportError(text)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match=r"attr-engine\[stable-audio\]"):
        create_model(config())
