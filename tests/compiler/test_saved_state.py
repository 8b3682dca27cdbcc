"""``Backend.load_state_dict``: what is refused, and that a refused state changes nothing."""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.small_models import OneLayer
from torch import nn
from torch._subclasses import FakeTensorMode

import gws_compile
from gws_compile.compiler.saved_state import SavedState

NAN, INF = float("nan"), float("inf")


def make(*, average=5.0, granularity="block", **settings):
    torch._dynamo.reset()
    bits = gws_compile.LearnedBits(average=average, granularity=granularity)
    return gws_compile.backend(bits=bits, inner="eager", **settings)


def trained():
    """A model of one layer without bias, its compiled form and its backend, behind an optimizer step."""
    torch.manual_seed(0)
    model, backend = OneLayer(bias=False), make()
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(2, 40)).square().sum().backward()
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=1e-4)
    (compiled(torch.randn(2, 40)).square().sum() + backend.bit_loss()).backward()
    optimizer.step()
    return model, compiled, backend


@pytest.fixture(scope="module")
def live():
    return trained()


def other(state):
    """A valid state that differs from this one in all that is taken over."""
    return {
        **state,
        "step": state["step"] + 7,
        "weights": [*state["weights"], ["another.weight", [8, 8]]],
        "settings": [*state["settings"], ["another.weight", "e8m7 32x32 floor"]],
        "bits": {**{name: value + 1 for name, value in state["bits"].items()}, "another.weight": torch.ones(1, 1)},
        "frozen": 1,
        "steering": {key: value + 1 for key, value in state["steering"].items()},
    }


