"""The backend object: draws, switches, sharing, memory, settings without effect."""

import gc
import json
import logging
import re
import weakref

import pytest
import torch
from support.graphs import reasons
from support.oracle import sample_oracle
from support.small_models import BrokenNet, OneLayer
from support.torch_version import TORCH
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile
from gws_compile.command_line.named_backend import named_backend
from gws_compile.numerics.keys import key_words

pytestmark = pytest.mark.usefixtures("reset")


def linear(rows=40, cols=72):
    """A linear layer without bias; called with the identity matrix it returns the weight it uses, transposed."""
    return nn.Sequential(nn.Linear(cols, rows, bias=False))


def used_weight(compiled, cols=72):
    return compiled(torch.eye(cols)).detach().t()


def oracle(weight, name, step, *, fmt="fp8_e4m3", seed=0):
    fmt = gws_compile.FloatFormat.parse(fmt)
    value = sample_oracle(weight.detach().numpy(), key_words(seed, name), step, fmt, fmt.noise_bits)
    return torch.from_numpy(value)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_the_weight_that_a_linear_uses(inner):
    """Sampled, noise-free, frozen, and after optimizer steps: equal to the oracle, bit for bit."""
    model = linear()
    weight = model[0].weight
    backend = gws_compile.backend("fp8_e4m3", seed=5, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        assert torch.equal(used_weight(compiled), oracle(weight, "0.weight", step, seed=5))
        assert torch.equal(used_weight(compiled), oracle(weight, "0.weight", step, seed=5))  # the same until the step
        compiled(torch.eye(72)).sum().backward()
        optimizer.step()
    cast = gws_compile.quantize(weight, "fp8_e4m3")
    with torch.no_grad():
        assert torch.equal(used_weight(compiled), cast)
    with backend.noise(False):
        assert torch.equal(used_weight(compiled), cast)
    assert torch.equal(used_weight(compiled), oracle(weight, "0.weight", 3, seed=5))
    weight.requires_grad_(False)
    if TORCH < (2, 12):
        with pytest.raises(RuntimeError, match=r"0.weight was trainable when its graph was compiled and is frozen now"):
            used_weight(compiled)
        return
    assert torch.equal(used_weight(compiled), cast)
    assert len(backend.graphs) == 3  # training, no_grad, frozen: switching noise and stepping compiled nothing


def test_keys_have_fixed_sizes_in_the_compiled_code(reset):  # else sizes that earlier tests have varied are dynamic
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(Tied(), backend=gws_compile.backend(), dynamic=None)
    with torch.no_grad():
        compiled(torch.eye(40))
    _, (code, *_) = run_and_get_code(compiled, torch.eye(40))
    # From torch 2.14 on several inputs are asserted in one call.
    alone, together = "assert_size_stride(primals_3, (2, ), (1, )", "((primals_3, primals_4), ((2, ), (5, ))"
    assert alone in code or together in code
    assert not re.search(r"\bs\d+\b", code)


def test_manual_steps_make_one_draw_together_with_an_optimizer():
    model = linear()
    backend = gws_compile.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    used_weight(compiled)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    backend.step()
    assert torch.equal(used_weight(compiled), oracle(model[0].weight, "0.weight", 1))
    backend.step()
    assert torch.equal(used_weight(compiled), oracle(model[0].weight, "0.weight", 2))


def test_noise_in_every_forward():
    model = linear()
    backend = gws_compile.backend(inner="eager", resample="forward")
    compiled = torch.compile(model, backend=backend)
    for draw in (1, 2, 3):
        assert torch.equal(used_weight(compiled), oracle(model[0].weight, "0.weight", draw))


def test_noise_in_every_graph_of_a_forward():
    class Twice(OneLayer):
        def forward(self, x):
            first = self.fc(x)
            torch._dynamo.graph_break()
            return first, self.fc(x)

    model = Twice(bias=False)
    compiled = torch.compile(model, backend=gws_compile.backend(inner="eager", resample="forward"))
    for draws in ((1, 2), (3, 4)):
        used = [y.detach().t() for y in compiled(torch.eye(40))]
        for weight, draw in zip(used, draws, strict=True):
            assert torch.equal(weight, oracle(model.fc.weight, "fc.weight", draw))


def test_layers_that_share_a_graph_draw_their_own_noise():
    blocks = [OneLayer(bias=False) for _ in range(3)]
    for block in blocks:
        block.load_state_dict(blocks[0].state_dict())
    backend = gws_compile.backend(inner="eager")
    for block in blocks:
        block.compile(backend=backend)
    used = [block(torch.eye(40)).detach().t() for block in blocks]
    assert len(backend.graphs) == 1
    for i, weight in enumerate(used):
        assert torch.equal(weight, oracle(blocks[0].fc.weight, f"fc.weight#{i}" if i else "fc.weight", 0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.up(x), self.down(x)


def test_a_tied_weight_draws_one_sample():
    model = Tied()
    up, down = torch.compile(model, backend=gws_compile.backend(inner="eager"))(torch.eye(40))
    assert torch.equal(up, down)
    assert torch.equal(up.detach().t(), oracle(model.up.weight, "up.weight", 0))


def saved_shapes(compiled, x):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append((tuple(t.shape), t.dtype)), t)[1], lambda t: t
    ):
        out = compiled(x)
    return out, shapes


class LocalAutocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("autocast", [None, "around", "inside"])
def test_recompute_keeps_no_sampled_weight(autocast):
    model = linear(40, 72) if autocast != "inside" else LocalAutocast(*linear(40, 72))
    x = torch.randn(8, 72, requires_grad=True)
    gradients, kept = [], []
    for backward in ("save", "recompute"):
        torch._dynamo.reset()
        backend = gws_compile.backend("fp6_e3m2", backward=backward)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "around"):
            out, shapes = saved_shapes(torch.compile(model, backend=backend), x)
        out.float().square().sum().backward()
        gradients.append((x.grad.clone(), model[0].weight.grad.clone()))
        x.grad = model[0].weight.grad = None
        kept.append([dtype for shape, dtype in shapes if sorted(shape) == [40, 72]])
    compute = torch.bfloat16 if autocast else torch.float32
    assert kept == [[compute], [torch.float32]]  # the sample; then only the parameter itself
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40)
        self.out = nn.Linear(40, 40)
        self.use = True

    def forward(self, x):
        def body(y):
            return self.fc(y).relu()

        return self.out(checkpoint(body, x, use_reentrant=False) if self.use else body(x))


