"""Every mistake in a configuration is named, and what is right survives a trip through JSON."""

import ast
import inspect
import json
from dataclasses import FrozenInstanceError, fields

import pytest

from mtxlib import config as module
from mtxlib.config import (
    CHOICES,
    PARTS,
    PRESETS,
    Config,
    TrainConfig,
    archive_paths,
    check_value,
    flat_names,
    typed,
)


@pytest.mark.parametrize("values, message", [
    ({"beta_mx": 1.0}, r"unknown parameter 'beta_mx'; did you mean 'beta_max'\?"),
    ({"preset": "tiny", "Steps": 3}, r"unknown parameter 'Steps'; did you mean 'steps'\?"),
    ({"qqqqqq": 1}, r"unknown parameter 'qqqqqq'$"),
    ({"preset": "tinny"}, r"unknown preset 'tinny'; did you mean 'tiny'\?.*expected one of"),
    ({"steps": 10.0}, "'steps': expected int, got 10.0"), ({"steps": "10"}, "'steps': expected int, got '10'"),
    ({"steps": True}, "'steps': expected int, got True"), ({"lr": "1e-3"}, "'lr': expected float, got '1e-3'"),
    ({"compile": 1}, "'compile': expected bool, got 1"), ({"source": None}, "'source': expected str, got None"),
    ({"bottleneck": "row"}, "'bottleneck': expected one of conv, .*, got 'row'"),
    ({"rows_per_bar": 3}, "'rows_per_bar': expected one of 1, 2, 4, got 3"),
    ({"lr": 0.0}, "'lr': expected more than 0"), ({"n_bars": -4}, "'n_bars': expected more than 0, got -4"),
    ({"dec_token_dropout": 1.0}, r"'dec_token_dropout': expected a share in \[0, 1\), got 1.0"),
    ({"ema": -0.1}, "'ema': expected a share"),
    ({"lr": float("nan")}, "'lr': expected a finite number, got nan"), ({"beta_max": float("inf")}, "a finite number"),
    ({"source": "bach+jsfake"}, r"'source': expected one of bach, .*joined by \+, got 'bach\+jsfake'"),
    ({"d_model": 36, "n_heads": 4}, "'d_model': expected a multiple of 2 .* = 8, got 36"),
    ({"conv_stride": 6}, "'conv_stride': expected a power of two, got 6"),
    ({"grid": 6}, "'grid': expected one of 4, 8, 12, 24, got 6"), ({"tempos": -1}, "'tempos': expected 0 or more"),
    ({"velocities": 128}, "'velocities': expected at most 127"), ({"pedal": 1}, "'pedal': expected bool, got 1"),
    ({"limit": -1}, "'limit': expected 0 or more, got -1"), ({"beta_max": -0.5}, "'beta_max': expected 0 or more"),
    ({"target_rate": 100.0, "free_bits": 0.1}, "'free_bits': expected 0 with a target_rate"),
    ({"target_start": 100.0}, "'target_start': expected a target_rate to go to"),
    ({"beta_schedule": "rate"}, "'target_rate': expected the nats to hold with beta_schedule 'rate', got 0"),
    ({"beta_schedule": "rates"}, "'beta_schedule': expected one of constant, .*, rate, got 'rates'"),
    ({"optimizer": "Muon"}, "'optimizer': expected one of muon, adamw, got 'Muon'"),
    ({"batch_size": 9, "accumulate": 2}, "'accumulate': expected a divisor of batch_size 9, got 2")])
def test_mistakes_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_flat(values)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("top_p", 5.0, "at most 1, got 5.0"), ("top_p", 0.0, "more than 0, got 0.0"), ("temperature", -1.0, "0 or more"),
    ("sample_temperature", float("nan"), "a finite number"), ("long_bars", 0, "more than 0, got 0"),
    ("split", "val", "one of train, valid, test, got 'val'"), ("rates", [1.0, float("inf")], "a finite number"),
    ("others", "bach/test,jsb/val", "sets as in bach/test, got 'bach/test,jsb/val'")])
