"""Values of parameters are checked at construction, with errors that say what would work."""

import numpy as np
import pytest

from realera.checkpoints.writing import lora_tensors
from realera.cli import main
from realera.concepts import Concept, parse_concepts, read_concepts
from realera.edit.erasure import Erasure, erase_weight
from realera.pipelines.sampling import Sampling
from realera.settings import (
    BeyondSettings,
    NeighborSettings,
    Settings,
    SolveSettings,
    Training,
)

NAN, INF = float("nan"), float("inf")
NUMBERS = {
    NeighborSettings: ("neighbors", "s1", "s2", "d1", "d1_anchor", "seed"),
    BeyondSettings: ("beyond", "beyond_s2", "d2", "beyond_seed"),
    SolveSettings: ("lambda1", "lambda2", "suppression", "pair_weight"),
    Training: ("steps", "rank", "learning_rate", "batch", "seed", "save_every", "adversarial"),
    Sampling: ("steps", "guidance", "seed"),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF, True, "1", (1.0,), 1j, -7, 10**400], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names]
)
def test_a_number_of_another_type_or_out_of_its_range_is_refused_by_name(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} = .+: it must be a (whole|finite) number"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "given", "reason"),
    [
        (
            NeighborSettings,
            {"neighbors": 2.5},
            "neighbors = 2.5: it must be a whole number, at least 0",
        ),
        (NeighborSettings, {"neighbors": None}, "neighbors = None: it must be a whole number"),
        (SolveSettings, {"lambda2": 0}, "lambda2 = 0: it must be a finite number, larger than 0"),
        (SolveSettings, {"pair_weight": 0.0}, "pair_weight = 0.0: .* larger than 0"),
        (SolveSettings, {"bank": 1}, "bank = 1: it must be True or False"),
        (NeighborSettings, {"shared_noise": "no", "source": "isotropic"}, "shared_noise = 'no'"),
        (Training, {"gradient_checkpointing": None}, "gradient_checkpointing = None"),
        (Training, {"rank": 0}, "rank = 0: it must be a whole number, at least 1"),
        (Training, {"learning_rate": 0.0}, "learning_rate = 0.0: .* larger than 0"),
        (Sampling, {"steps": 0}, "steps = 0: it must be a whole number, at least 1"),
    ],
)
def test_each_parameter_has_a_range(kind, given, reason):
    with pytest.raises(ValueError, match=reason):
        kind(**given)


@pytest.mark.parametrize("name", ["words", "exclude", "preserve"])
def test_a_single_text_in_place_of_a_tuple_is_refused_with_the_tuple(name):
    with pytest.raises(ValueError, match=rf"{name}=\('a rocket',\)"):
        Settings.of(**{name: ("a rocket")})
    for wrong in ({"a rocket"}, None, 3):
        with pytest.raises(ValueError, match=rf"^{name} = .*: it must be a tuple of texts"):
            Settings.of(**{name: wrong})
    for wrong, shown in (("a rocket", ""), "''"), (("a rocket", " "), "' '"), ((3,), "3"):
        with pytest.raises(ValueError, match=rf"^{name} = .*: {shown} is not a text with words"):
            Settings.of(**{name: wrong})
    assert Settings.of(**{name: ["a rocket"]}).flat()[name] == ("a rocket",)


def test_templates_are_a_tuple_of_texts_everywhere(tmp_path):
    table = tmp_path / "concepts.csv"
    table.write_text("concept,anchor\ncat,dog\n", "utf-8")
    for give in (
        lambda templates: Concept("cat", "dog", templates),
        lambda templates: parse_concepts("cat -> dog", templates),
        lambda templates: read_concepts(str(table), templates),
    ):
        with pytest.raises(ValueError, match=r"templates=\('a \{\}',\)"):
            give("a {}")
    assert Concept("cat", "dog", ["a {}"]).templates == ("a {}",)
    with pytest.raises(ValueError, match="are texts, got 3"):
        Concept("cat", 3)


def test_numbers_of_numpy_become_those_of_python():
    near, solve = {"neighbors": np.int64(3), "s2": np.float64(0.4)}, {"lambda1": np.float32(0.5)}
    settings = Settings.of(**near, **solve, suppression=1)
    assert settings == Settings.of(neighbors=3, lambda1=0.5, s2=0.4, suppression=1.0)
    types = [type(settings.flat()[name]) for name in ("neighbors", "lambda1", "suppression")]
    assert types == [int, float, float]


def test_settings_are_restored_from_provenance():
    settings = Settings.of(source="isotropic", d2=3.0, beyond_seed=5, lambda2=0.3)
    assert Settings.of(**settings.flat()) == settings
    with pytest.raises(TypeError, match="no settings are named bank_limit"):
        Settings.of(bank_limit=0.5)


@pytest.mark.parametrize("tolerance", [NAN, INF, 0.0, 1.0, -0.1, "0.1"])
def test_the_tolerance_of_a_lora_lies_between_0_and_1(tolerance):
    with pytest.raises(ValueError, match=r"tolerance = .*: it must be a finite number in \(0, 1\)"):
        lora_tensors({}, Erasure({}), tolerance)


@pytest.mark.parametrize("name", ["edit_strength", "lora_strength"])
def test_a_strength_is_a_finite_number(name):
    import torch

    with pytest.raises(ValueError, match=f"{name} = nan: it must be a finite number"):
        erase_weight("layer", torch.eye(2), None, None, **{name: NAN})


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (["scope", "m", "e"], "--count", ("0", "-1", "nan", "2.5")),
        (["scope", "m", "e"], "--check", ("0", "inf")),
        (["evaluate", "m", "cat"], "--images", ("0", "nan")),
        (["evaluate", "m", "cat"], "--sample", ("-3", "1e3")),
        (["evaluate", "m", "cat"], "--seed", ("-1", "0.5")),
        (["erase", "m", "-c", "a -> b"], "--group", ("0", "x")),
        (["erase", "m", "-c", "a -> b"], "--tolerance", ("nan", "0", "1", "inf")),
        (["apply", "m", "e", "o"], "--tolerance", ("nan", "-0.1")),
        (["apply", "m", "e", "o"], "--edit-strength", ("nan", "inf", "much")),
        (["apply", "m", "e", "o"], "--lora-strength", ("-inf",)),
    ],
)
def test_a_number_on_the_command_line_is_refused_with_its_range(command, option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit):
            main([*command, f"{option}={value}"])
        error = capsys.readouterr().err
        assert f"argument {option}: '{value}': it must be a " in error
