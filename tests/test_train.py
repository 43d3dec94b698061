"""A small model learns, its folder loads, and a training that was killed ends with the bits of one that was not."""

import copy
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from attr_engine import train
from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, MemoryTracks

pytest.importorskip("stable_audio_tools")

from attr_engine.models.stable_audio import load_model  # noqa: E402

torch.set_num_threads(1)


class FakeAutoencoder:
    """What :func:`attr_engine.train.diffusion_config` reads of an autoencoder."""

    channels, sample_rate, samples_per_frame, audio_channels = 4, 16000, 64, 1
    block = None


def make_config(values=None, **options):
    """A model of 4 channels and 8 frames without an autoencoder."""
    values = values or {"seconds_total": [1.0, 9.0]}
    config = train.diffusion_config(FakeAutoencoder(), 8, values, width=32, depth=1, patch=2, **options)
    del config["model"]["pretransform"]
    config["sample_size"] = 8
    return config


def make_tracks(n: int = 6):
    rng = np.random.default_rng(0)
    latents = [np.outer(rng.normal(size=4), np.ones(5 + i % 4)).astype(np.float32) for i in range(n)]
    return MemoryTracks([f"t{i}" for i in range(n)], latents, [{"seconds_total": float(i)} for i in range(n)])


class Killed(Exception):
    pass


def kill_at(step: int):
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def weights(folder):
    return {k: v.clone() for k, v in load_model(folder).wrapper.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kills", [[3], [1, 19, 20]])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, kills):
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    arguments = {"config": make_config(), "tracks": make_tracks(), "steps": 20, "batch": 4}
    loss = train.train_diffusion(**arguments, out=tmp_path / "whole")
    for step in kills:
        with pytest.raises(Killed):
            train.train_diffusion(**arguments, out=tmp_path / "killed", progress=kill_at(step))
        assert not (tmp_path / "killed" / "model_config.json").exists()
        torch.manual_seed(step)  # whatever state the next process starts with
    resumed = train.train_diffusion(**arguments, out=tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert resumed == loss
    assert (tmp_path / "whole" / "training.json").read_bytes() == (
        tmp_path / "killed" / "training.json"
    ).read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "model.safetensors", "model_config.json", "training.json"
    ]  # fmt: skip


def test_a_resumed_training_does_not_repeat_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    arguments = {"config": make_config(), "tracks": make_tracks(), "steps": 6, "out": tmp_path}
    with pytest.raises(Killed):
        train.train_diffusion(**arguments, progress=kill_at(5))
    seen = []
    train.train_diffusion(**arguments, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 6), (6, 6)]


def test_a_training_killed_by_a_signal_goes_on_to_the_same_bits(tmp_path):
    """In processes of their own, from files, as a user would."""
    tracks, folder = make_tracks(), tmp_path / "set"
    writer = LatentWriter(folder)
    for i, name in enumerate(tracks.ids):
        batch = tracks.batch([i], 8)
        writer.add(
            name, batch.latents[0, :, : int(batch.valid[0])].numpy().copy(), tracks.conditioning[i], {}
        )
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    script = (
        "import sys, os, signal, torch; from pathlib import Path; from attr_engine import train\n"
        "from attr_engine.latents import LatentDataset\n"
        "torch.set_num_threads(1); train._SECONDS_BETWEEN_CHECKPOINTS = -1.0\n"
        "kill = lambda done, total: done == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.train_diffusion(train.read_config(Path(sys.argv[1])), LatentDataset(sys.argv[2]),\n"
        "    Path(sys.argv[3]), 8, progress=kill)"
    )
    command = [sys.executable, "-c", script, tmp_path / "config.json", folder, tmp_path / "killed"]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    for out in ("killed", "whole"):
        train.train_diffusion(make_config(), LatentDataset(folder), tmp_path / out, 8)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_conditioner_that_nothing_uses_does_not_stop_a_checkpoint(tmp_path, monkeypatch):
    config = make_config()
    unused = copy.deepcopy(config["model"]["conditioning"]["configs"][0])
    config["model"]["conditioning"]["configs"].append({**unused, "id": "unused"})
    tracks = make_tracks()
    for row in tracks.conditioning:
        row["unused"] = 1.0
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    arguments = {"config": config, "tracks": tracks, "steps": 4}
    train.train_diffusion(**arguments, out=tmp_path / "whole")
    with pytest.raises(Killed):
        train.train_diffusion(**arguments, out=tmp_path / "killed", progress=kill_at(3))
    train.train_diffusion(**arguments, out=tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.parametrize(
    "other", [{"steps": 9}, {"batch": 2}, {"lr": 2e-3}, {"seed": 1}, {"tracks": make_tracks(5)}]
)
def test_a_training_with_other_settings_does_not_go_on_from_there(tmp_path, monkeypatch, other):
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    arguments = {"config": make_config(), "tracks": make_tracks(), "steps": 8, "batch": 4}
    with pytest.raises(Killed):
        train.train_diffusion(**arguments, out=tmp_path, progress=kill_at(3))
    with pytest.raises(UserError, match="training-so-far"):
        train.train_diffusion(**{**arguments, **other}, out=tmp_path)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "training-so-far.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="training-so-far.*delete it"):
        train.train_diffusion(make_config(), make_tracks(), tmp_path, 2)


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_the_loss_falls_and_the_folder_loads(tmp_path, objective):
    config, tracks = make_config(objective=objective), make_tracks()
    first = train.train_diffusion(config, tracks, tmp_path / "short", 10, lr=1e-5)
    last = train.train_diffusion(config, tracks, tmp_path / "long", 150, lr=3e-3)
    assert last < 0.7 * first
    model = load_model(tmp_path / "long")
    assert (model.objective, model.channels, model.frames) == (objective, 4, 8)
    described = json.loads((tmp_path / "long" / "training.json").read_text())
    assert described["loss"] == last and described["data"] == tracks.fingerprint
    x = torch.zeros(1, 4, 8)
    with torch.no_grad():
        assert torch.isfinite(
            model.predict(x, torch.tensor([0.5]), model.conditioning(tracks.conditioning[:1]))
        ).all()


def test_one_seed_gives_the_same_bits_and_another_one_others(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(out))
        train.train_diffusion(make_config(), make_tracks(), tmp_path / out, 3, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_training_that_diverges_says_so(tmp_path):
    tracks = MemoryTracks(["a"], [np.full((4, 8), 1e30, dtype=np.float32)], [{"seconds_total": 1.0}])
    with pytest.raises(UserError, match="diverged at step 0"):
        train.train_diffusion(make_config(), tracks, tmp_path, 3)
    assert not (tmp_path / "model_config.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": -1},
        {"batch": 0},
        {"batch": -3},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": -1.0},
        {"seed": -1},
    ],
)
def test_settings_that_cannot_train_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        train.train_diffusion(
            **{"config": make_config(), "tracks": make_tracks(), "out": tmp_path, "steps": 2, **options}
        )


