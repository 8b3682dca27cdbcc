"""Which draw a training forward sees: one for each optimizer step, whoever takes it."""

import warnings

import pytest
import torch
from support import eager
from support.small_models import BrokenNet, Net, traces_own_modules
from torch import nn

import gws_compile
from gws_compile.compiler.diagnostics import MANY_FORWARDS, MANY_STEPS

pytestmark = pytest.mark.usefixtures("reset")


SAMPLED = ("up.weight", "down.weight")


def loss_of(call, x):
    return call(x).square().mean()


def optimizers(model):
    """name -> optimizers that are stepped one after another, and how."""
    parameters = list(model.parameters())
    yield "foreach", [torch.optim.SGD(parameters, lr=0.1, foreach=True)], None
    yield "for loop", [torch.optim.SGD(parameters, lr=0.1, foreach=False)], None
    yield "fused", [torch.optim.SGD(parameters, lr=0.1, fused=True)], None
    yield "two", [torch.optim.SGD(parameters[:2], lr=0.1), torch.optim.SGD(parameters[2:], lr=0.1)], None
    yield "closure", [torch.optim.SGD(parameters, lr=0.1)], "closure"
    yield "compiled", [torch.optim.SGD(parameters, lr=0.1)], "compiled"


@pytest.mark.parametrize("kind", ["foreach", "for loop", "fused", "two", "closure", "compiled"])
@pytest.mark.parametrize("net", [Net, BrokenNet])
def test_optimizers_are_followed(kind, net):
    """Two micro-batches a step, without a graph break and with one: the losses of the eager oracle, bit for bit."""
    model, oracle = net(), Net()
    oracle.load_state_dict(model.state_dict())
    backend = gws_compile.backend("fp6_e3m2", inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    (opts, how) = next((o, h) for name, o, h in optimizers(model) if name == kind)
    if how == "compiled":
        opts[0].step = torch.compile(opts[0].step, backend="eager")
    batches = [[torch.randn(8, 40) for _ in range(2)] for _ in range(4)]
    losses = []
    for micro in batches:
        total = 0.0
        for optimizer in opts:
            optimizer.zero_grad()
        for x in micro:
            loss = loss_of(compiled, x)
            (loss / 2).backward()
            total += loss.item() / 2
        losses.append(total)
        for optimizer in opts:
            optimizer.step((lambda: None) if how == "closure" else None)
    expected = eager.train(oracle, batches, loss_of, SAMPLED, "fp6_e3m2")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert len(backend.graphs) == (1 if net is Net else 2)
    assert backend.state_dict()["step"] == 4


@pytest.mark.parametrize("bits", [None, gws_compile.LearnedBits(average=5.0)], ids=["fixed", "learned"])
def test_a_compiled_optimizer_step_is_not_compiled_again(bits):
    model = Net()
    backend = gws_compile.backend(bits=bits, inner="eager")
    compiled = torch.compile(model, backend=backend)
    backend.prepare(model, torch.randn(8, 40))
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=0.1)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    frames = []
    for _ in range(6):
        loss_of(compiled, torch.randn(8, 40)).backward()
        step()
        frames.append(counter.frame_count)
    assert frames[2:] == frames[2:3] * 4  # SGD itself is traced twice, before and after its state exists
    assert backend.state_dict()["step"] == 6