def same(one, two):
    """Whether two states are equal, bit for bit."""
    tensors = [{**state["bits"], **state.get("steering", {})} for state in (one, two)]
    plain = [{key: value for key, value in state.items() if key not in ("bits", "steering")} for state in (one, two)]
    return (
        plain[0] == plain[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    )


def changed(key, value):
    return lambda state: {**state, key: value}


def bit(value):
    return lambda state: {**state, "bits": {**state["bits"], "fc.weight": value}}


def steered(**values):
    return lambda state: {**state, "steering": {**state["steering"], **values}}


def entry(value):
    return lambda state: {**state, "weights": [value, *state["weights"]]}


def fake():
    with FakeTensorMode():
        return torch.ones(2, 2)


BAD = {
    # No state at all.
    "none": (lambda state: None, "not a state of gws_compile: it must be a mapping of its keys, got None"),
    "list": (lambda state: [*state], r"it must be a mapping of its keys, got \['seed', 'fmt'"),
    "text": (lambda state: "state", "it must be a mapping of its keys, got 'state'"),
    "empty": (lambda state: {}, r"bits, fmt, frozen, seed, steering, step, weights missing, got \[\]"),
    "odd keys": (lambda state: {1: 2, "step": 0}, r"weights missing, got \['1', 'step'\]"),
    **{
        f"without {key}": (lambda state, key=key: {k: v for k, v in state.items() if k != key}, f"{key} missing, got")
        for key in ("seed", "fmt", "step", "weights", "bits", "frozen", "steering")
    },
    # Of another run.
    "seed": (changed("seed", 3), "saved with seed=3, this backend has 0"),
    "seed text": (changed("seed", "0"), "saved with seed='0', this backend has 0"),
    "seed bool": (changed("seed", False), "saved with seed=False, this backend has 0"),
    "seed float": (changed("seed", 0.0), r"saved with seed=0\.0, this backend has 0"),
    "seeds": (changed("seed", torch.tensor([0, 1])), r"saved with seed=a int64 tensor of shape \(2,\) of 0, 1, this"),
    "fmt": (changed("fmt", "e3m2"), "saved with fmt='e3m2', this backend has 'e8m7'"),
    "fmt none": (changed("fmt", None), "saved with fmt=None, this backend has 'e8m7'"),
    # The clock.
    **{
        f"step {value!r}": (
            changed("step", value),
            rf"the state's step must be an int in 0 \.\. 2\*\*32 - 1, got {shown}",
        )
        for value, shown in [
            (-1, "-1"),
            (0.5, "0.5"),
            (2.0, "2.0"),
            (True, "True"),
            (2**32, "4294967296"),
            (10**30, "10{30}"),
            (NAN, "nan"),
            ("3", "'3'"),
            (None, "None"),
            ([3], r"\[3\]"),
            (torch.tensor([3]), r"a int64 tensor of shape \(1,\) of 3"),
            (torch.tensor(3.0), r"a float32 tensor of shape \(\) of 3.0"),
            (torch.tensor(True), r"a bool tensor of shape \(\) of True"),
            (torch.empty((), dtype=torch.int64, device="meta"), r"a int64 tensor of shape \(\)$"),
            (np.float32(3), ".*3.0"),
            (np.bool_(True), ".*True"),
        ]
    },
    # The rules, and what became of the weights by them.
    "rules text": (changed("rules", "a=nvfp4"), "the state's rules must be a list of texts, got 'a=nvfp4'"),
    "other rules": (
        changed("rules", ["a=nvfp4"]),
        r"the state was saved with rules=\['a=nvfp4'\], this backend has \[\]",
    ),
    "settings mapping": (
        changed("settings", {}),
        r"the state's settings must be a list of \[name, text\], got a mapping",
    ),
    "settings entry": (changed("settings", [["fc.weight", 3]]), r"settings\[0\] must be a pair of name and text, got"),
    "other settings": (
        changed("settings", [["fc.weight", "e8m7 16x16 floor"]]),
        r"fc.weight in 'e8m7 16x16 floor' \(format, block, scale, sparsity\), this backend has 'e8m7 32x32 floor'",
    ),
    # The weights.
    "weights none": (changed("weights", None), r"weights must be a list of \[name, shape\], got None"),
    "weights text": (changed("weights", "fc.weight"), r"must be a list of \[name, shape\], got 'fc.weight'"),
    "weights mapping": (changed("weights", {"fc.weight": [40, 40]}), r"got a mapping of \['fc.weight'\]"),
    "weights tensor": (changed("weights", torch.ones(2, 2)), "got a float32 tensor"),
    "entry none": (entry(None), r"the state's weights\[0\] must be a pair of name and shape, got None"),
    "entry text": (entry("ab"), r"weights\[0\] must be a pair of name and shape, got 'ab'"),
    "entry long": (entry(["a", [2, 2], 1]), "must be a pair of name and shape, got"),
    "entry without name": (entry([None, [2, 2]]), "a pair whose name is a text that is not empty, got"),
    "entry empty name": (entry(["", [2, 2]]), "a pair whose name is a text that is not empty, got"),
    "entry twice": (entry(["fc.weight", [40, 40]]), r"weights\[1\] must be of a name that no other entry has"),
    **{
        f"dims {dims!r}": (entry(["a", dims]), "a list of two or more ints, none negative, got")
        for dims in ([], [3], [-1, 4], [2.0, 4], [True, 4], ["2", 4], [None, 4], None, 4, "44", torch.ones(2))
    },
    "live shape": (
        lambda state: {**state, "weights": [["fc.weight", [40, 39]]]},
        r"the state was saved with fc.weight of shape \(40, 39\), this model has it of shape \(40, 40\)",
    ),
    # The widths.
    "bits none": (
        changed("bits", None),
        "the state's bits must be a mapping of weight names to float32 tensors, got N",
    ),
    "bits list": (changed("bits", [torch.ones(2, 2)]), "bits must be a mapping of weight names to float32 tensors"),
    "bits number": (changed("bits", 5.0), "bits must be a mapping of weight names to float32 tensors, got 5.0"),
    "bits empty": (
        changed("bits", {}),
        r"no bit widths for fc.weight, another.weight: call Backend.prepare\(model, ...\) before",
    ),
    "bits key": (
        lambda state: {**state, "bits": {**state["bits"], 3: torch.ones(2, 2)}},
        "the state's bits must be a mapping whose keys are weight names, got 3",
    ),
    **{
        f"widths {label}": (bit(value), rf"the state's bits\['fc.weight'\] must be {message}")
        for label, value, message in [
            ("none", None, "a float32 tensor, got None"),
            ("text", "5", "a float32 tensor, got '5'"),
            ("number", 5.0, "a float32 tensor, got 5.0"),
            ("list", [[1.0, 1.0], [1.0, 1.0]], r"a float32 tensor, got \[\[1.0"),
            ("array", np.ones((2, 2), np.float32), r"a float32 tensor, got array\("),
            (
                "float64",
                torch.ones(2, 2, dtype=torch.float64),
                r"a float32 tensor, got a float64 tensor of shape \(2, 2\)",
            ),
            ("bfloat16", torch.ones(2, 2, dtype=torch.bfloat16), "a float32 tensor, got a bfloat16 tensor"),
            ("int", torch.ones(2, 2, dtype=torch.int64), "a float32 tensor, got a int64 tensor"),
            ("meta", torch.ones(2, 2, device="meta"), "a float32 tensor, got a float32 tensor of shape"),
            ("fake", fake(), "a float32 tensor, got a float32 tensor of shape"),
            ("sparse", torch.ones(2, 2).to_sparse(), "a float32 tensor, got a float32 tensor of shape"),
            (
                "nan",
                torch.tensor([[1, NAN], [1, 1]]),
                r"of finite numbers, got a float32 tensor of shape \(2, 2\) of nan",
            ),
            ("inf", torch.tensor([[1, 1], [1, -INF]]), "of finite numbers, got a float32 tensor .* of -inf"),
        ]
    },
    **{
        f"widths of shape {tuple(shape)}": (
            bit(torch.ones(shape)),
            rf"saved with bit widths of shape {re.escape(str(tuple(shape)))} for fc.weight, this backend has \(2, 2\)",
        )
        for shape in [(), (2,), (1, 2), (2, 3), (1, 2, 2), (40, 40)]
    },
    "widths to come": (
        lambda state: {
            **state,
            "weights": [*state["weights"], ["to.come", [4, 40, 64]]],
            "bits": {**state["bits"], "to.come": torch.ones(3, 2, 2)},
        },
        r"of shape \(3, 2, 2\) for to.come, this backend has \(1, 80\) or \(4, 2, 2\)",
    ),
    # What is fixed, and the constraint.
    **{
        f"frozen {value!r}": (changed("frozen", value), f"the state's frozen must be 0 or 1, got {shown}")
        for value, shown in [(2, "2"), (-1, "-1"), (0.0, "0.0"), ("1", "'1'"), (None, "None"), (NAN, "nan")]
    },
    "steering none": (changed("steering", None), "steering must be a mapping of 'multiplier' and 'scale', got None"),
    "steering list": (changed("steering", [torch.ones(()), torch.ones(())]), "steering must be a mapping of"),
    "steering less": (changed("steering", {"scale": torch.ones(())}), r"got a mapping of \['scale'\]"),
    "steering more": (steered(rate=torch.ones(())), r"got a mapping of \['multiplier', 'scale', 'rate'\]"),
    "scale none": (steered(scale=None), r"the state's steering\['scale'\] must be a float32 tensor, got None"),
    "scale number": (steered(scale=1.0), r"steering\['scale'\] must be a float32 tensor, got 1.0"),
    "scale nan": (steered(scale=torch.tensor(NAN)), r"steering\['scale'\] must be of finite numbers, got .* of nan"),
    "scale negative": (steered(scale=torch.tensor(-1.0)), r"\['scale'\] must be a scalar that is not negative, got"),
    "multiplier inf": (steered(multiplier=torch.tensor(INF)), r"\['multiplier'\] must be of finite numbers, got"),
    "multiplier shape": (
        steered(multiplier=torch.ones(1)),
        r"\['multiplier'\] must be a scalar, got a .* shape \(1,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_is_refused_as_a_whole(live, case):
    """It is good but for one thing, and differs from the backend in everything else."""
    spoil, message = BAD[case]
    model, _, backend = live
    before, parameters = backend.state_dict(), dict(backend.named_parameters())
    with pytest.raises(ValueError, match=message):
        backend.load_state_dict(spoil(other(before)))
    after, kept = backend.state_dict(), dict(backend.named_parameters())
    assert same(before, after)
    assert after["step"] == 1
    assert after["frozen"] == 0
    assert all(kept[name] is parameter and parameter.requires_grad for name, parameter in parameters.items())
    assert model.fc.weight.requires_grad


def test_behind_refused_states_training_goes_on_as_without_them():
    def run(states):
        model, compiled, backend = trained()
        for spoil, _ in states:
            with pytest.raises(ValueError, match="state"):
                backend.load_state_dict(spoil(other(backend.state_dict())))
        results = []
        optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=1e-4)
        for step in range(2):
            optimizer.zero_grad()
            out = compiled(torch.full((2, 40), 0.5 + step))
            (out.square().sum() + backend.bit_loss()).backward()
            optimizer.step()
            results += [out.detach(), *(value.clone() for value in backend.bits().values())]
        return results, backend.state_dict()

    plain, plain_state = run([])
    refused, refused_state = run(BAD.values())
    assert len(plain) == len(refused) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, refused, strict=True))
    assert same(plain_state, refused_state)
    assert plain_state["step"] == 3


