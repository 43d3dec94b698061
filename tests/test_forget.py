"""Removal: losses of a plain loop, rows that are kept, and what is refused."""

import csv
import json
from dataclasses import replace

import claps
import helpers
import naive
import numpy as np
import pytest
import torch
import unlearning

from attr_engine import DrawPlan, Settings, UserError, attribute, fit_fisher, unlearn_query
from attr_engine.forget import Forgetting, by_ids, by_value, forget
from attr_engine.forget_settings import DEFAULTS, Removal
from attr_engine.frechet import pieces
from attr_engine.methods import ascent, mucs
from attr_engine.methods.clap import text_audio_scores
from attr_engine.retrain import JUDGE_SEED
from attr_engine.updates import applied

QUICK = Removal(
    layers=("transformer",), draws=3, update_draws=4, fisher_draws=4, batch=3, pieces=0, checkpoints=False, rows=4
)  # fmt: skip
STRENGTHS = {"fisher": (0.02, 0.1), "ascent": (0.05,), "mucs": (1.0,), "relabel": (2.0,)}


@pytest.fixture
def world(seed, rng, monkeypatch):
    for module in (ascent, mucs):  # a toy that learned nothing is at the loss of an untrained network already
        monkeypatch.setattr(module, "null_loss", lambda *a, **k: 1e3)
    return helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 6, 3, 10), helpers.make_tracks(rng, 2, 3, 10, "h")  # fmt: skip


@pytest.mark.parametrize("method", list(DEFAULTS))
def test_losses_are_those_of_a_loop(world, tmp_path, seed, method):
    model, tracks, held_out = world
    how = replace(QUICK, method=method, strengths=STRENGTHS[method], steps=2, seed=seed)
    forgetting = Forgetting(model, tracks, [4, 1, 4], tmp_path, how, held_out)
    rows = forgetting.run()
    loop = naive.Loop(model, DrawPlan(JUDGE_SEED, "shared", 1))
    items = {name: naive.items(x, 10) for name, x in (("t", tracks), ("h", held_out))}
    sets = {"forget": [items["t"][i] for i in (1, 4)], "remain": [items["t"][i] for i in (0, 2, 3, 5)], "held_out": items["h"]}  # fmt: skip
    assert [row["strength"] for row in rows] == [0.0, *STRENGTHS[method]]
    for row in rows:
        delta = forgetting._unlearn(row["strength"]).delta if row["strength"] else {}
        other = unlearning.moved(loop, delta)
        for name, some in sets.items():
            effects = loop.effects(other, some, 3, True)
            mean = effects["unlearned"].mean(axis=1)
            assert naive.relative_error(row["losses"][name], mean) < 1e-8
            assert row[name][0] == pytest.approx(mean.mean(), rel=1e-8)
            assert row[name][1] <= row[name][0] <= row[name][2]
            if delta:
                change = (mean - effects["base"].mean(axis=1)).mean()
                assert row[f"{name}_change"][0] == pytest.approx(change, abs=1e-8 * abs(mean).max())
        norms = [np.sqrt(sum(float(d.detach().square().sum()) for d in x.values())) for x in (delta, forgetting.parameters)]  # fmt: skip
        assert row.get("size", 0.0) == pytest.approx(norms[0] / norms[1], rel=1e-9)
    if method in ("fisher", "ascent"):
        # One step along the gradient, or along it over positive numbers, is up the loss of its own draws; others may fall.
        assert rows[-1]["size"] > 0
        (tmp_path / "step").mkdir()
        step = Forgetting(model, tracks, [4, 1], tmp_path / "step", replace(how, steps=1))._unlearn(0.1).delta
        own = naive.Loop(model, DrawPlan(seed, "track", 4))
        slopes = [own.gradient(items["t"][i], "update", d, True) for i in (1, 4) for d in range(4)]
        assert sum(float((g[name] * x.numpy()).sum()) for g in slopes for name, x in step.items()) > 0


