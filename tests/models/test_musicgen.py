"""MusicGen: its loss against a plain loop and transformers' own, codes of audio, forgetting, and folders that are refused.

The models are tiny, random and made here; nothing is downloaded.
"""

import copy
import json
import math
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from musicgens import CODES, HOP, LONGEST, RATE, WORDS, make_codes, make_folder

pytest.importorskip("transformers", minversion="5")

from attr_engine import LatentDataset, MemoryTracks, cli, forget_state  # noqa: E402
from attr_engine.errors import UserError  # noqa: E402
from attr_engine.latents.batch import Chosen  # noqa: E402
from attr_engine.models import musicgen  # noqa: E402
from attr_engine.models.musicgen import delays, load_musicgen, save_musicgen  # noqa: E402
from attr_engine.musicgen_loss import MusicGenLoss  # noqa: E402
from attr_engine.track_loss import (  # noqa: E402
    ForgetSettings,
    fit_track_fisher,
    forget,
    loss_changes,
    mean_gradient,
    norm,
    track_losses,
)


@pytest.fixture
def folder(tmp_path, seed) -> Path:
    return make_folder(tmp_path / "model", seed)


@pytest.fixture
def model(folder):
    return load_musicgen(folder, "float64")


def delayed_by_transformers(decoder, codes: torch.Tensor) -> torch.Tensor:
    """Inputs and labels ``[K, S + 1]`` of codes ``[K, n]`` by transformers' own function; the first column is the start."""
    start = torch.full((len(codes), 1), CODES)
    length = codes.shape[1] + 1 + max(delays(len(codes), decoder.config.audio_channels))
    _, pattern = decoder.build_delay_pattern_mask(torch.cat([start, codes], 1), CODES, length)
    return pattern


@pytest.mark.parametrize(("stereo", "width"), [(False, 12), (True, 12), (False, 16)])
def test_the_loss_is_that_of_a_loop_over_codebooks_and_frames(tmp_path, rng, seed, stereo, width, measured):
    model = load_musicgen(make_folder(tmp_path / "model", seed, stereo, width), "float64")
    assert ("enc_to_dec_proj" in model.module) == (width != 16)
    tracks = make_codes(rng, 5, model.channels)
    loss = MusicGenLoss(model, tracks)
    found = loss.losses(range(5), 0).detach().numpy()
    for i, name in enumerate(tracks.ids):
        n = int(tracks.lengths[i])
        codes = tracks.batch([i], n).latents[0].long()
        inputs = delayed_by_transformers(model.model.decoder, codes)
        text = model.tokenizer(tracks.conditioning[i]["prompt"], return_tensors="pt")
        with torch.no_grad():
            logits = model.model(
                input_ids=text.input_ids, attention_mask=text.attention_mask, decoder_input_ids=inputs
            ).logits.numpy()
        terms = []
        for k in range(model.channels):
            late = k // 2 if stereo else k
            for frame in range(n):
                row = logits[k, frame + late]
                terms.append(math.log(sum(math.exp(x) for x in row)) - row[int(codes[k, frame])])
        measured(f"loss {name}", abs(found[i] / np.mean(terms) - 1))
        assert found[i] == pytest.approx(np.mean(terms), rel=1e-9)


def test_the_loss_of_one_track_is_transformers_loss(model, rng):
    tracks = make_codes(rng, 4)
    model.model.config.decoder.decoder_start_token_id = CODES
    for i in range(4):
        codes = tracks.batch([i], int(tracks.lengths[i])).latents[0].long()
        labels = delayed_by_transformers(model.model.decoder, codes)[:, 1:].T[None]  # [1, S, K]
        text = model.tokenizer(tracks.conditioning[i]["prompt"], return_tensors="pt")
        with torch.no_grad():
            theirs = model.model(
                input_ids=text.input_ids, attention_mask=text.attention_mask, labels=labels
            ).loss
        mine = MusicGenLoss(model, tracks).losses([i], 0).item()
        assert mine == pytest.approx(theirs.item(), rel=1e-6)  # they add up in float32


