"""What users write is the method that they get, or one clear sentence."""

import re
from dataclasses import fields

import pytest

from attr_engine.errors import UserError
from attr_engine.methods import METHODS, method, parse
from attr_engine.methods.base import KINDS


def test_options_are_read_by_their_types():
    name, found = parse("ridge:rank=4,damping=0.5")
    assert name == "ridge:rank=4,damping=0.5"
    assert (found.rank, found.damping) == (4, 0.5)
    assert parse("ridge")[1] == METHODS["ridge"].make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rigde", "there is no method 'rigde': choose from .*ridge"),
        ("ridge:rnk=4", r"no option 'rnk=4'.*damping=0.3, rank=16"),
        ("ridge:rank", "no option 'rank': write NAME=VALUE"),
        ("ridge:rank=many", "option rank of method 'ridge' is 'many': expected int"),
        ("ridge:damping=nan", "expected a finite number"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_every_method_has_a_kind_a_line_and_help_for_its_options():
    assert len(METHODS) > 5
    for name, entry in METHODS.items():
        assert entry.kind in KINDS and entry.text and re.fullmatch(r"[a-z0-9_-]+", name)
        for f in fields(entry.make):
            assert f.metadata["help"], (name, f.name)
            assert isinstance(f.default, bool | int | float | str)
        assert parse(name)[1] == entry.make()


def test_a_name_stands_once():
    with pytest.raises(ValueError, match="once"):
        method("ridge", "gradient", "again")(object)
