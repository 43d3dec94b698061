"""Settings: one dataclass, checked by name and type wherever it comes from."""

import dataclasses
import json
import typing

import pytest

from attr_engine import Settings, UserError
from attr_engine.settings import differences, field_types, from_json, read_settings, to_json

GOOD = {str: ["x", ""], int: [3, 0, -2], float: [0.5, 2], bool: [True, False]}
BAD = {
    str: [1, None, True, ["x"]],
    int: [1.0, "1", True, None, [1]],
    float: ["0.5", None, False, [0.5]],
    bool: [0, 1, "true", None],
}


def sample(name: str, kind: type) -> list:
    spec = next(f for f in dataclasses.fields(Settings) if f.name == name)
    return list(spec.metadata["choices"]) or GOOD[kind]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Settings)])
def test_every_field_takes_its_type_and_refuses_others_by_name(name):
    kind = field_types()[name]
    if typing.get_origin(kind) is tuple:
        item, more = typing.get_args(kind)
        assert more is Ellipsis
        for good in ([], sample(name, item)):
            value = getattr(from_json({name: good}, "the test"), name)
            # No function means the default one, which depends on what else is asked for.
            expected = Settings().functions if name == "functions" and not good else tuple(good)
            assert value == expected and all(type(v) is item for v in value)
        wrong = [[v] for v in BAD[item]] + ["text", 1, None, {}]
    else:
        for good in sample(name, kind):
            value = getattr(from_json({name: good}, "the test"), name)
            assert value == good and type(value) is kind
        wrong = BAD[kind]
    for value in wrong:
        with pytest.raises(UserError, match=f"setting '{name}' is"):
            from_json({name: value}, "the test")


def test_every_field_has_a_help_text_and_a_default_that_it_accepts():
    for spec in dataclasses.fields(Settings):
        assert spec.metadata["help"]
    assert from_json(to_json(Settings()), "the test") == Settings()


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Settings) if f.metadata["choices"]])
def test_a_choice_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"setting '{name}' is 'none of them'; known: "):
        from_json({name: "none of them"}, "the test")


def test_unknown_settings_are_refused_by_name_and_source():
    with pytest.raises(UserError, match=r"the test has an unknown setting 'dampnig'; known: .*damping"):
        from_json({"dampnig": 0.1}, "the test")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_name(number):
    with pytest.raises(UserError, match="'damping'"):
        from_json({"damping": number}, "the test")
    with pytest.raises(UserError, match="'strengths'"):
        from_json({"strengths": [0.01, number]}, "the test")


def test_settings_survive_a_file(tmp_path):
    settings = Settings(
        strengths=(1e-2, 0.1 + 0.2),
        self_influence=("ü", "b"),
        layers=("all",),
        seed=-5,
        damping=1e-300,
        ema=False,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(settings)))
    assert read_settings(path) == settings


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\xff"])
def test_a_file_that_holds_no_settings_is_refused_by_path(content, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{path} does not exist"):
        read_settings(path)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=str(path)):
        read_settings(path)


def test_a_file_is_named_where_a_setting_in_it_is_unknown(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"sed": 1}')
    with pytest.raises(UserError, match=rf"{path} has an unknown setting 'sed'"):
        read_settings(path)


def test_differences_are_named_with_both_values_and_presentation_is_none():
    old = Settings()
    assert differences(old, old) == []
    new = dataclasses.replace(
        old, seed=1, layers=("all",), show=3, title="x", shares="softmax", keep_updates=True
    )
    assert differences(old, new) == ["layers: ('transformer',) -> ('all',)", "seed: 0 -> 1"]
