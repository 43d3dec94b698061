"""CLMR, CLEWS, MERT and MuQ embed as published, from files in the published format; what is not such a file is refused."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attr_engine import UserError
from attr_engine.methods import METHODS, parse
from attr_engine.methods.checkpoints import SOURCES
from attr_engine.methods.hidden_states import mert_embedder, muq_embedder
from attr_engine.methods.networks import ClewsNet, SampleCNN, clews_embedder, clmr_embedder


def randomise(module, seed):
    """Fill every parameter and running statistic, so that no branch is silent."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(0, 1 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1)
    return module.eval()


def clmr_state(seed):
    return randomise(SampleCNN(), seed).state_dict()


def lightning(state, lead="model.encoder."):
    """A checkpoint as Lightning writes it: the encoder twice, a projector, numbers of the trainer."""
    named = {lead + k: v for k, v in state.items()}
    return {
        "epoch": 3,
        "pytorch-lightning_version": "1.1.0",
        "state_dict": {
            **named,
            "encoder.fc.weight": torch.ones(2),
            "model.projector.0.weight": torch.ones(2, 2),
        },
        "best": np.float64(0.5),
    }


def normalised(x, s, name):
    scale = s[f"{name}.weight"] / (s[f"{name}.running_var"] + 1e-5).sqrt()
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - s[f"{name}.running_mean"].view(shape)) * scale.view(shape) + s[f"{name}.bias"].view(shape)


def naive_clmr(s, audio):
    s = {k: v.double() for k, v in s.items()}
    x = torch.from_numpy(audio).double()[None, None]
    for i in range(11):
        how = dict(padding=1) if i else dict(stride=3)
        x = F.conv1d(x, s[f"sequential.{i}.0.weight"], s[f"sequential.{i}.0.bias"], **how)
        x = F.relu(normalised(x, s, f"sequential.{i}.1"))
        x = x.unflatten(2, (-1, 3)).amax(-1) if 0 < i < 10 else x
    return x.flatten()


