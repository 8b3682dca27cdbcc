"""The setting ``sparsity``: what is accepted, what is refused, and how it is written as text."""

import pytest

import gws_compile
from gws_compile import PrunedGroups
from gws_compile.command_line.settings_text import from_environment, from_file, read
from gws_compile.config import Config
from gws_compile.settings.sparsity import KeptElements


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4:2", "N from 1 to M - 1 and M at most 64, got '4:2'"),
        ("4:4", "got '4:4'"),
        ("0:4", "got '0:4'"),
        ("2:128", "M at most 64, got '2:128'"),
        ("2-4", "sparsity must be 'N:M', such as '2:4', PrunedGroups.* or None for dense weights, got '2-4'"),
        ("rows:0.5", "PrunedGroups.*got 'rows:0.5'"),
        (0.5, "got 0.5"),
        (True, "got True"),
    ],
)
def test_bad_values(value, message):
    with pytest.raises(ValueError, match=message):
        gws_compile.backend(sparsity=value)
    with pytest.raises(ValueError, match=r"rules\[0\], 'a': .*" + message):
        gws_compile.backend(rules=[("a", {"sparsity": value})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, "share must be a number above 0 and below 1, got 0"),
        ({"share": 1.0}, "got 1.0"),
        ({"share": float("nan")}, "got nan"),
        ({"share": "half"}, "got 'half'"),
        ({"share": 0.5, "groups": "heads"}, "groups must be 'rows' or 'columns', got 'heads'"),
        ({"share": 0.5, "size": 0}, "size must be an int, 1 or more, got 0"),
        ({"share": 0.5, "start": -1}, "start must be an int, 0 or more, got -1"),
        ({"share": 0.5, "stop": 1.5}, "stop must be an int, 0 or more, got 1.5"),
        ({"share": 0.5, "start": 5}, "stop must be above start=5.*got 0"),
        ({"share": 0.5, "start": 5, "stop": 5}, "stop must be above start=5.*got 5"),
    ],
)
def test_bad_groups(arguments, message):
    with pytest.raises(ValueError, match=f"PrunedGroups.*{message}"):
        PrunedGroups(**arguments)


def test_rules_keep_it_or_change_it():
    config = Config.make(
        sparsity="2:4",
        rules=[("a.*", "int4"), ("b.*", {"sparsity": None}), ("c.*", {"sparsity": PrunedGroups(0.25, size=8)})],
    )
    assert [config.settings_of(f"{name}.w").sparsity for name in "abcd"] == [
        KeptElements(2, 4),
        None,
        PrunedGroups(0.25, size=8),
        KeptElements(2, 4),
    ]
    assert [rule.text for rule in config.rules] == ["a.*=int4", "b.*=sparsity=none", "c.*=sparsity=rows*8:0.25"]
    assert config.texts()["sparsity"] == "2:4"
    recipe = gws_compile.Recipe({"fmt": "mxfp8", "sparsity": "1:4"})
    assert Config.make(recipe=recipe).sparsity == KeptElements(1, 4)
    assert Config.make("int4", recipe=recipe, sparsity="2:4").sparsity == KeptElements(2, 4)


@pytest.mark.parametrize(
    "sparsity",
    [
        KeptElements(2, 4),
        PrunedGroups(1 / 3),
        PrunedGroups(0.5, "columns", size=16),
        PrunedGroups(0.125, "rows", start=3, stop=90),
    ],
    ids=str,
)
def test_text(sparsity, tmp_path):
    """Of the command line, the environment, a rule, and a file, which has a table too."""
    text = str(sparsity)
    assert Config.make(sparsity=read("sparsity", text)).sparsity == sparsity
    assert Config.make(**from_environment({"GWS_SPARSITY": text})).sparsity == sparsity
    (glob, given), *_ = read("rules", f"*.mlp.*=int4,sparsity={text}")
    assert Config.make(rules=[(glob, given)]).settings_of("a.mlp.b").sparsity == sparsity
    path = tmp_path / "gws.toml"
    path.write_text(f'sparsity = "{text}"\n')
    assert Config.make(**from_file(path)).sparsity == sparsity
    if isinstance(sparsity, PrunedGroups):
        keys = "".join(
            f"{name} = {getattr(sparsity, name)!r}\n" for name in ("share", "groups", "size", "start", "stop")
        )
        path.write_text(f"[sparsity]\n{keys}")
        assert Config.make(**from_file(path)).sparsity == sparsity
    path.write_text('sparsity = "none"\n')
    assert Config.make(**from_file(path)).sparsity is None


def test_text_that_is_none():
    with pytest.raises(ValueError, match=r"^GWS_SPARSITY='heads:0.5': PrunedGroups.groups must be .* got 'heads'"):
        from_environment({"GWS_SPARSITY": "heads:0.5"})
    with pytest.raises(ValueError, match=r"GWS_SPARSITY='rows:half': PrunedGroups.share must be .* got 'half'"):
        from_environment({"GWS_SPARSITY": "rows:half"})
    with pytest.raises(ValueError, match="GWS_SPARSITY='24': sparsity must be"):
        from_environment({"GWS_SPARSITY": "24"})


def test_a_transform_of_the_weights_of_the_forward_is_refused():
    operand = gws_compile.Operand("nvfp4", hadamard=16)
    with pytest.raises(ValueError, match="hadamard=16 transforms the weights of the forward too"):
        gws_compile.backend(activations=operand, rules=[("a.*", {"sparsity": "2:4"})], inner="aot_eager")
    gws_compile.backend(recipe="nvfp4", sparsity="2:4")  # which transforms wgrad's operands alone


def test_the_share_of_each_draw_is_the_same_as_a_number_and_as_a_tensor():
    import torch

    for groups in (PrunedGroups(0.37, start=3, stop=50), PrunedGroups(0.5, stop=7)):
        for count in (1, 7, 40, 1000, 4096):
            counts = [groups.count(count, step) for step in range(60)]
            assert counts == [int(groups.count(count, torch.tensor(step))) for step in range(60)]
            assert counts == sorted(counts)
            assert counts[-1] == round(groups.share * count)