def test_a_good_state_is_taken_over_as_a_whole():
    _, _, backend = trained()
    state = other(backend.state_dict())
    given = copy.deepcopy(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.load_state_dict(state)
    assert same(backend.state_dict(), given)
    assert same(state, given)
    assert not any(parameter.requires_grad for parameter in backend.parameters())
    for value in [*state["bits"].values(), *state["steering"].values()]:
        value.zero_()  # the caller's own again
    assert same(backend.state_dict(), given)


def test_the_next_state_leaves_nothing_of_the_last():
    backend = make()
    first = other(
        {
            "seed": 0,
            "fmt": "e8m7",
            "step": 0,
            "weights": [],
            "settings": [],
            "rules": [],
            "operands": ["", "", ""],
            "master": 1,
            "updates": 0,
            "bits": {},
            "steering": constraint(),
        }
    )
    backend.load_state_dict(first)
    second = {
        **first,
        "weights": [["b", [4, 4]]],
        "settings": [["b", "e8m7 32x32 floor"]],
        "bits": {"b": torch.ones(1, 1)},
        "frozen": 0,
    }
    backend.load_state_dict(second)
    assert same(backend.state_dict(), second)


def constraint():
    return {"multiplier": torch.tensor(-0.5), "scale": torch.tensor(0.0)}


@pytest.mark.parametrize("step", [0, 2**31, 2**32 - 1])
def test_every_draw_has_a_number(step):
    """The noise at both ends of the range; behind the last draw comes draw 0."""
    torch._dynamo.reset()
    backend, model = gws_compile.backend(inner="eager"), OneLayer(bias=False)
    backend.load_state_dict({**backend.state_dict(), "step": step})
    compiled = torch.compile(model, backend=backend)
    for draw in (step, (step + 1) % 2**32):
        expected = gws_compile.sample(model.fc.weight, "fp8_e4m3", name="fc.weight", step=draw)
        assert torch.equal(compiled(torch.eye(40)), expected.t())
        assert backend.state_dict()["step"] == draw
        backend.step()


@pytest.mark.parametrize("number", [int, torch.tensor, np.int64, np.array])
def test_numbers_may_come_as_checkpoints_have_them(number):
    _, _, backend = trained()
    state = other(backend.state_dict())
    given = {
        **state,
        "seed": number(0),
        "step": number(state["step"]),
        "frozen": number(1),
        "weights": tuple((name, tuple(map(number, shape))) for name, shape in state["weights"]),
    }
    backend.load_state_dict(given)
    assert same(backend.state_dict(), state)
    assert type(backend.state_dict()["step"]) is int
    assert all(type(size) is int for _, shape in backend.state_dict()["weights"] for size in shape)


def test_widths_that_no_weight_has_yet_are_refused_at_every_call():
    """Of prepared weights the state has no shapes: it shows when the weight comes."""
    backend, model = make(), OneLayer(bias=False)
    state = {"bits": {"fc.weight": torch.ones(3, 2)}, "weights": [], "frozen": 0, "steering": constraint()}
    backend.load_state_dict({**backend.state_dict(), **state})
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of shape \(3, 2\) for fc.weight, this backend has \(2, 2\)"):
            compiled(torch.randn(2, 40))


def test_learned_widths_in_a_distributed_checkpoint(tmp_path):
    model, _, backend = trained()
    dcp.save({"pqt": backend}, checkpoint_id=tmp_path)
    fresh = make()
    fresh.prepare(model, torch.randn(2, 40))
    dcp.load({"pqt": fresh}, checkpoint_id=tmp_path)
    assert same(fresh.state_dict(), backend.state_dict())
    unprepared = make()
    before = unprepared.state_dict()
    with pytest.raises(ValueError, match=r"no bit widths for fc.weight: call Backend.prepare"):
        dcp.load({"pqt": unprepared}, checkpoint_id=tmp_path)
    assert same(unprepared.state_dict(), before)


def test_what_a_backend_has_no_use_for_is_ignored():
    _, _, backend = trained()
    state = {**backend.state_dict(), "note": object()}
    make().load_state_dict(state)
    fixed = gws_compile.backend("bf16")
    fixed.load_state_dict({**state, "bits": None, "frozen": 7})
    kept = ("seed", "fmt", "step", "weights", "settings", "rules", "operands", "master", "updates")
    assert fixed.state_dict() == {key: state[key] for key in kept}
    make(average=None).load_state_dict({**state, "steering": None})


def test_reading_changes_nothing():
    _, _, backend = trained()
    state = other(backend.state_dict())
    given = copy.deepcopy(state)
    saved = SavedState.read(state, backend.config)
    assert same(state, given)
    assert saved.step == state["step"]
    assert saved.shapes == {"fc.weight": (40, 40), "another.weight": (8, 8)}
    assert saved.widths.frozen
    for name, value in saved.widths.bits.items():
        assert torch.equal(value, state["bits"][name])
        assert value.data_ptr() != state["bits"][name].data_ptr()
    assert saved.widths.steering == state["steering"]


def test_a_warning_that_is_made_an_error_refuses_as_well():
    _, _, backend = trained()
    before = backend.state_dict()
    state = {**other(before), "weights": [["another.weight", [8, 8]]]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gws_compile.GwsWarning, match=r"fc\.weight is not among"):
            backend.load_state_dict(state)
    assert same(backend.state_dict(), before)
    with pytest.warns(gws_compile.GwsWarning, match=r"fc\.weight is not among") as caught:
        backend.load_state_dict(state)
    assert len(caught) == 1
    assert backend.state_dict()["step"] == state["step"]


def test_a_state_is_loaded_in_inference_mode_and_trained_on():
    _, compiled, backend = trained()
    with torch.inference_mode():
        backend.load_state_dict({**other(backend.state_dict()), "frozen": 0})
    (compiled(torch.randn(2, 40)).sum() + backend.bit_loss()).backward()
    assert all(parameter.grad is not None for parameter in backend.parameters())
    fresh = make()
    with torch.inference_mode():
        fresh.load_state_dict(backend.state_dict())
    model = OneLayer(bias=False)
    torch.compile(model, backend=fresh)(torch.randn(2, 40)).sum().backward()
    fresh.bit_loss().backward()
    assert same(fresh.state_dict(), backend.state_dict())


class Mixed(nn.Module):
    """A layer that is trained, and one that is frozen: cast alone, without widths."""

    def __init__(self):
        super().__init__()
        self.frozen, self.fc = nn.Linear(40, 40).requires_grad_(False), nn.Linear(40, 40)

    def forward(self, x):
        return self.fc(self.frozen(x).relu())


def test_a_model_with_frozen_weights_takes_its_own_state():
    model, backend = Mixed(), make()
    torch.compile(model, backend=backend)(torch.randn(2, 40)).sum().backward()
    state = backend.state_dict()
    assert {name for name, _ in state["weights"]} == set(state["bits"]) == {"fc.weight"}
    backend.load_state_dict(state)
    fresh = make()
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)