def test_tracks_that_the_model_cannot_take_are_refused_by_name(tmp_path):
    long = MemoryTracks(["a", "long"], [np.ones((4, 8)), np.ones((4, 9))], [{"seconds_total": 1}] * 2)
    wide = MemoryTracks(["a"], [np.ones((5, 8))], [{"seconds_total": 1}])
    for tracks, says in (
        (long, "'long' has 9 frames"),
        (wide, "5 channels"),
        (MemoryTracks([], []), "empty"),
    ):
        with pytest.raises(UserError, match=says):
            train.train_diffusion(make_config(), tracks, tmp_path, 2)


def test_tracks_without_the_conditioning_are_refused_by_its_name(tmp_path):
    tracks = MemoryTracks(["a"], [np.ones((4, 8))])
    with pytest.raises(UserError, match="seconds_total"):
        train.train_diffusion(make_config(), tracks, tmp_path, 2)
    tracks = MemoryTracks(["a"], [np.ones((4, 8))], [{"seconds_total": "long"}])
    with pytest.raises(UserError, match="seconds_total = 'long'"):
        train.train_diffusion(make_config(), tracks, tmp_path, 2)


# -- configuration --------------------------------------------------------------------------------


def test_numbers_become_number_conditioners_over_their_range_and_text_a_list():
    config = make_config({"tempo": [120, 90.5, 100], "style": ["b", "a", "b"], "same": [3, 3]})
    entries = {e["id"]: (e["type"], e["config"]) for e in config["model"]["conditioning"]["configs"]}
    assert entries == {
        "tempo": ("number", {"min_val": 90.5, "max_val": 120.0}),
        "style": ("list", {"options": ["a", "b"]}),
        "same": ("number", {"min_val": 3.0, "max_val": 4.0}),
    }
    assert config["model"]["diffusion"]["cross_attention_cond_ids"] == ["tempo", "style", "same"]


@pytest.mark.parametrize("values", [[1, "a"], ["a", None], [True, False], [[1], [2]], [1, True]])
def test_conditioning_of_several_kinds_is_refused_by_name(values):
    with pytest.raises(UserError, match="'mixed'"):
        make_config({"mixed": values})


@pytest.mark.parametrize(
    "options", [{"frames": 9}, {"frames": 0}, {"patch": 0}, {"depth": 0}, {"width": 48}, {"width": 0}]
)
def test_a_model_that_cannot_be_built_is_refused(options):
    with pytest.raises(UserError):
        train.diffusion_config(
            **{"autoencoder": FakeAutoencoder(), "frames": 8, "conditioning": {}, "patch": 2, **options}
        )


def test_missing_conditioning_values_are_refused_by_track():
    with pytest.raises(UserError, match="'b' has no conditioning 'tempo'.*seconds_total"):
        rows = [{"tempo": 1}, {"seconds_total": 2}]
        train.conditioning_values(MemoryTracks(["a", "b"], [np.ones((4, 2))] * 2, rows), ["tempo"], rows)
