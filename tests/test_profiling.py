"""``--profile``: traces that are read as what they are, the same bits with and without, nothing where nobody asks."""

import json
import sys

import forks
import pytest
import torch

from attr_engine import Settings, UserError, attribute
from attr_engine.profiling import FOLDER, TABLE, Profile
from attr_engine.settings import differences

STAGES = ("fisher", "unlearn", "score")


@pytest.fixture
def world(seed):
    return forks.make(seed)


def run(world, out, **changes):
    model, tracks, queries = world
    return attribute(model, tracks, queries, forks.small(**changes), out=out)


def results(folder):
    """Everything that a run computes, as bytes."""
    paths = [p for kind in ("safetensors", "parquet", "csv") for p in folder.rglob(f"*.{kind}")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def ranges(path):
    """Names of the ranges that the engine opened, to their times (begin, end) in microseconds."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [e for e in events if e.get("cat") == "user_annotation"]
    return {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in found}


@pytest.mark.parametrize(
    "ways", [{}, {"strengths_by": "tangent", "steps": 1}, {"functions": ("ridge",)}, {"gradients": "loop"}]
)
def test_a_profiled_run_has_the_same_bits_and_a_plain_one_leaves_no_profile(world, tmp_path, ways):
    run(world, tmp_path / "plain", **ways)
    run(world, tmp_path / "profiled", **ways, profile=2)
    assert "scores.parquet" in results(tmp_path / "plain")
    assert results(tmp_path / "plain") == results(tmp_path / "profiled")
    assert not (tmp_path / "plain" / FOLDER).exists()
    assert not (tmp_path / "plain" / TABLE).exists()
    assert list((tmp_path / "profiled" / FOLDER).glob("*.json"))


def test_a_trace_has_its_stage_and_so_many_passes_and_their_operators(world, tmp_path):
    run(world, tmp_path, profile=2)
    assert sorted(p.name for p in (tmp_path / FOLDER).glob("*.json")) == sorted(f"{s}.json" for s in STAGES)
    table = (tmp_path / TABLE).read_text()
    for stage in STAGES:
        path = tmp_path / FOLDER / f"{stage}.json"
        found = ranges(path)
        assert set(found) == {stage, f"{stage}: pass 1", f"{stage}: pass 2"}
        first, second = found[f"{stage}: pass 1"], found[f"{stage}: pass 2"]
        assert found[stage][0] <= first[0] < first[1] <= second[0] < second[1] <= found[stage][1]
        products = [
            e
            for e in json.loads(path.read_text())["traceEvents"]
            if e.get("cat") == "cpu_op" and e["name"] in ("aten::mm", "aten::addmm", "aten::bmm")
        ]
        for begin, end in (first, second):
            assert any(begin <= e["ts"] <= end for e in products)
        assert f"\n| {stage} | " in table
        assert f"\n## {stage}, passes 1 to 2" in table


def test_a_run_carries_on_under_a_profile_and_keeps_the_traces_that_it_has(world, tmp_path):
    run(world, tmp_path, profile=1)
    before = (tmp_path / FOLDER / "fisher.json").read_bytes()
    (tmp_path / "effects.safetensors").unlink()  # scored again, from the Fisher that is there
    (tmp_path / FOLDER / "score.json").unlink()
    run(world, tmp_path, profile=3)
    assert (tmp_path / FOLDER / "fisher.json").read_bytes() == before
    assert {f"score: pass {i}" for i in (1, 2, 3)} <= set(ranges(tmp_path / FOLDER / "score.json"))
    assert "## fisher, passes 1 to 1" in (tmp_path / TABLE).read_text()


def test_a_stage_that_fails_after_its_traced_passes_leaves_its_trace_and_the_profiler_is_free_again(
    world, tmp_path
):
    model, profile = world[0], Profile(tmp_path, 1)
    watched = profile.watch(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"), profile.stage("fisher"):
            for _ in range(2):
                profile.begin_pass()
                torch.ones(3).sum()
            raise RuntimeError("broken")
        assert set(ranges(tmp_path / FOLDER / "fisher.json")) == {"fisher", "fisher: pass 1"}
        (tmp_path / FOLDER / "fisher.json").unlink()
    with pytest.raises(RuntimeError, match="broken"), profile.stage("early"):
        profile.begin_pass()
        raise RuntimeError("broken")
    assert not (tmp_path / FOLDER / "early.json").exists()
    assert watched.module is model.module
    assert watched.fingerprint == model.fingerprint


def test_without_a_profile_and_without_a_gpu_nothing_is_in_the_way(world, tmp_path):
    profile = Profile(tmp_path, 0)
    if not torch.cuda.is_available():
        assert profile.watch(world[0]) is world[0]
    with profile.stage("fisher"):
        profile.begin_pass()
    profile.write(lambda: {"fisher": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_nvtx_ranges_surround_stages_and_passes_where_cuda_is_in_use(world, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    profile = Profile(tmp_path, 0)
    assert profile.watch(world[0]) is not world[0]
    with profile.stage("score"):
        profile.begin_pass()
        with profile.stage("within"):
            profile.begin_pass()
    assert told == ["score", "score: pass 1", "end", "score: pass 2", "end", "end"]
    assert list(tmp_path.iterdir()) == []


def test_profile_decides_nothing_and_its_flag_needs_no_number(tmp_path):
    pytest.importorskip("soundfile")
    from attr_engine import cli_options

    assert differences(Settings(), Settings(profile=3)) == []
    for flags, passes in ([], 0), (["--profile"], 4), (["--profile", "7"], 7):
        args = cli_options.parser().parse_args(["attribute", "--out", str(tmp_path), *flags])
        assert cli_options.settings_of(args).profile == passes


def test_a_negative_number_of_passes_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="profile at least 0"):
        run(world, tmp_path, profile=-1)


def test_settings_do_not_import_torch():
    import subprocess

    code = "import sys, attr_engine.settings; sys.exit('torch.profiler' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