@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(backward):
    model, x = Checkpointed(), torch.randn(8, 40)
    results = []
    for use in (True, False):
        torch._dynamo.reset()
        model.use = use
        model.zero_grad()
        backend = gws_compile.backend("fp6_e3m2", backward=backward)
        torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
        assert reasons(backend) == {"fc.weight": "linear", "out.weight": "linear"}
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_steps_do_not_recompile():
    model = linear()
    backend = gws_compile.backend(inner="eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(100):
        compiled(torch.eye(72)).sum().backward()
        optimizer.step()
    assert len(backend.graphs) == 1
    assert backend.state_dict()["step"] == 100


def test_gradient_checkpointing_around_the_compiled_region_sees_one_draw():
    model, x = linear(), torch.randn(8, 72)
    backend = gws_compile.backend(inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    compiled(x).square().sum().backward()
    plain, model[0].weight.grad = model[0].weight.grad, None
    out = checkpoint(compiled, x, use_reentrant=False)
    backend.step()  # asked for between forward and backward: the recomputation still sees the old draw
    out.square().sum().backward()
    assert torch.equal(model[0].weight.grad, plain)


def test_state():
    backend = gws_compile.backend("fp6_e3m2", seed=3)
    backend.step()
    state = backend.state_dict()
    assert state == {
        "seed": 3,
        "fmt": "e3m2",
        "step": 1,
        "weights": [],
        "settings": [],
        "rules": [],
        "operands": ["", "", ""],
        "master": 1,
        "updates": 0,
    }
    other = gws_compile.backend("fp6_e3m2", seed=3, inner="eager")
    other.load_state_dict(state)
    model = linear()
    used = used_weight(torch.compile(model, backend=other))
    assert torch.equal(used, oracle(model[0].weight, "0.weight", 1, fmt="fp6_e3m2", seed=3))
    with pytest.raises(ValueError, match="saved with seed=3, this backend has 0"):
        gws_compile.backend("fp6_e3m2").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with fmt='e3m2', this backend has 'e4m3'"):
        gws_compile.backend(seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"not a state of gws_compile: fmt, seed, weights missing, got \['step'\]"):
        other.load_state_dict({"step": 1})


def test_fixed_widths_have_nothing_to_train():
    backend = gws_compile.backend()
    assert list(backend.parameters()) == []
    assert backend.bit_loss() == 0


def test_entries_of_dead_models_are_freed():
    backend = gws_compile.backend(inner="eager")
    model = linear()
    compiled = torch.compile(model, backend=backend)
    used_weight(compiled)
    assert backend.state_dict()["weights"] == [["0.weight", [40, 72]]]
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert backend.state_dict()["weights"] == []


@pytest.mark.parametrize("bits", [None, gws_compile.LearnedBits(average=5.0)], ids=["fixed", "learned"])
def test_weights_are_freed_behind_a_graph_break(bits):
    """torch never lets go of what a backend has returned for such a model."""
    model, backend = BrokenNet(), gws_compile.backend(bits=bits, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(2, 40)).sum().backward()
    assert len(backend.report().rewritten) == 2
    weights = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    del model, compiled, backend
    torch._dynamo.reset()
    gc.collect()
    assert [one() for one in weights] == [None, None]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 4)

    def forward(self, x):
        return self.lm_head(self.fc(x))


def test_report():
    backend = gws_compile.backend("fp6_e3m2", inner="eager")
    assert "nothing has been compiled" in str(backend.report())
    compiled = torch.compile(TwoLayers(), backend=backend)
    assert [(r.name, r.op, r.rewritten) for r in backend.report()] == [
        ("fc.weight", "", False), ("lm_head.weight", "", False)
    ]  # fmt: skip
    with torch.no_grad():
        compiled(torch.ones(2, 4))
    assert backend.report().rewritten[0].noise == "none"
    compiled(torch.ones(2, 4))
    report = backend.report()
    (fc,), (head,) = report.rewritten, report.skipped
    assert (fc.name, fc.shape, fc.op, fc.fmt, fc.bits, fc.noise) == (
        "fc.weight", (4, 4), "linear", "fp6_e3m2", 4.0, "rounded_normal",
    )  # fmt: skip
    assert fc.location.split(":")[0].endswith("test_backend.py")
    assert (head.rewritten, head.reason) == (False, "matches the exclude pattern 'lm_head.*'")
    assert [r["name"] for r in json.loads(report.to_json())] == ["fc.weight", "lm_head.weight"]
    assert "1 of 2 weights rewritten, 16 of 32 elements" in str(report)


def test_explain_compiles_nothing_and_changes_nothing():
    model, x = TwoLayers(), torch.ones(2, 4)
    generator = torch.get_rng_state()
    report = gws_compile.explain(model, x, fmt="fp4_e2m1")
    assert [(r.name, r.fmt) for r in report.rewritten] == [("fc.weight", "fp4_e2m1")]
    assert torch.equal(torch.get_rng_state(), generator)
    backend = gws_compile.backend("bf16", exclude=None)
    report = gws_compile.explain(model, x, backend=backend)
    assert [(r.name, r.fmt) for r in report.rewritten] == [("fc.weight", "bf16"), ("lm_head.weight", "bf16")]
    assert backend.graphs == []
    assert torch.equal(model(x), torch.nn.functional.linear(model.fc(x), model.lm_head.weight, model.lm_head.bias))


def test_warnings_for_settings_without_effect():
    model = TwoLayers()

    def compile_with(**settings):
        torch._dynamo.reset()
        torch.compile(model, backend=gws_compile.backend(inner="eager", **settings))(
            torch.ones(2, 4, dtype=model.fc.weight.dtype)
        )

    with pytest.warns(gws_compile.GwsWarning, match=r"include='\*.mlp.\*' has matched no weight so far.*fc.weight, lm"):
        compile_with(include=["fc.*", "*.mlp.*"])
    with pytest.warns(gws_compile.GwsWarning, match=r"exclude='norm\*' has matched no weight so far"):
        compile_with(exclude=["norm*"])
    with pytest.warns(gws_compile.GwsWarning, match="include='lm_head.weight' matches weights that are left alone"):
        compile_with(include=["fc.*", "lm_head.weight"])
    with pytest.warns(gws_compile.GwsWarning, match="no weight has been rewritten so far: fc.weight: matches the excl"):
        compile_with(exclude=["*"])
    model.bfloat16()
    with pytest.warns(gws_compile.GwsWarning, match="'fp15_e4m10' has 10 mantissa bits, but the weights are bfloat16"):
        compile_with(fmt="e4m10")


def test_strict():
    def compile_with(model, **settings):
        torch._dynamo.reset()
        torch.compile(model, backend=gws_compile.backend(inner="eager", strict=True, **settings))(torch.ones(2, 4))

    compile_with(TwoLayers())
    failed = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(failed, match="strict=True, and no weight was rewritten: it has no weight matrices"):
        compile_with(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(
        failed, match=r"include='lm_head.weight' matches weights that are left alone: lm_head.weight: mat"
    ):
        compile_with(TwoLayers(), include=["fc.*", "lm_head.weight"])


def test_options_and_mode_reach_inductor():
    model = linear()
    backend = gws_compile.backend("fp8_e4m3")
    compiled = torch.compile(model, backend=backend, options={"max_autotune": True})
    assert torch.equal(used_weight(compiled), oracle(model[0].weight, "0.weight", 0))
    torch._dynamo.reset()
    failed = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(failed, match="Unexpected optimization option no_such_option"):
        torch.compile(model, backend=backend, options={"no_such_option": 1})(torch.eye(72))
    torch._dynamo.reset()
    with pytest.raises(failed, match="mode='max-autotune' and options=None are Inductor's, but inner is 'eager'"):
        torch.compile(model, backend=gws_compile.backend(inner="eager"), mode="max-autotune")(torch.eye(72))


def test_inner_may_be_a_callable():
    seen = []

    def inner(gm, example_inputs):
        seen.append(len(example_inputs))
        return gm.forward

    model = linear()
    used_weight(torch.compile(model, backend=gws_compile.backend(inner=inner)))
    assert seen == [4]  # input, weight, keys, clock


def test_by_name():
    model = linear()
    options = {"fmt": "fp6_e3m2", "inner": "eager", "seed": 9}
    compiled = torch.compile(model, backend="gws", options=options)
    used = used_weight(compiled)
    assert torch.equal(used, oracle(model[0].weight, "0.weight", 0, fmt="fp6_e3m2", seed=9))
    assert named_backend(**options).report().rewritten[0].name == "0.weight"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="unknown format 'fp7'"):
        torch.compile(model, backend="gws", options={"fmt": "fp7"})(torch.eye(72))


def test_logging(caplog):
    with caplog.at_level(logging.DEBUG, logger="gws_compile"):
        torch.compile(TwoLayers(), backend=gws_compile.backend(inner="eager"))(torch.ones(2, 4))
    messages = [r.getMessage() for r in caplog.records if r.name == "gws_compile"]
    assert messages[0].startswith("graph 0: 2 weights found, 1 rewritten;")
    assert "graph 0: lm_head.weight: matches the exclude pattern 'lm_head.*'" in messages


def test_structured_trace(tmp_path):
    """TORCH_TRACE holds the graph before and after, for tlparse."""
    import subprocess
    import sys

    program = (
        "import torch, gws_compile\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "torch.compile(m, backend=gws_compile.backend(inner='eager'))(torch.ones(2, 4))\n"
    )
    environment = {**__import__("os").environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+gws_compile"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (trace,) = tmp_path.iterdir()
    text = trace.read_text()
    assert '"name": "gws_compile_before_0"' in text
    assert "torch.ops.gws.sample_weight.default" in text[text.index('"name": "gws_compile_after_0"') :]
    assert "1 weights found, 1 rewritten" in done.stderr


def test_the_graph_that_dynamo_made_stays_as_it_is():
    seen = []

    class Spy(gws_compile.Backend):
        def __call__(self, gm, example_inputs, **settings):
            seen.append((gm, str(gm.graph)))
            return super().__call__(gm, example_inputs, **settings)

    spy = Spy(gws_compile.backend(inner="eager").config)
    torch.compile(Checkpointed(), backend=spy)(torch.ones(2, 40))
    ((gm, before),) = seen
    assert str(gm.graph) == before
    assert "gws" not in gm.print_readable(print_output=False)