def test_by_the_fisher_it_is_the_joint_update_of_the_engine(world, tmp_path, seed):
    model, tracks, _ = world
    forgetting = Forgetting(model, tracks, [1, 4], tmp_path, replace(QUICK, seed=seed))
    found = forgetting._unlearn(0.05)
    plan = DrawPlan(seed, "track", 4)
    fisher = fit_fisher(model, tracks, QUICK.layers, plan, 4)
    update = unlearn_query(model, tracks, [1, 4], fisher, plan, 6, 0.05, draws=4)
    for name, value in found.delta.items():
        assert naive.relative_error(value, update.delta[name]) < 1e-9


def test_rows_are_kept_and_more_strengths_are_added(world, tmp_path, monkeypatch):
    model, tracks, _ = world
    how = replace(QUICK, strengths=(0.01, 0.02, 0.04))
    whole = forget(model, tracks, [2], tmp_path / "whole", how)
    measure = Forgetting._measure

    def dying(self, what, before):
        if what == "strength 0.02":
            raise KeyboardInterrupt
        return measure(self, what, before)

    monkeypatch.setattr(Forgetting, "_measure", dying)
    with pytest.raises(KeyboardInterrupt):
        forget(model, tracks, [2], tmp_path / "cut", how)
    said = json.loads((tmp_path / "cut" / "forget.json").read_text())
    assert (said["done"], said["strengths"], len(said["rows"])) == (1, 3, 2)
    assert "So far 1 of 3 strengths" in (tmp_path / "cut" / "forget.md").read_text()
    monkeypatch.setattr(Forgetting, "_measure", measure)
    computed = []
    unlearn = Forgetting._unlearn
    monkeypatch.setattr(Forgetting, "_unlearn", lambda self, x: computed.append(x) or unlearn(self, x))
    again = forget(model, tracks, [2], tmp_path / "cut", how)
    assert computed == [0.02, 0.04]
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (whole, again)]
    assert plain[0] == plain[1]
    forget(model, tracks, [2], tmp_path / "cut", replace(how, strengths=(0.08, 0.01)))
    assert computed == [0.02, 0.04, 0.08]
    with pytest.raises(UserError, match="belongs to another removal"):
        forget(model, tracks, [3], tmp_path / "cut", how)


def test_tables_say_what_the_rows_say(world, tmp_path):
    model, tracks, held_out = world
    rows = forget(model, tracks, [2], tmp_path, replace(QUICK, strengths=(0.01, 0.1)), held_out)
    table = list(csv.DictReader((tmp_path / "forget.csv").open()))
    assert [float(x["strength"]) for x in table] == [0.0, 0.01, 0.1]
    for line, row in zip(table, rows, strict=True):
        assert float(line["remain_low"]) == row["remain"][1] and float(line["forget"]) == row["forget"][0]
    assert table[0]["forget_change"] == "" and float(table[2]["held_out_change"]) == rows[2]["held_out_change"][0]  # fmt: skip
    text = (tmp_path / "forget.md").read_text()
    assert "| untouched | 0 |" in text and "| 0.1 | 1 |" in text and "`t2`" in text
    assert "1 forget, 5 remain, 2 held-out" in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "forget.png").read_bytes().startswith(b"\x89PNG")


def test_few_remaining_tracks_may_stand_for_all(world, tmp_path, seed):
    model, tracks, _ = world
    forgetting = Forgetting(model, tracks, [2], tmp_path, replace(QUICK, remain=2, seed=seed))
    ids = list(forgetting.sets["remain"].ids)
    assert len(set(ids)) == 2 and "t2" not in ids