def test_clmr_is_sample_cnn_under_the_published_names(seed, rng, tmp_path):
    state, path = clmr_state(seed), tmp_path / "clmr_checkpoint_10000.pt"
    old = {**{f"encoder.{k}": v for k, v in state.items()}, "projector.0.weight": torch.ones(2, 2)}
    torch.save(old, path)
    torch.save(lightning(state), tmp_path / "second.ckpt")
    found = clmr_embedder(path)
    assert clmr_embedder(tmp_path / "second.ckpt").fingerprint == found.fingerprint
    assert (found.rate, round(found.rate * found.window)) == (22050, 59049)
    x = rng.normal(size=(2, 59049)).astype(np.float32)
    vectors, expected = found.embed(x), naive_clmr(state, x[1]).numpy()
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(vectors[1], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    longer = found.embed(np.concatenate([x[:1], x[1:]], axis=1))
    np.testing.assert_allclose(longer[0], vectors.mean(axis=0), rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    short = found.embed(x[:1, :30000])
    np.testing.assert_allclose(short, found.embed(np.tile(x[:1, :30000], 2)[:, :59049]), rtol=1e-6)


def clews_state(seed):
    state = randomise(ClewsNet(40, 64, (4, 6), (6, 6, 8, 10, 12, 12), 5), seed).state_dict()
    # The audio has to reach the end: rectified units of few channels may all be shut, and the pooling sees what is above 0 alone.
    for name in state:
        if name == "frontend.2.bias" or name.endswith("skip.0.bias"):
            state[name] = state[name] + 1
    state["backbone.4.skip.2.conv.weight"] = state["backbone.4.skip.2.conv.weight"].abs()
    return state | {"frontend.0.gain": torch.ones(1), "cqt.0.lenghts": torch.linspace(8, 64, 40)}


def naive_clews(s, audio):
    """The network as the paper and its names describe it, in float64 and by hand."""
    s = {k: v.double() for k, v in s.items()}
    x = F.pad(torch.from_numpy(audio).double()[None, None], (32, 32), mode="reflect")
    frames = x[0, 0].unfold(0, 64, 320)
    parts = [frames @ s[f"cqt.0.cqt_kernels_{p}"][:, 0].T for p in ("real", "imag")]
    cqt = (parts[0].square() + parts[1].square()).sqrt().T * s["cqt.0.lenghts"].sqrt()[:, None]
    x = cqt[:, : cqt.shape[1] // 5 * 5].unflatten(1, (-1, 5)).mean(-1).sqrt()[None, None]
    x = (x - x.min()) / (x.max() - x.min() + 1e-6) * s["frontend.0.gain"] + s["frontend.0.bias"]
    x = F.conv2d(x, s["frontend.1.weight"], stride=(1, 2))
    x = F.conv2d(F.relu(normalised(x, s, "frontend.2")), s["frontend.4.weight"], stride=2)
    for i, stride in enumerate((1, 1, 2, 2, 1, 1)):
        b = f"backbone.{i}"
        first, second = x.chunk(2, 1)
        mean, var = second.mean((2, 3), keepdim=True), second.var((2, 3), keepdim=True, unbiased=False)
        inst = (second - mean) / (var + 1e-5).sqrt() * s[f"{b}.convs.0.inst.weight"].view(1, -1, 1, 1)
        inst = inst + s[f"{b}.convs.0.inst.bias"].view(1, -1, 1, 1)
        y = F.relu(torch.cat([normalised(first, s, f"{b}.convs.0.bn"), inst], 1))
        y = F.conv2d(y, s[f"{b}.convs.2.conv.weight"], stride=stride, padding=1)
        y = F.conv2d(F.relu(normalised(y, s, f"{b}.convs.3")), s[f"{b}.convs.5.conv.weight"], padding=1)
        if f"{b}.skip.2.conv.weight" in s:
            x = F.relu(normalised(x, s, f"{b}.skip.0"))
            x = F.conv2d(x, s[f"{b}.skip.2.conv.weight"], stride=stride, padding=1)
        x = s[f"{b}.gain"] * y + x
    power = 1 + F.softplus(s["pool.p"]).item()
    x = (x.flatten(2).clamp(min=1e-6) ** power).mean(-1) ** (1 / power)
    return (normalised(x, s, "proj.0") @ s["proj.1.weight"].T)[0]


def test_clews_is_the_network_of_its_paper(seed, rng, tmp_path):
    state, path = clews_state(seed), tmp_path / "checkpoint_best.ckpt"
    torch.save({"model": state, "optim": {"state": {}}, "epoch": 7, "cost_best": np.float64(0.1)}, path)
    found = clews_embedder(path)
    assert (found.rate, found.window) == (16000, 20.0)
    x = rng.normal(size=(2, 320000)).astype(np.float32)
    x[1] = np.cumsum(x[1]) / 100
    expected = torch.stack([naive_clews(state, row) for row in x]).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found.embed(x), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    # Seven seconds are played three times.
    np.testing.assert_allclose(found.embed(x[:, :112000]), found.embed(np.tile(x[:, :112000], 3)), rtol=1e-6)
    assert found.embed(np.zeros((1, 320000), np.float32)).shape == (1, 5)


def mert_folder(folder, seed, stable=False, **config):
    """A folder as its authors publish it: weights with the names of older torch, a config that names code."""
    from transformers import HubertConfig, HubertModel

    size = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=[8] * 7, vocab_size=4,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, do_stable_layer_norm=stable,
    )  # fmt: skip
    module = randomise(HubertModel(HubertConfig(**size)), seed)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, value in module.state_dict().items():
        for new, short in old.items():
            name = name.replace(new, short)
        state[name] = value
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    made = {"model_type": "mert_model", "architectures": ["MERTModel"], "feature_extractor_cqt": False, "deepnorm": False,
            "auto_map": {"AutoModel": "modeling_MERT.MERTModel"}, "attention_relax": -1.0, **size, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": True, "sampling_rate": 24000})
    )
    (folder / "modeling_MERT.py").write_text("raise SystemExit('code of the folder was run')")
    return module


@pytest.mark.parametrize("stable", [False, True])
def test_mert_is_hubert_and_its_code_is_not_run(seed, rng, tmp_path, stable):
    transformers = pytest.importorskip("transformers")
    module = mert_folder(tmp_path, seed, stable)
    x = (rng.normal(size=(3, 12000)) + 0.3).astype(np.float32)
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=24000, do_normalize=True)
    values = extractor(list(x), sampling_rate=24000, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        hidden = module(values, output_hidden_states=True).hidden_states
    for layer in (-1, 1):
        found = mert_embedder(tmp_path, layer)
        expected = hidden[layer].mean(1).numpy()
        np.testing.assert_allclose(found.embed(x), expected, rtol=1e-3, atol=1e-4)
        assert found.rate == 24000
    assert mert_embedder(tmp_path, 1).fingerprint != mert_embedder(tmp_path, -1).fingerprint
    with pytest.raises(UserError, match="MERT has 3 hidden states: use layer=-3 to 2"):
        mert_embedder(tmp_path, 3).embed(x)


@pytest.mark.parametrize("name", ["feature_extractor_cqt", "deepnorm"])
def test_a_mert_that_only_its_own_code_computes_is_refused(seed, tmp_path, name):
    pytest.importorskip("transformers")
    mert_folder(tmp_path, seed, **{name: True})
    with pytest.raises(UserError, match=f"sets {name}, which only the code in that folder computes"):
        mert_embedder(tmp_path)


def test_a_config_that_asks_for_more_than_the_weights_is_refused_before_memory_is_taken(seed, tmp_path):
    pytest.importorskip("transformers")
    mert_folder(tmp_path, seed)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, words in (
        ({"hidden_size": 2**20, "intermediate_size": 2**22}, "does not fit"),
        ({"num_hidden_layers": 40}, "it lacks"),
        ({"num_attention_heads": 7}, "cannot be used"),
        ({"model_type": "bert"}, "'bert', not MERT"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(UserError, match=words):
            mert_embedder(tmp_path)


def test_muq_is_the_package_and_a_folder(seed, rng, tmp_path):
    muq, transformers = pytest.importorskip("muq"), pytest.importorskip("transformers")
    from safetensors.torch import save_file

    size = dict(
        encoder_dim=16, encoder_depth=2, conv_dim=4, codebook_size=8, stat={"melspec_2048_mean": 6.0, "melspec_2048_std": 18.0},
        w2v2_config=json.loads(transformers.Wav2Vec2ConformerConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
            position_embeddings_type="rotary", conv_depthwise_kernel_size=5,
        ).to_json_string(use_diff=False)),
    )  # fmt: skip
    module = randomise(muq.MuQ(size), seed)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**size, "rvq_ckpt_path": str(tmp_path / "model.safetensors")})
    )
    if int(transformers.__version__.split(".")[0]) > 4:
        with pytest.raises(UserError, match="muq needs transformers 4"):
            muq_embedder(tmp_path)
        return
    x = rng.normal(size=(2, 48000)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(muq_embedder(tmp_path).embed(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mert", "muq"])
def test_restricted_weights_need_the_name_of_their_licence(seed, tmp_path, name):
    with pytest.raises(UserError, match="are under CC-BY-NC-4.0.*licence=CC-BY-NC-4.0") as said:
        parse(f"{name}:checkpoint={tmp_path}")[1].embedder()
    assert SOURCES[name].where in str(said.value)
    with pytest.raises(UserError, match="CC-BY-NC"):
        parse(f"{name}:checkpoint={tmp_path},licence=MIT")[1].embedder()
    with pytest.raises(UserError, match="config.json|needs the package|needs transformers 4"):
        parse(f"{name}:checkpoint={tmp_path},licence=CC-BY-NC-4.0")[1].embedder()


def test_weights_of_a_licence_that_is_not_known_need_one_that_the_user_has_read(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    for licence in ("", ",licence= "):
        with pytest.raises(
            UserError, match="not known here: read it at zenodo.org/records/15045900.*licence=NAME"
        ):
            parse(f"clews:checkpoint={path}{licence}")[1].embedder()
    with pytest.raises(UserError, match="another model|not CLEWS|lacks"):
        parse(f"clews:checkpoint={path},licence=MIT")[1].embedder()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_without_weights_it_says_which_from_where_under_which_licence(tmp_path, name):
    source = SOURCES[name]
    licence = f",licence={source.licence}" if source.restricted or source.unknown else ""
    for text, words in (
        (f"{name}:window=0{licence}", "needs weights"),
        (f"{name}:checkpoint={tmp_path / 'none'}{licence}", "does not exist"),
    ):
        with pytest.raises(UserError, match=words) as said:
            parse(text)[1].embedder()
        assert (
            source.file in str(said.value)
            and source.where in str(said.value)
            and source.licence in str(said.value)
        )
        assert "\n" not in str(said.value)
    assert METHODS[name].kind == "black box"


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def spoil(path, how, state):
    if how == "html":
        path.write_text("\n<!DOCTYPE html><html><body>Not found</body></html>")
    elif how == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "code":
        torch.save({"state_dict": state, "more": Evil()}, path)
    elif how == "old code":
        path.write_bytes(pickle.dumps({"state_dict": {}, "more": Evil()}, protocol=2))
    elif how == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "list":
        torch.save([torch.ones(2)], path)
    else:
        name = "sequential.3.0.weight"
        made = {f"encoder.{k}": v for k, v in state.items()}
        if how == "other":
            made = {f"layers.{i}.weight": torch.ones(2) for i in range(5)}
        elif how == "shape":
            made[f"encoder.{name}"] = torch.ones(7, 7, 3)
        elif how == "nan":
            made[f"encoder.{name}"] = torch.full_like(state[name], float("nan"))
        elif how == "huge":
            made[f"encoder.{name}"] = torch.ones(1, 1, 1).expand(2**20, 2**20, 2**10)
        torch.save(made, path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("html", "web page"), ("pointer", "Git LFS pointer"), ("empty", "damaged"), ("code", "could run code"),
        ("old code", "could run code"), ("cut", "cut short or damaged"), ("list", "no weights"),
        ("other", "weights of another model: it lacks sequential.0.0.weight"),
        ("shape", r"sequential.3.0.weight is \[7, 7, 3\], expected \[256, 128, 3\]"),
        ("nan", "NaN or infinity in sequential.3.0.weight"), ("huge", "more than the file holds"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_gets_one_sentence(seed, tmp_path, monkeypatch, how, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    spoil(path, how, clmr_state(seed))
    with pytest.raises(UserError, match=words) as said:
        clmr_embedder(path)
    text = str(said.value)
    assert str(path) in text and "Spijkervet" in text and "\n" not in text
    assert not (tmp_path / "ran").exists()


def test_a_clews_of_other_shapes_is_refused_before_memory_is_taken(seed, tmp_path):
    state, path = clews_state(seed), tmp_path / "x.ckpt"
    for change, words in (
        ({"frontend.1.weight": torch.ones(2**18, 1, 1, 1), "proj.1.weight": torch.ones(2**18, 1)}, "does not fit"),
        ({"proj.1.weight": torch.ones(5)}, "four stages"),
        ({"backbone.0.convs.5.conv.weight": torch.ones(())}, "four stages"),
    ):  # fmt: skip
        torch.save({"model": {**state, **change}}, path)
        with pytest.raises(UserError, match=words):
            clews_embedder(path)
    torch.save({"model": {k: v for k, v in state.items() if "cqt" not in k}}, path)
    with pytest.raises(UserError, match="it lacks cqt.0.cqt_kernels_real"):
        clews_embedder(path)


def test_what_a_trainer_keeps_beside_the_weights_is_left_alone(seed, rng, tmp_path):
    """The authors of CLEWS save an OmegaConf with the weights."""
    omegaconf = pytest.importorskip("omegaconf")
    state, path = clews_state(seed), tmp_path / "x.ckpt"
    conf = omegaconf.OmegaConf.create({"a": {"b": [1, None, "x"]}})
    torch.save({"model": state, "conf": conf, "sched": {"best": np.float64(1)}}, path)
    torch.save({"model": state}, tmp_path / "y.ckpt")
    assert clews_embedder(path).fingerprint == clews_embedder(tmp_path / "y.ckpt").fingerprint


def test_weights_change_the_fingerprint_and_their_file_does_not(seed, tmp_path):
    state = clmr_state(seed)
    prints = []
    for name, change in (("a.pt", 0.0), ("b.ckpt", 0.0), ("c.pt", 0.5)):
        made = {**state, "sequential.0.0.bias": state["sequential.0.0.bias"] + change}
        torch.save(made if name == "a.pt" else lightning(made), tmp_path / name)
        prints.append(clmr_embedder(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]