def test_a_loss_knows_neither_the_other_tracks_of_its_batch_nor_its_padding(model, rng):
    tracks = make_codes(rng, 6)
    loss, order = MusicGenLoss(model, tracks), rng.permutation(6).tolist()
    alone = track_losses(loss, range(6), 1)
    np.testing.assert_allclose(loss.losses(order, 0).detach(), alone[order], rtol=1e-10)
    np.testing.assert_allclose(track_losses(loss, range(6), 4), alone, rtol=1e-10)
    short = tracks.batch([1, 2], LONGEST)
    padded = model.losses(short, [loss.labels[1], loss.labels[2]]).detach()
    np.testing.assert_allclose(padded, alone[[1, 2]], rtol=1e-10)


def test_the_gradient_of_several_tracks_is_the_same_by_one_and_by_all_at_a_time(model, rng):
    loss = MusicGenLoss(model, make_codes(rng, 5), ("transformer", "enc_to_dec_proj.*"))
    assert all(".layers." in name or "proj" in name for name in loss.parameters)
    one, all_ = (mean_gradient(loss, [3, 0, 4], 1, rows) for rows in (1, 3))
    for name, g in one.items():
        torch.testing.assert_close(all_[name], g, rtol=1e-8, atol=1e-12)
    assert norm(one) > 0 and norm({"p": one["enc_to_dec_proj.weight"]}) > 0


def test_other_texts_are_taken_where_labels_say_so(model, rng):
    loss = MusicGenLoss(model, make_codes(rng, 4))
    swapped = copy.copy(loss)
    swapped.labels = [loss.labels[i] for i in (2, 1, 3, 0)]
    found = loss.losses([0, 2, 3], 0, [2, 3, 0])
    assert torch.equal(found, swapped.losses([0, 2, 3], 0))
    # With the same texts they are the same bits; with others they may be as near as it happens.
    assert (found != loss.losses([0, 2, 3], 0)).all()


def write_music(
    folder: Path, rng: np.random.Generator, names: list[str], channels: int = 1
) -> list[np.ndarray]:
    import soundfile

    folder.mkdir()
    clips = []
    for i, name in enumerate(names):
        frames = [LONGEST, 9, 14][i % 3]
        clips.append(rng.uniform(-0.5, 0.5, (frames * HOP, channels)).astype(np.float32))
        soundfile.write(folder / f"{name}.wav", clips[-1], RATE, subtype="FLOAT")
    rows = "".join(f"{name}.wav,{WORDS[i % 6]} {WORDS[i // 6]}\n" for i, name in enumerate(names))
    (folder / "tracks.csv").write_text("path,prompt\n" + rows)
    return clips


def ingest(folder: Path, music: Path, out: Path, *more: str) -> int:
    return cli.main(["ingest", str(music), "--autoencoder", str(folder), "--metadata", str(music / "tracks.csv"),
                     "--condition", "prompt", "--seconds", str(LONGEST * HOP / RATE), "--out", str(out), *more])  # fmt: skip


@pytest.mark.parametrize("stereo", [False, True])
def test_ingest_writes_the_codes_of_the_models_own_encoder(tmp_path, rng, seed, stereo):
    pytest.importorskip("soxr")
    folder = make_folder(tmp_path / "model", seed, stereo)
    clips = write_music(tmp_path / "music", rng, ["a", "b", "c"], 2 if stereo else 1)
    assert ingest(folder, tmp_path / "music", tmp_path / "codes", "--store-dtype", "float16") == 0
    tracks = LatentDataset(tmp_path / "codes")
    assert tracks.ids == ["a.wav", "b.wav", "c.wav"] and tracks.lengths.tolist() == [LONGEST, 9, 14]
    model = load_musicgen(folder)
    found = tracks.batch([0], LONGEST).latents[0]  # as long as the model takes: nothing is put behind its end
    # Both sides at once: rounding, which may choose between two codes, differs with the number of rows.
    with torch.no_grad():
        wanted = model.model.audio_encoder.encode(torch.from_numpy(clips[0].T.copy())[:, None]).audio_codes[0]
    for side, codes in enumerate(wanted):
        assert len(codes[0].unique()) > 1
        np.testing.assert_array_equal(found[side :: clips[0].shape[1]], codes)
    assert MusicGenLoss(model, tracks).labels[1] == f"{WORDS[1]} {WORDS[0]}"


