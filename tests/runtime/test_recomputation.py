"""Regions that autograd computes again: their forward sees what the second run sees, and each step draws anew."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gws_compile

FMT = "fp4_e2m1"


pytestmark = pytest.mark.usefixtures("reset")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.fc(x).tanh()


class Again(torch.autograd.Function):
    """Calls a module in forward, and twice in backward: with gradients, and without, as reversible blocks do."""

    @staticmethod
    def forward(ctx, x, module, seen, *parameters):
        ctx.module, ctx.seen = module, seen
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.seen.append(ctx.module(x))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), grad)
        return x.grad, None, None, *[None] * (len(ctx.needs_input_grad) - 3)


class WithSetup(torch.autograd.Function):
    """The newer form, whose forward has no context: whether it is differentiated cannot be told."""

    @staticmethod
    def forward(x, module):
        return module(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.module = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), grad)
        return x.grad, None


class Decorated(Again):
    """A decorator that takes all arguments as a tuple stands between autograd and the forward."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, module, seen):
        return Again.forward(ctx, x, module, seen)


REGIONS = {
    "re-entrant": lambda module, x, seen: checkpoint(module, x, use_reentrant=True),
    "not re-entrant": lambda module, x, seen: checkpoint(module, x, use_reentrant=False),
    "function": lambda module, x, seen: Again.apply(x, module, seen, *module.parameters()),
    "decorated": lambda module, x, seen: Decorated.apply(x, module, seen),
    "nested": lambda module, x, seen: checkpoint(
        lambda x: checkpoint(module, x, use_reentrant=True), x, use_reentrant=True
    ),
}


def expected(x, weight):
    """Output, and the gradients of its sum for input and weight, of the block with this weight."""
    with torch.enable_grad():
        x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        out = x + (x @ weight.t()).tanh()
        out.sum().backward()
    return out.detach(), x.grad, weight.grad


def check(out, x, model, weight):
    want, want_x, want_w = expected(x, weight)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, want_x, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.fc.weight.grad, want_w, rtol=0, atol=1e-5)
    model.zero_grad()


def sample(model, step, name="fc.weight"):
    return gws_compile.sample(model.fc.weight.detach(), FMT, name=name, step=step)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", REGIONS)
def test_forward_and_recomputation_see_one_sample_and_steps_draw_anew(kind, inner):
    model = Block()
    backend = gws_compile.backend(FMT, inner=inner)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(2):  # micro-batches
            x, seen = torch.randn(4 + step, 8, requires_grad=True), []
            out = REGIONS[kind](compiled, x, seen)
            weight = sample(model, step)
            check(out, x, model, weight)
            for value in seen:  # without gradients, but inside backward: the same
                assert torch.equal(value, out.detach())
        optimizer.step()
        with torch.no_grad():  # evaluation through the same region is the cast
            cast = expected(x, gws_compile.quantize(model.fc.weight.detach(), FMT))[0]
            torch.testing.assert_close(REGIONS[kind](compiled, x, []), cast, rtol=0, atol=1e-6)
    assert [(r.name, r.noise) for r in backend.report().rewritten] == [("fc.weight", "rounded_normal")]
    assert backend.state_dict()["step"] == 3


def test_inputs_without_gradients_are_no_training():
    """Of a re-entrant checkpoint whose inputs need no gradient nothing is differentiated, as torch warns."""
    model = Block()
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner="eager"))
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        out = checkpoint(compiled, x, use_reentrant=True)
    cast = expected(x, gws_compile.quantize(model.fc.weight.detach(), FMT))[0]
    torch.testing.assert_close(out, cast, rtol=0, atol=1e-6)


def test_a_function_that_cannot_be_told_from_evaluation_sees_the_cast_twice():
    model = Block()
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner="eager"))
    x = torch.randn(4, 8, requires_grad=True)
    check(WithSetup.apply(x, compiled), x, model, gws_compile.quantize(model.fc.weight.detach(), FMT))


@pytest.mark.parametrize("reentrant", [True, False])
def test_another_optimizer_steps_before_backward(reentrant):
    """As in adversarial training: the generator's forward, a step of the critic, the generator's backward."""
    model, critic = Block(), Block()
    backend = gws_compile.backend(FMT, inner="eager")
    compiled, judge = torch.compile(model, backend=backend), torch.compile(critic, backend=backend)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    for step in (0, 1):
        x = torch.randn(4, 8, requires_grad=True)
        out = checkpoint(compiled, x, use_reentrant=reentrant)
        judge(out.detach()).sum().backward()
        optimizer.step()
        judge(out.detach())  # begins the next draw
        assert backend.state_dict()["step"] == step + 1
        check(out, x, model, sample(model, step))


@pytest.mark.parametrize("reentrant", [True, False])
def test_noise_that_is_off_in_forward_is_off_in_recomputation(reentrant):
    model = Block()
    backend = gws_compile.backend(FMT, inner="eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 8, requires_grad=True)
    with backend.noise(False):
        out = checkpoint(compiled, x, use_reentrant=reentrant)
    check(out, x, model, gws_compile.quantize(model.fc.weight.detach(), FMT))
    x = torch.randn(4, 8, requires_grad=True)
    out = checkpoint(compiled, x, use_reentrant=reentrant)
    with backend.noise(False):
        check(out, x, model, sample(model, 0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_noise_in_every_forward(reentrant):
    """Two regions, each with a draw of its own, computed again in the other order."""
    model = Block()
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner="eager", resample="forward"))
    inputs = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    outs = [checkpoint(compiled, x, use_reentrant=reentrant) for x in inputs]
    for step, out, x in ((1, outs[0], inputs[0]), (2, outs[1], inputs[1])):
        check(out, x, model, sample(model, step))


def test_two_draws_in_one_region_are_refused():
    model = Block()
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner="eager", resample="forward"))
    out = checkpoint(lambda x: compiled(compiled(x)), torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"saw fc.weight with different draws.*which of them this is cannot be told"):
        out.sum().backward()


def test_a_recomputation_without_a_forward_is_refused():
    """Its gradients would be those of a forward that there has not been."""
    model = Block()
    compiled = torch.compile(model, backend=gws_compile.backend(FMT, inner="eager"))

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return model(x)  # not the compiled one

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                compiled(x).backward(grad)
            return x.grad

    with pytest.raises(RuntimeError, match=r"it cannot be told which draw of fc.weight its first run saw"):
        Wrong.apply(torch.randn(4, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("granularity", ["block", "weight"])
def test_learned_widths_get_the_gradient_of_the_region(granularity):
    """As without the checkpoint, bit for bit."""

    def gradients(region):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Block()
        backend = gws_compile.backend(
            bits=gws_compile.LearnedBits(granularity=granularity), inner="eager", block=(4, 4)
        )
        compiled = torch.compile(model, backend=backend)
        x = torch.randn(4, 8, requires_grad=True)
        region(compiled, x).square().sum().backward()
        return [model.fc.weight.grad, *(p.grad for p in backend.parameters())]

    plain = gradients(lambda module, x: module(x))
    for reentrant in (True, False):
        found = gradients(lambda module, x: checkpoint(module, x, use_reentrant=reentrant))  # noqa: B023
        assert len(found) == 2
        assert all(map(torch.equal, plain, found))


def test_a_region_without_gradients_inside_is_an_error():
    """The first run, without gradients as a whole, cannot tell it: its noise would be none in the second run."""

    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    compiled = torch.compile(Distilled(), backend=gws_compile.backend("fp4_e2m1", inner="eager"))
    x = torch.randn(4, 8, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reads teacher\.weight under no_grad, with the cast alone"):
        out.sum().backward()