def test_what_only_notebooks_take_is_checked_too(name, value, message):
    with pytest.raises(ValueError, match=f"parameter '{name}': expected {message}"):
        check_value(name, value)


@pytest.mark.parametrize(("name", "value"), [("top_p", 1.0), ("temperature", 0.0), ("others", ""), ("rates", [1, 2.5]),
                                             ("others", "bach/test,jsb/valid"), ("any", "thing")])
def test_what_can_be_is_let_through(name, value):
    check_value(name, value)


def test_each_path_of_an_archive():
    found = [archive_paths(archive, "/at/{}".format) for archive in ("", "a.zip", "my=a,b", "jsfakes=a.zip,jsb=b.json")]
    assert found == ["", "/at/a.zip", "/at/my=a,b", "jsfakes=/at/a.zip,jsb=/at/b.json"]


def test_a_whole_number_is_welcome_for_a_float():
    config = Config.from_flat({"beta_max": 2})
    assert config.train.beta_max == 2.0 and type(config.train.beta_max) is float


def test_names_are_unique_and_defaults_have_their_type():
    names = [f.name for part in PARTS for f in fields(part)]
    assert len(set(names)) == len(names) and set(names) == flat_names() and set(CHOICES) - {"split"} <= flat_names()
    assert all(typed(f, f.default) == f.default for part in PARTS for f in fields(part))
    assert Config() == Config.from_flat({}) == Config.from_flat(Config().flat())


def test_every_field_has_its_comment():
    lines = inspect.getsource(module).splitlines()
    classes = [node for node in ast.parse("\n".join(lines)).body
               if isinstance(node, ast.ClassDef) and node.name in {part.__name__ for part in PARTS}]
    assert len(classes) == 3
    for node in (field for cls in classes for field in cls.body if not isinstance(field, ast.FunctionDef)):
        assert isinstance(node, ast.AnnAssign)
        comment = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2]
        assert len(comment.split()) >= 2, f"{node.target.id} needs a comment"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    config = Config.from_flat({"preset": name})
    assert {k: config.flat()[k] for k in PRESETS[name]} == PRESETS[name]
    assert Config.from_flat({"preset": name, "steps": 7}).train.steps == 7, "a parameter overrides its preset"


def test_json_round_trip(tmp_path):
    path = tmp_path / "config.json"
    config = Config.from_flat({"preset": "tiny", "source": "bach+jsfakes", "lr": 3e-4, "tie_weights": False})
    path.write_text(json.dumps(config.to_dict()))
    assert Config.load(path) == config != Config.from_flat({"preset": "tiny"})


@pytest.mark.parametrize("text", [
    '{"data": {}', "[1]", '{"data": 3}', "3", "", '{"model": {"dmodel": 8}}', '{"x": {}}'])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a config|unknown section|unknown parameter 'dmodel'; did you mean"):
        Config.load(path)


def test_the_tokenizer_of_earlier_runs_is_read_where_it_is_the_one_left(tmp_path):
    path, nested = tmp_path / "config.json", Config.from_flat({"preset": "tiny"}).to_dict()
    path.write_text(json.dumps({**nested, "data": {**nested["data"], "tokenizer": "REMI"}}))
    assert Config.load(path) == Config.from_flat({"preset": "tiny"})
    path.write_text(json.dumps({**nested, "data": {**nested["data"], "tokenizer": "MMM"}}))
    with pytest.raises(ValueError, match="config.json is not a config: parameter 'tokenizer': expected REMI.*'MMM'"):
        Config.load(path)
    with pytest.raises(ValueError, match="unknown parameter 'tokenizer'"):
        Config.from_flat({"tokenizer": "REMI"})


def test_a_config_is_frozen_and_replace_copies():
    config = Config()
    with pytest.raises(FrozenInstanceError):
        config.train.steps = 5
    changed = config.replace(steps=5, d_model=64)
    different = {k for k, v in changed.flat().items() if config.flat()[k] != v}
    assert different == {"steps", "d_model"} and changed.train == TrainConfig(steps=5)
    with pytest.raises(ValueError, match="unknown parameter 'step'"):
        config.replace(step=5)
