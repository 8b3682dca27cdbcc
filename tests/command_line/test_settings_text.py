"""Settings as text: the environment, a TOML file, and which of them counts."""

import inspect
import re
from pathlib import Path

import pytest
from gws_compile.passes import SKIP_VARIABLE

import gws_compile
from gws_compile import AttentionOperands, LearnedBits, Operand, Schedule
from gws_compile.command_line.settings_text import NAMES, from_environment, from_file, read, variable
from gws_compile.config import Config
from gws_compile.settings.arguments import SETTINGS


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("fmt", "fp6_e3m2", "fp6_e3m2"),
        ("noise", "none", "none"),
        ("bits", "5", 5.0),
        ("bits", "4.5", 4.5),
        ("bits", "learned", LearnedBits()),
        ("bits", "learned:average=5,granularity=weight", LearnedBits(average=5.0, granularity="weight")),
        ("block", "16x32", (16, 32)),
        ("block", "(16, 32)", (16, 32)),
        ("block", "1xall", (1, None)),
        ("block", "(None, 16)", (None, 16)),
        ("fmt", "nvfp4", "nvfp4"),
        ("fmt", "int4", "int4"),
        ("rules", "*.mlp.*=nvfp4", (("*.mlp.*", {"fmt": "nvfp4"}),)),
        (
            "rules",
            "a.*=fp8_e4m3,block=1xall,bits=4; b.*=none;c.*=noise=uniform,scale=none",
            (
                ("a.*", {"fmt": "fp8_e4m3", "block": (1, None), "bits": 4.0}),
                ("b.*", None),
                ("c.*", {"noise": "uniform", "scale": None}),
            ),
        ),
        ("rules", "a.*, b.*=int8", ((["a.*", "b.*"], {"fmt": "int8"}),)),
        ("schedule", "start=10,stop=900", Schedule(start=10, stop=900)),
        ("schedule", "bits=0:8/1000:4.5", Schedule(bits=((0, 8.0), (1000, 4.5)))),
        ("schedule", "forward=0:9000,wgrad=10:", Schedule(forward=(0, 9000), wgrad=(10, None))),
        ("activations", "mxfp8", Operand("mxfp8")),
        ("activations", "none", None),
        (
            "gradients",
            "fp8_e5m2, block=1xall, scale=amax, rounding=stochastic, products=dgrad+wgrad",
            Operand("fp8_e5m2", block=(1, None), scale="amax", rounding="stochastic", products=("dgrad", "wgrad")),
        ),
        ("attention", "fp8_tiles", "fp8_tiles"),
        ("attention", "int8,block=1x64", Operand("int8", block=(1, 64))),
        (
            "attention",
            "queries=mxfp8;values=fp8_channel;probabilities=fp8_e4m3,scale=unit",
            AttentionOperands(queries="mxfp8", values="fp8_channel", probabilities=Operand("fp8_e4m3", scale="unit")),
        ),
        ("recipe", "nvfp4", "nvfp4"),
        ("scale", "none", None),
        ("scale", "ceil", "ceil"),
        ("include", "*.mlp.*, *.attn.*", ("*.mlp.*", "*.attn.*")),
        ("exclude", "", ""),
        ("seed", "7", 7),
        ("seed", "0x10", 16),
        ("resample", "forward", "forward"),
        ("backward", "recompute", "recompute"),
        ("inner", "eager", "eager"),
        ("strict", "1", True),
        ("strict", "No", False),
        ("master", "false", False),
    ],
)
def test_text_and_environment(name, text, value):
    assert read(name, text) == value
    assert Config.make(**from_environment({variable(name): text})) == Config.make(**{name: value})


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("GWS_FMT", "fp7", "GWS_FMT='fp7': unknown format 'fp7'; accepted"),
        ("GWS_BITS", "five", "GWS_BITS='five': bits must be a number from 2 to 24, got 'five'"),
        ("GWS_BITS", "learned:avrage=5", "GWS_BITS='learned:avrage=5': LearnedBits has no 'avrage': did you mean 'ave"),
        ("GWS_BITS", "learned:init=99", "GWS_BITS='learned:init=99': LearnedBits.init must be a number from 2 to 24"),
        ("GWS_BLOCK", "32", "GWS_BLOCK='32': block must be two positive ints"),
        ("GWS_BLOCK", "a x 3", "GWS_BLOCK='a x 3': block must be two positive ints"),
        ("GWS_SCALE", "round", "GWS_SCALE='round': scale must be one of 'floor', 'ceil', 'amax', 'nvfp4', None"),
        ("GWS_RULES", "nvfp4", "GWS_RULES='nvfp4': a rule is GLOB=FORMAT, GLOB=none, or GLOB=KEY=VALUE,... with fmt"),
        ("GWS_RULES", "a=fp7", "GWS_RULES='a=fp7': rules[0], 'a': unknown format 'fp7'; accepted"),
        ("GWS_RULES", "a=int4;b=bit=3", "GWS_RULES='a=int4;b=bit=3': rules[1], 'b': unknown key 'bit': did you mean"),
        ("GWS_SCHEDULE", "begin=3", "GWS_SCHEDULE='begin=3': Schedule has no 'begin': accepted: start, stop, bits"),
        ("GWS_SCHEDULE", "stop=x", "GWS_SCHEDULE='stop=x': Schedule.stop must be an int above start=0"),
        ("GWS_SCHEDULE", "bits=8", "GWS_SCHEDULE='bits=8': Schedule.bits takes points (step, bit width)"),
        ("GWS_INCLUDE", "", "GWS_INCLUDE='': include takes globs"),
        ("GWS_SEED", "x", "GWS_SEED='x': seed must be an int"),
        ("GWS_MASTER", "maybe", "GWS_MASTER='maybe': master must be True or False, got 'maybe'"),
        ("GWS_STRICT", "maybe", "GWS_STRICT='maybe': strict must be True or False, got 'maybe'"),
        ("GWS_INNER", "nvfuser", "GWS_INNER='nvfuser': inner must be one of 'inductor'"),
    ],
)
def test_bad_values_name_their_variable(variable, text, message):
    with pytest.raises(ValueError) as raised:
        from_environment({variable: text})
    assert str(raised.value).startswith(message)