def test_a_step_that_grad_scaler_leaves_out_is_none():
    model = Net()
    backend = gws_compile.backend("fp6_e3m2", inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for i in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(compiled, torch.randn(8, 40))
        scaler.scale(loss * (float("inf") if i == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append(backend.state_dict()["step"])
    assert steps == [1, 1, 2, 3]


def test_the_draw_starts_with_the_next_forward():
    """Draws are numbered by steps, not by forwards; evaluation in between changes nothing."""
    model = nn.ModuleDict({"fc": nn.Linear(40, 40, bias=False)})
    weight = model["fc"].weight
    compiled = torch.compile(lambda x: model["fc"](x), backend=gws_compile.backend(inner="eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in (0, 2, 3):
        with torch.no_grad():
            assert torch.equal(compiled(torch.eye(40)).t(), gws_compile.quantize(weight, "fp8_e4m3"))
        used = compiled(torch.eye(40)).detach().t()
        assert torch.equal(used, gws_compile.sample(weight, "fp8_e4m3", name="fc.weight", step=min(step, 2)))
        if step == 0:
            used = compiled(torch.eye(40))
            optimizer.step()
            with torch.no_grad():
                compiled(torch.eye(40))
            compiled(torch.eye(40))
            optimizer.step()


def test_a_loop_of_its_own_is_warned_once_and_served_by_step():
    model = Net()
    backend = gws_compile.backend("fp6_e3m2", inner="eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(8, 40)

    def update():
        loss_of(compiled, x).backward()
        for p in model.parameters():
            p.data -= 0.01 * p.grad
            p.grad = None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MANY_FORWARDS - 1):
            update()
    with pytest.warns(gws_compile.GwsWarning, match=f"{MANY_FORWARDS} training forwards have used the same noise"):
        update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MANY_FORWARDS + 1):
            update()
        for _ in range(MANY_FORWARDS + 1):
            update()
            backend.step()
    assert backend.state_dict()["step"] == MANY_FORWARDS + 1


def test_layers_that_share_a_graph_are_no_repetition():
    """129 layers of one compiled block: one forward each, though the graph runs 129 times."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(MANY_FORWARDS + 1))
    backend = gws_compile.backend(inner="eager", block=(4, 4))
    block = torch.compile(lambda layer, x: layer(x), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in layers:
            block(layer, torch.ones(1, 4))
    assert len(backend.graphs) == 1


def test_a_backend_that_nothing_goes_through_is_named(fresh):
    if traces_own_modules():
        pytest.skip("this torch traces its own modules: something goes through")
    waiting = gws_compile.backend()  # one that is given to nothing has nothing to say
    model = nn.Sequential(nn.Linear(4, 4))
    model.compile(backend=gws_compile.backend("fp6_e3m2", inner="eager"))  # torch compiles nothing here
    backend = model._compiled_call_impl  # keeps it alive
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    with pytest.warns(gws_compile.GwsWarning, match=r"and Sequential had module.compile\(backend=...\) called on them"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MANY_STEPS - 2):
            step()
    with pytest.warns(gws_compile.GwsWarning, match=r"this backend \(fp6_e3m2\) has compiled nothing.*nn.Sequential"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert backend is not None
    assert waiting.graphs == []


def test_graphs_without_a_parameter_are_named(fresh):
    """As FSDP1 makes them: the modules hold views of a flat parameter."""
    flat = nn.Parameter(torch.randn(16))

    def forward(weight, x):
        return x @ weight

    compiled = torch.compile(forward, backend=gws_compile.backend(inner="eager"))
    optimizer = torch.optim.SGD([flat], lr=0.1)

    def train(steps):
        for _ in range(steps):
            compiled(flat.view(4, 4), torch.ones(2, 4)).sum().backward()
            optimizer.step()

    with pytest.warns(gws_compile.GwsWarning, match=r"compiled 1 graphs, none of which reads a parameter.*FSDP1"):
        train(MANY_STEPS)


class Tied(nn.Module):
    """A head tied to its embedding, with a graph break in between."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.decoder = nn.Embedding(32, 40), nn.Linear(40, 40), nn.Linear(40, 32, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, x):
        y = self.table(x)
        torch._dynamo.graph_break()
        return self.decoder(self.body(y))


def test_a_tied_head_behind_a_graph_break_is_left_alone():
    """The head's graph does not see the look-up; DDP's graph splitting parts them as well."""
    backend = gws_compile.backend(inner="eager")
    torch.compile(Tied(), backend=backend)(torch.arange(8)).sum().backward()
    assert len(backend.graphs) == 2
    assert [r.name for r in backend.report().rewritten] == ["body.weight"]
    assert any("also an embedding table (tied)" in r.reason for r in backend.report().skipped)


class Half(nn.Module):
    """A part that is compiled, and a part that is not."""

    def __init__(self):
        super().__init__()
        self.body, self.tail = Net(), nn.Linear(40, 40)
        self.table, self.lm_head = nn.Embedding(8, 40), nn.Linear(40, 8)

    def forward(self, x):
        return self.lm_head(self.tail(self.body(self.table(x))))


def test_weights_trained_outside_of_every_graph_are_named():
    def step(**settings):
        torch._dynamo.reset()
        model = Half()
        model.body.compile(backend=gws_compile.backend(inner="eager", **settings))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(8)).sum().backward()
            optimizer.step()

    with pytest.warns(gws_compile.GwsWarning) as caught:
        step()
    (said,) = [str(w.message) for w in caught if w.category is gws_compile.GwsWarning]
    # embedding tables and excluded heads are no weights to sample
    assert (
        "trained without noise, since no compiled graph has them: tail.weight. Part of the model runs eagerly" in said
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", gws_compile.GwsWarning)
        step(include=["up.weight", "down.weight"])
    with pytest.raises(ValueError, match=r"strict=True: weights that are trained without noise.*tail.weight"):
        step(include=["*"], exclude=None, strict=True)


class Numbered(nn.Module):
    """A block that Dynamo compiles anew for each number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.fc(x) * (self.number + 1)


def test_blocks_that_the_recompile_limit_leaves_eager_are_named():
    """Their weights are called as those of the blocks that are compiled: a name in a graph says nothing of them."""
    torch._dynamo.reset()
    model = nn.Sequential(*(Numbered(i) for i in range(4)))
    backend = gws_compile.backend(inner="eager")
    for block in model:
        block.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    (said,) = [str(w.message) for w in caught if issubclass(w.category, gws_compile.GwsWarning)]
    assert "trained without noise, since no compiled graph has them: 2.fc.weight, 3.fc.weight. Part of" in said


def test_own_patterns_beside_the_default_ones():
    """The default patterns need not match; a pattern of one's own that does not is said."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    exclude = ("0.*", *gws_compile.DEFAULT_EXCLUDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", gws_compile.GwsWarning)
        torch.compile(model, backend=gws_compile.backend(inner="eager", exclude=exclude))(torch.ones(2, 8))
    torch._dynamo.reset()
    with pytest.warns(gws_compile.GwsWarning, match=r"exclude='2\.\*' has matched no weight so far"):
        torch.compile(model, backend=gws_compile.backend(inner="eager", exclude=("2.*", *exclude)))(torch.ones(2, 8))
