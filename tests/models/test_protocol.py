"""Which parameters a layer group holds."""

import helpers
import naive
import pytest
import torch
from torch import nn

from attr_engine.errors import UserError
from attr_engine.models.protocol import select_parameters


@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_a_group_holds_what_its_name_says_in_the_modules_order(layers, seed):
    model = helpers.ToyDenoiser(seed)
    chosen = select_parameters(model, layers)
    everything = dict(model.module.named_parameters())
    assert list(chosen) == [n for n in everything if naive.GROUPS[layers](n)]
    assert all(chosen[n] is everything[n] for n in chosen)
    assert 0 < len(chosen)


@pytest.mark.parametrize(
    "options", [{"global_cond": "prepend"}, {"global_cond": "adaLN", "patch": 4}], ids=str
)
@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_groups_of_a_stable_audio_model(layers, options, seed):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, torch.float32, depth=2, **options)
    chosen = select_parameters(model, layers)
    assert list(chosen) == [n for n, _ in model.module.named_parameters() if naive.GROUPS[layers](n)]
    inner = model.module.model
    if layers == ("all",):
        assert sum(p.numel() for p in chosen.values()) == sum(p.numel() for p in inner.parameters())
    if layers == ("transformer",):
        assert {id(p) for p in chosen.values()} == {id(p) for p in inner.transformer.layers.parameters()}
    if layers == ("cross_attn.to_kv",):
        assert {id(p) for p in chosen.values()} == {
            id(b.cross_attn.to_kv.weight) for b in inner.transformer.layers
        }


def test_a_union_names_every_parameter_once(seed):
    model = helpers.ToyDenoiser(seed)
    chosen = select_parameters(model, ("self_attn", "*layers.0.*", "self_attn", "null_token"))
    assert list(chosen) == [
        n
        for n, _ in model.module.named_parameters()
        if ".self_attn." in n or ".layers.0." in n or n == "null_token"
    ]


@pytest.mark.parametrize(
    "layers", [("cross_attn.to_kw",), ("transformer", "*layers.7.*"), ("Transformer",), ("",)]
)
def test_what_matches_nothing_is_refused_by_name_with_the_groups(layers, seed):
    with pytest.raises(UserError) as refused:
        select_parameters(helpers.ToyDenoiser(seed), layers)
    assert repr(layers[-1]) in str(refused.value)
    for group in (
        "all",
        "cross_attn.to_kv",
        "cross_attn",
        "self_attn",
        "transformer",
        "preprocess_conv.weight",
    ):
        assert group in str(refused.value)


def test_no_layers_are_refused(seed):
    with pytest.raises(UserError, match="no layers"):
        select_parameters(helpers.ToyDenoiser(seed), ())


class Tied(helpers.ToyDenoiser):
    """The first and the last projection of the blocks are one tensor with two names."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, depth=2)
        first, last = self.module.transformer.layers
        last.ff[2].weight = first.ff[2].weight
        self.module.head = nn.Module()
        self.module.head.register_parameter("gain", last.pre_norm.gamma)


def test_a_tied_parameter_stands_once_under_its_first_name(seed):
    model = Tied(seed)
    chosen = select_parameters(model, ("all",))
    assert len(chosen) == len({id(p) for p in chosen.values()}) == len(list(model.module.parameters()))
    assert "transformer.layers.0.ff.2.weight" in chosen
    assert "transformer.layers.1.ff.2.weight" not in chosen


def test_a_tied_parameter_is_found_under_each_of_its_names(seed):
    model = Tied(seed)
    assert list(select_parameters(model, ("transformer.layers.1.ff.2.weight",))) == [
        "transformer.layers.0.ff.2.weight"
    ]
    assert list(select_parameters(model, ("head.*",))) == ["transformer.layers.1.pre_norm.gamma"]
    both = select_parameters(model, ("*layers.1.*",))
    assert "transformer.layers.0.ff.2.weight" in both, "a part of layer 1 although layer 0 has it too"


def test_a_frozen_parameter_is_refused_by_name(seed):
    model = helpers.ToyDenoiser(seed)
    model.module.transformer.layers[1].self_attn.to_out.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"transformer.layers.1.self_attn.to_out.weight is frozen \(1 of 4"):
        select_parameters(model, ("self_attn",))
    assert select_parameters(model, ("cross_attn",))