def test_unknown_variable_is_said_with_the_nearest():
    with pytest.warns(gws_compile.GwsWarning, match="variable GWS_BITZ has no effect: did you mean 'GWS_BITS'"):
        assert from_environment({"GWS_BITZ": "3"}) == {}
    assert from_environment({"HOME": "/", "GWSBITS": "3"}) == {}


def test_the_variable_that_leaves_out_passes_is_no_setting(recwarn):
    assert from_environment({SKIP_VARIABLE: "fold_casts", "GWS_BITS": "3"}) == {"bits": 3.0}
    assert not recwarn
    assert SKIP_VARIABLE not in map(variable, NAMES)


def test_file(tmp_path):
    path = tmp_path / "gws.toml"
    path.write_text(
        'fmt = "bf16"\nblock = [16, 16]\nscale = "none"\ninclude = ["a.*", "b.*"]\nseed = 3\nstrict = true\n'
        '[bits]\naverage = 5\nformats = ["fp4_e2m1", "bf16"]\n'
    )
    expected = gws_compile.backend(
        "bf16",
        block=(16, 16),
        scale=None,
        include=["a.*", "b.*"],
        seed=3,
        strict=True,
        bits=LearnedBits(average=5, formats=("fp4_e2m1", "bf16")),
    ).config
    assert Config.make(**from_file(path)) == expected
    assert hash(Config.make(**from_file(path))) == hash(expected)


def test_rules_and_schedule_in_a_file(tmp_path):
    path = tmp_path / "gws.toml"
    path.write_text(
        'fmt = "mxfp8"\n[schedule]\nstart = 5\nbits = [[10, 8.0], [100, 5]]\n'
        '[[rules]]\nmatch = ["*.layers.0.*", "*.layers.1.*"]\nfmt = "none"\n'
        '[[rules]]\nmatch = "*.mlp.*"\nfmt = "nvfp4"\nbits = 2.5\n'
        '[[rules]]\nmatch = "*.attn.*"\nfmt = "fp4_e2m1"\nscale = "nvfp4"\nblock = "1x16"\n'
        '[[rules]]\nmatch = "*.out.*"\nfmt = "int8"\nblock = [1, "all"]\n'
    )
    rules = [
        (["*.layers.0.*", "*.layers.1.*"], None),
        ("*.mlp.*", {"fmt": "nvfp4", "bits": 2.5}),
        ("*.attn.*", {"fmt": "fp4_e2m1", "scale": "nvfp4", "block": (1, 16)}),
        ("*.out.*", {"fmt": "int8", "block": (1, None)}),
    ]
    schedule = Schedule(start=5, bits=((10, 8.0), (100, 5)))
    assert Config.make(**from_file(path)) == Config.make("mxfp8", rules=rules, schedule=schedule)