def test_what_to_forget_is_found_by_id_or_metadata(rng):
    tracks = helpers.make_tracks(rng, 5, 3, 10)
    for info, artist in zip(tracks.info, ("Ann", "Bob", "Ann", None, 7), strict=True):
        info["artist"] = artist
    assert by_ids(tracks, ["t3", "t0", "t3"]) == [0, 3]
    assert by_value(tracks, "artist", "Ann") == [0, 2] and by_value(tracks, "artist", "7") == [4]
    with pytest.raises(UserError, match="no training track 't33': did you mean 't3'"):
        by_ids(tracks, ["t33"])
    with pytest.raises(UserError, match="artist = 'Anna': there is 'Ann'"):
        by_value(tracks, "artist", "Anna")
    with pytest.raises(UserError, match="no track has a column 'owner'"):
        by_value(tracks, "owner", "Ann")


@pytest.mark.parametrize(
    ("chosen", "changes", "message"),
    [
        ([], {}, "nothing to forget"),
        (range(6), {}, "all 6 training tracks are to be forgotten"),
        ([0], {"method": "prune"}, "no way to forget called 'prune': use fisher, mucs, ascent, relabel"),
        ([0], {"strengths": (0.1, 0.1)}, "strengths are"),
        ([0], {"strengths": (-0.1,)}, "strengths are"),
        ([0], {"method": "relabel", "strengths": (1.5,)}, "not whole numbers"),
        ([0], {"draws": 1}, "at least 2 draws"),
        ([0], {"pieces": 1}, "2 pieces or none"),
        ([0], {"pieces": 4}, "no sampler.*--pieces 0"),
        ([0], {"classifier": "passt.pt"}, "labels are of generated pieces"),
        ([0], {"checkpoints": True}, "--checkpoints off"),
        ([0], {"layers": ("nothing",)}, "'nothing' matches no parameter"),
    ],
)
def test_what_cannot_be_done_is_said_first(world, tmp_path, chosen, changes, message):
    model, tracks, _ = world
    with pytest.raises(UserError, match=message):
        Forgetting(model, tracks, chosen, tmp_path / "out", replace(QUICK, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["owner", "album"])
def test_any_column_of_the_metadata_makes_groups(world, tmp_path, column):
    """Which ``attribute --groups`` unlearns jointly, as a removal does."""
    model, tracks, queries = world
    for info, name in zip(tracks.info, "aabbbc", strict=True):
        info[column] = name
    s = Settings(
        groups=column, layers=QUICK.layers, update_draws=4, score_draws=4, fisher_draws=4, strengths=(0.05,), plan="track"
    )  # fmt: skip
    result = attribute(model, tracks, queries, s, tmp_path / "run")
    assert list(result.tracks) == ["a", "b", "c"]
    delta = Forgetting(model, tracks, by_value(tracks, column, "b"), tmp_path, QUICK)._unlearn(0.05).delta
    loop = naive.Loop(model, DrawPlan(0, "track", 4))
    effects = loop.effects(unlearning.moved(loop, delta), naive.items(queries, 10), 4, False)
    expected = (effects["unlearned"] - effects["base"]).mean(axis=1)
    found = [result.values["loss_change"][result.row(q)][1] for q in queries.ids]
    assert naive.relative_error(found, expected) < 1e-6


class Heard(helpers.ToyDenoiser):
    """A toy that samples and decodes: pieces and their sound follow from the weights, the prompt and the seed."""

    sample_rate, samples_per_frame = 16000, 1600

    def sample(self, items, seed, steps=50, guidance=1.0):
        size = float(sum(p.detach().abs().sum() for p in self.module.parameters()))
        rows = []
        for k, item in enumerate(items):
            noise = torch.Generator().manual_seed(seed * 1000 + k + len(item["prompt"]))
            rows.append(torch.randn(self.channels, self.frames, generator=noise) * (1 + size % 1))
        return torch.stack(rows)

    def decode(self, latents):
        return latents.float().repeat_interleave(self.samples_per_frame, dim=-1).tanh()[:, :2]


@pytest.fixture
def told(seed, rng):
    """Tracks with a text each."""
    tracks = helpers.make_tracks(rng, 6, 3, 10)
    for i, row in enumerate(tracks.conditioning):
        row["prompt"] = ("slow piano", "loud drums", "slow drums loud")[i % 3]
    return Heard(seed), tracks


def test_the_clap_score_is_that_of_pieces_and_their_prompts(told, tmp_path, seed):
    soxr, (model, tracks) = pytest.importorskip("soxr"), told
    claps.clap_folder(tmp_path / "clap", seed, tokenizer=True)
    how = replace(QUICK, pieces=3, strengths=(0.3,), sampler_steps=2, clap=str(tmp_path / "clap"), seed=seed)
    forgetting = Forgetting(model, tracks, [1, 4], tmp_path / "out", how)
    rows = forgetting.run()

    def plain(name):
        scores = []
        for prompt, piece in zip(
            forgetting.prompts[name],
            pieces(model, forgetting.prompts[name], seed, 2, how.guidance),
            strict=True,
        ):
            sound = model.decode(torch.from_numpy(piece)[None])[0].mean(dim=0).numpy()
            audio = soxr.resample(sound, 16000, 48000)
            scores.append(text_audio_scores(tmp_path / "clap", [audio], [prompt["prompt"]])[0, 0])
        return np.array(scores)

    for name in ("forget", "remain"):
        scores = plain(name)
        assert {p["prompt"] for p in forgetting.prompts["forget"]} == {"loud drums"}
        assert rows[0][f"clap_{name}"][0] == pytest.approx(scores.mean(), abs=1e-6)
        assert rows[0][f"clap_{name}"][1] <= scores.mean() <= rows[0][f"clap_{name}"][2]
        with applied(model, forgetting._unlearn(0.3).delta):
            assert rows[1][f"clap_{name}"][0] == pytest.approx(plain(name).mean(), abs=1e-6)
        assert rows[0][f"clap_{name}"][0] != rows[1][f"clap_{name}"][0]
    table = list(csv.DictReader((tmp_path / "out" / "forget.csv").open()))
    assert float(table[1]["clap_remain"]) == rows[1]["clap_remain"][0]
    text = (tmp_path / "out" / "forget.md").read_text()
    assert "CLAP score, their prompts" in text and "(conditioning 'prompt')" in text


def test_without_clap_the_report_says_so_and_the_folder_is_the_old_one(told, tmp_path):
    model, tracks = told
    how = replace(QUICK, pieces=2, sampler_steps=2, strengths=(0.1,))
    first = Forgetting(model, tracks, [1], tmp_path / "out", how)
    rows = first.run()
    assert not [name for name in rows[0] if name.startswith("clap")]
    assert "No CLAP score: no checkpoint was named (--clap FOLDER)" in (tmp_path / "out" / "forget.md").read_text()  # fmt: skip
    assert Forgetting(model, tracks, [1], tmp_path / "out", replace(how, text="caption")).key == first.key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "caption"}, "no text 'caption' in its conditioning .there is .*'prompt'"),
        ({"clap": "nowhere"}, "checkpoint nowhere of clap does not exist: get "),
        ({"clap": "file"}, "is no folder: a CLAP score needs the text encoder"),
        ({"clap": "mute"}, "holds no tokenizer"),
        ({"pieces": 0}, "CLAP scores and labels are of generated pieces"),
    ],
)
def test_a_clap_score_that_cannot_be_had_is_said_first(told, tmp_path, seed, monkeypatch, changes, message):
    model, tracks = told
    monkeypatch.chdir(tmp_path)
    claps.clap_folder(tmp_path / "clap", seed, tokenizer=True)
    claps.clap_folder(tmp_path / "mute", seed)
    (tmp_path / "file").write_bytes(b"x")
    how = replace(QUICK, pieces=2, clap="clap")
    with pytest.raises(UserError, match=message):
        Forgetting(model, tracks, [1], tmp_path / "out", replace(how, **changes))
    assert not (tmp_path / "out").exists()
    monkeypatch.delattr(Heard, "decode")
    with pytest.raises(UserError, match="no autoencoder"):
        Forgetting(model, tracks, [1], tmp_path / "out", how)