def test_a_model_that_knows_its_tracks_forgets_to_first_order(model, rng):
    """Only that: whether the remain set suffers less depends on model and music."""
    loss = MusicGenLoss(model, make_codes(rng, 4))
    optimizer = torch.optim.Adam(loss.parameters.values(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss.losses(range(4), 0).mean().backward()
        optimizer.step()
    assert track_losses(loss, range(4)).max() < loss.ceiling
    length = norm(mean_gradient(loss, [0, 2], 1))
    # Half the curvature times (lr length)^2 is left out: little even where it is 1e6 times the squared gradient of what was learned.
    settings = ForgetSettings(steps=1, lr=1e-8 / length**2, optimizer="sgd", rows=2)
    done = forget(loss, [0, 2], settings)
    rise = done.means()["forget"]["after"] - done.means()["forget"]["before"]
    assert rise == pytest.approx(1e-8, rel=0.05)


def test_unlearning_a_training_track_raises_its_own_loss_and_leaves_the_weights(model, rng):
    tracks = make_codes(rng, 4)
    loss = MusicGenLoss(model, tracks)
    start = {name: p.detach().clone() for name, p in loss.parameters.items()}
    queries = MusicGenLoss(model, Chosen(tracks, [2]))
    fisher = fit_track_fisher(loss)
    scores = loss_changes(loss, queries, fisher, size=1e-6, rows=4)
    assert scores.shape == (1, 4) and scores[0, 2] > 0
    assert all(torch.equal(p, start[name]) for name, p in loss.parameters.items())


def test_a_saved_model_has_the_same_losses_and_loads_without_a_network(folder, tmp_path, rng, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    model, tracks = load_musicgen(folder), make_codes(rng, 3)
    loss = MusicGenLoss(model, tracks)
    forget(loss, [0], ForgetSettings("relabel", steps=2, lr=1e-3))
    save_musicgen(model, tmp_path / "out")
    again = load_musicgen(tmp_path / "out")
    assert again.tokenizer("slow jazz").input_ids == model.tokenizer("slow jazz").input_ids
    np.testing.assert_array_equal(
        track_losses(MusicGenLoss(again, tracks), range(3)), track_losses(loss, range(3))
    )
    assert again.encoder.fingerprint == model.encoder.fingerprint
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_model_is_saved_whole_or_not_at_all(model, tmp_path, monkeypatch):
    def disk_full(part: Path) -> None:
        raise OSError(28, "No space left on device", str(part))

    with pytest.raises(OSError):
        save_musicgen(model, tmp_path / "out", disk_full)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out.part").mkdir()
    with pytest.raises(UserError, match="out.part is there, which a killed call left"):
        save_musicgen(model, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty: choose another --out"):
        save_musicgen(model, tmp_path / "model")


def test_the_command_forgets_saves_and_reports(folder, tmp_path, rng, capsys):
    pytest.importorskip("soxr")
    write_music(tmp_path / "music", rng, ["a", "b", "c", "d"])
    assert ingest(folder, tmp_path / "music", tmp_path / "codes") == 0
    call = ["musicgen-forget", "--model", str(folder), "--data", str(tmp_path / "codes"), "--out", str(tmp_path / "out"),
            "--steps", "3", "--lr", "1e-3", "--rows", "2"]  # fmt: skip
    ids = tmp_path / "ids.txt"
    ids.write_text("b.wav\n\nc.wav\n")
    assert cli.main([*call, "--forget", str(ids)]) == 0
    report, tracks = (
        json.loads((tmp_path / "out" / "forget.json").read_text()),
        LatentDataset(tmp_path / "codes"),
    )
    assert [row["forget"] for row in report["losses"]] == [False, True, True, False]
    for place, when in ((folder, "before"), (tmp_path / "out", "after")):
        losses = track_losses(MusicGenLoss(load_musicgen(place), tracks), range(4), 2)
        assert losses.tolist() == [row[when] for row in report["losses"]]
    assert (
        f"forget set, 2 tracks: {report['mean loss']['forget']['before']:.4f} before"
        in capsys.readouterr().out
    )
    assert cli.main([*call, "--forget", str(ids)]) == 2 and "is not empty" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert cli.main([*call, "--where", f"prompt={WORDS[3]} {WORDS[0]}"]) == 0
    assert json.loads((tmp_path / "out" / "forget.json").read_text())["losses"][3]["forget"]
    shutil.rmtree(tmp_path / "out")
    for more, message in (
        (["--where", "prompt=x"], "no training track has prompt = 'x'"),
        (["--where", "prompt"], "write COLUMN=VALUE"),
        (["--where", "artist=None"], "no track has a column 'artist'"),
        (["--forget", str(tmp_path / "no.txt")], "no.txt cannot be read"),
        (["--forget", str(folder / "config.json")], "no training track '{'"),
        (["--forget", str(ids), "--model", str(make_folder(tmp_path / "other", 1))], "encoded by another model"),
    ):  # fmt: skip
        assert cli.main([*call, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.so-far"))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_command_that_was_stopped_anywhere_carries_on_to_the_same_bits(
    folder, tmp_path, rng, monkeypatch, optimizer
):
    """Stopped at every pass in turn: while it measures, while it steps, and while it writes."""
    pytest.importorskip("soxr")
    write_music(tmp_path / "music", rng, ["a", "b", "c", "d"])
    assert ingest(folder, tmp_path / "music", tmp_path / "codes") == 0
    ids = tmp_path / "ids.txt"
    ids.write_text("b.wav\nc.wav\n")

    def call(out: str) -> int:
        return cli.main(["musicgen-forget", "--model", str(folder), "--data", str(tmp_path / "codes"), "--forget", str(ids), "--out",
                         str(tmp_path / out), "--steps", "4", "--lr", "1e-2", "--batch", "1", "--optimizer", optimizer])  # fmt: skip

    assert call("whole") == 0
    monkeypatch.setattr(forget_state, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    inner, write, passes = MusicGenLoss.losses, musicgen.save_musicgen, []

    def losses(self, *args):
        passes.append(1)
        if len(passes) > 1:
            raise SystemExit(9)
        return inner(self, *args)

    monkeypatch.setattr(MusicGenLoss, "losses", losses)
    for _ in range(
        4 + 4 + 4 - 1
    ):  # two passes over the tracks, and the steps: each sitting ends after one more of them
        passes.clear()
        with pytest.raises(SystemExit):
            call("out")
    monkeypatch.setattr(MusicGenLoss, "losses", inner)

    def half(model, out, more):
        write(model, out.with_name(out.name + ".part"), more)
        raise SystemExit(9)

    monkeypatch.setattr(musicgen, "save_musicgen", half)
    with pytest.raises(SystemExit):
        call("out")
    monkeypatch.setattr(musicgen, "save_musicgen", write)
    assert call("out") == 0 and not list(tmp_path.glob("*.so-far"))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_was_begun_with_other_settings_is_refused_and_what_diverged_is_not_in_the_way(
    folder, tmp_path, rng, monkeypatch, capsys
):
    pytest.importorskip("soxr")
    write_music(tmp_path / "music", rng, ["a", "b"])
    assert ingest(folder, tmp_path / "music", tmp_path / "codes") == 0
    call = ["musicgen-forget", "--model", str(folder), "--data", str(tmp_path / "codes"), "--where", f"prompt={WORDS[0]} {WORDS[0]}",
            "--out", str(tmp_path / "out"), "--steps", "2", "--lr"]  # fmt: skip
    inner = MusicGenLoss.losses

    def stop(self, *args):
        raise SystemExit(9)

    def nan(self, indices, step, labels=None):
        return inner(self, indices, step, labels) * (math.nan if step else 1.0)

    monkeypatch.setattr(MusicGenLoss, "losses", nan)
    assert cli.main([*call, "1e-3"]) == 2 and "diverged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.so-far"))
    monkeypatch.setattr(
        MusicGenLoss,
        "losses",
        lambda self, i, step, labels=None: stop(self) if step else inner(self, i, step),
    )
    with pytest.raises(SystemExit):
        cli.main([*call, "1e-3"])
    monkeypatch.setattr(MusicGenLoss, "losses", inner)
    assert cli.main([*call, "1e-4"]) == 2 and "belongs to other settings" in capsys.readouterr().err
    assert cli.main([*call, "1e-3"]) == 0


def rewrite(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_folder_as_older_versions_wrote_it_is_the_same_model(folder, rng):
    """Their files hold the table of sines, and weight_norm under its old names."""
    from safetensors.torch import load_file, save_file

    tracks, new = make_codes(rng, 3), load_musicgen(folder)
    wanted = track_losses(MusicGenLoss(new, tracks), range(3))
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    assert any(name.endswith("weight_g") for name in old)
    old["decoder.model.decoder.embed_positions.weights"] = torch.zeros(LONGEST + 2, 16)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    again = load_musicgen(folder)
    np.testing.assert_array_equal(track_losses(MusicGenLoss(again, tracks), range(3)), wanted)
    audio = torch.from_numpy(rng.uniform(-0.5, 0.5, (1, 1, 9 * HOP)).astype(np.float32))
    assert torch.equal(again.encoder.encode(audio), new.encoder.encode(audio))


@pytest.mark.parametrize(
    ("options", "message"), [({"dtype": "int8"}, "dtype 'int8'"), ({"device": "nowhere"}, "device 'nowhere'")]
)
def test_dtypes_and_devices_that_are_none_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        load_musicgen(folder, **options)


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.lm_heads.1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def put_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.lm_heads.1.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: rewrite(f, lambda c: c.update(model_type="bert")), "kind 'bert', not a MusicGen"),
        (only_bin, "only in pytorch_model.bin, a pickle"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "cannot be loaded as a MusicGen"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded as a MusicGen"),
        (drop_a_tensor, "decoder.lm_heads.1.weight is missing"),
        (put_nan, "NaN or infinity in decoder.lm_heads.1.weight"),
        (lambda f: rewrite(f, lambda c: c["decoder"].update(hidden_size=32)), "cannot be loaded|another shape"),
        (lambda f: rewrite(f, lambda c: c["decoder"].update(pad_token_id=3)), "the padding has to be 16"),
        (lambda f: rewrite(f, lambda c: c["audio_encoder"].update(chunk_length_s=1)), "in chunks of 1 s"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_musicgen_is_refused(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message):
        load_musicgen(folder).encoder  # noqa: B018


def codes(values: np.ndarray, **conditioning: str) -> MemoryTracks:
    return MemoryTracks(["song"], [values.astype(np.float32)], [conditioning])


@pytest.mark.parametrize(
    ("tracks", "message"),
    [
        (codes(np.zeros((3, LONGEST + 1)), prompt="jazz"), f"'song' has 25 frames, the model takes at most {LONGEST}"),
        (codes(np.zeros((4, 5)), prompt="jazz"), "4 channels, the model takes 3"),
        (codes(np.zeros((3, 5)), title="jazz"), "'song' has no text 'prompt'"),
        (codes(np.zeros((3, 5)), prompt="  "), "'song' has no text 'prompt'"),
        (codes(np.full((3, 5), 0.5), prompt="jazz"), "'song' holds values that are no codes from 0 to 15"),
        (codes(np.full((3, 5), CODES), prompt="jazz"), "'song' holds values that are no codes"),
        (codes(np.full((3, 5), -1), prompt="jazz"), "'song' holds values that are no codes"),
    ],
)  # fmt: skip
def test_tracks_that_the_model_cannot_take_are_refused(model, tracks, message):
    with pytest.raises(UserError, match=message):
        MusicGenLoss(model, tracks).losses([0], 0)


def test_a_folder_without_audio_and_audio_without_text_are_refused(folder, tmp_path, rng, capsys):
    pytest.importorskip("soxr")
    write_music(tmp_path / "music", rng, ["a"])
    (tmp_path / "music" / "tracks.csv").write_text("path,title\na.wav,Song\n")
    assert ingest(folder, tmp_path / "music", tmp_path / "codes") == 2
    assert "'a.wav' has no metadata 'prompt'" in capsys.readouterr().err
    (tmp_path / "music" / "a.wav").unlink()
    assert ingest(folder, tmp_path / "music", tmp_path / "codes") == 2
    assert "holds no audio" in capsys.readouterr().err


def test_an_encoder_with_other_codebooks_than_the_model_is_refused(model):
    encoder = musicgen.CodeEncoder(model.model.audio_encoder, 4, 1)
    with pytest.raises(UserError, match="gives 3 codebooks and the model takes 4"):
        encoder.encode(torch.zeros(1, 1, 4 * HOP))