def test_operands_in_a_file(tmp_path):
    path = tmp_path / "gws.toml"
    path.write_text("""
recipe = "mxfp8"
activations = "mxfp4"

[gradients]
fmt = "nvfp4"
rounding = "stochastic"
hadamard = 16

[attention]
queries = { fmt = "fp8_e4m3", block = [64, "all"], scale = "amax" }

[schedule]
forward = [0, 9000]
""")
    config = Config.make(**from_file(path))
    assert config.activations == Operand("mxfp4")
    assert config.gradients == Operand("nvfp4", rounding="stochastic", hadamard=16)
    assert config.attention == AttentionOperands(queries=Operand("fp8_e4m3", block=(64, None), scale="amax"))
    assert config.schedule == Schedule(forward=(0, 9000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gradients]\nrounding = 'stochastic'", "an operand needs a format: fmt=mxfp8, or another one, got"),
        ("[gradients]\nfmt = 'mxfp8'\nround = 'up'", "Operand has no 'round': did you mean 'rounding'"),
        ("[attention]\nquery = { fmt = 'mxfp8' }", "AttentionOperands has no 'query': did you mean 'queries'"),
        ("[schedule]\nforward = [5, 1]", r"Schedule.forward takes \(first, last\)"),
        ("activations = 8", "activations must be an Operand"),
    ],
)
def test_bad_operands_in_a_file(tmp_path, text, message):
    path = tmp_path / "gws.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_file(path)


def test_settings_that_are_good_together_are_not_refused_one_by_one():
    given = {"GWS_FMT": "fp4_e2m1", "GWS_SCALE": "nvfp4", "GWS_RULES": "a=scale=nvfp4;b=bits=24"}
    config = Config.make(**from_environment(given))
    assert (config.scale, config.settings_of("a").scale, config.settings_of("b").bits) == ("nvfp4", "nvfp4", 24.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('formt = "bf16"', "unknown key 'formt': did you mean 'fmt'?"),
        ("[bits]\navrage = 5", "LearnedBits has no 'avrage': did you mean 'average'?"),
        ("bits = 30", "bits = 30: bits must be a number from 2 to 24, got 30"),
        ('block = "32"', "block = '32': block must be two positive ints"),
        ('[[rules]]\nfmt = "nvfp4"', "a rule needs match = a glob, or a list of them, got {'fmt': 'nvfp4'}"),
        ('[[rules]]\nmatch = "a"\nfromat = "nvfp4"', "rules[0], 'a': unknown key 'fromat': did you mean 'fmt'?"),
        ("[rules]\na = 3", "rules = {'a': 3}: rules must be a list of (glob, settings)"),
        ("[schedule]\nbits = [[10, 8], [0, 5]]", "Schedule.bits must have ascending steps, got step 0 behind step 10"),
        ("[schedule]\nbit = 3", "Schedule has no 'bit': did you mean 'bits'?"),
        ("seed = 1.5", "seed = 1.5: seed must be an int"),
        ("fmt = ", "is not TOML"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "gws.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        from_file(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_code_beats_environment_beats_file(tmp_path, monkeypatch):
    path = tmp_path / "gws.toml"
    path.write_text('fmt = "fp6_e3m2"\nbits = 3\nseed = 3')
    monkeypatch.setenv("GWS_CONFIG", str(path))
    monkeypatch.setenv("GWS_BITS", "4")
    monkeypatch.setenv("GWS_SEED", "4")
    backend = gws_compile.named_backend(seed=5)
    assert (backend.config.fmt.name, backend.config.bits, backend.config.seed) == ("fp6_e3m2", 4.0, 5)
    assert gws_compile.named_backend(seed=5) is backend
    assert gws_compile.named_backend() is not backend


def test_every_setting_is_described():
    """On one line, in the words of the documentation of `gws_compile.backend`, in its order."""
    section = inspect.getdoc(gws_compile.backend).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    documented = {name: re.sub(r"\s+", " ", text.replace("``", "")) for name, text in found}
    descriptions = {setting.name: setting.help for setting in SETTINGS}
    assert descriptions == documented
    assert tuple(documented) == NAMES
    assert all(len(text) > 20 and "\n" not in text for text in descriptions.values())


def test_the_file_in_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "unmodified-scripts.md").read_text()
    path = tmp_path / "gws.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    config = Config.make(**from_file(path))
    assert (config.fmt.name, config.learned) == ("bf16", LearnedBits(average=5.0))
