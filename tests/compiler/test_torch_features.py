"""Checkpointing, autocast, dynamic shapes, modes, random numbers: loss and gradients of the eager oracle.

What is distributed has a folder of its own, `distributed`.
"""

import copy
from functools import partial

import pytest
import torch
from support import eager
from support.models import gpt2, llama, loss_and_gradients
from support.small_models import TwoBlocks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gws_compile

pytestmark = pytest.mark.usefixtures("one_thread")


def save_products(ctx, op, *args, **kwargs):
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(TwoBlocks):
    """Two blocks, run plainly or under a kind of activation checkpointing."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        if how == "wrapper":
            self.first, self.second = checkpoint_wrapper(self.first), checkpoint_wrapper(self.second)

    def forward(self, x):
        for block in (self.first, self.second):
            if self.how == "checkpoint":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.how == "selective":
                context = partial(create_selective_checkpoint_contexts, save_products)
                x = checkpoint(block, x, use_reentrant=False, context_fn=context)
            else:
                x = block(x)
        return x


SAMPLED = ("first.up.weight", "first.down.weight", "second.up.weight", "second.down.weight")


def loss_of(call, x):
    return call(x).float().square().mean()


def assert_gradients(model, expected, **tolerance):
    actual = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, **tolerance)


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("how", ["plain", "checkpoint", "selective", "wrapper"])
def test_checkpointing_inside_the_model(how, backward):
    model, plain, x = Checkpointed(how), TwoBlocks(), torch.randn(8, 40)
    state = {n.replace("_checkpoint_wrapped_module.", ""): v for n, v in model.state_dict().items()}
    plain.load_state_dict(state)
    backend = gws_compile.backend("fp6_e3m2", backward=backward, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(2):
        loss = loss_of(compiled, x)
        loss.backward()
        expected, gradients = eager.gradients(plain, lambda call: loss_of(call, x), SAMPLED, "fp6_e3m2", step)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert_gradients(model, gradients, rtol=1e-5, atol=1e-7)
        model.zero_grad()
        backend.step()
    # wrappers leave no trace in the names
    assert sorted(name for name, _ in backend.state_dict()["weights"]) == sorted(SAMPLED)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_face_gradient_checkpointing(reentrant):
    tokens = torch.randint(96, (2, 16))
    results = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        backend = gws_compile.backend("fp6_e3m2", inner="aot_eager")
        results.append(loss_and_gradients(torch.compile(model, backend=backend), model, tokens))
        assert len(backend.report().rewritten) >= 7
    (loss, gradients), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    for name, grad in expected.items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backward):
    """Weights are sampled in float32, and autocast rounds the samples; fp16 with a scaled loss."""
    model, x = TwoBlocks(), torch.randn(8, 40)
    backend = gws_compile.backend("fp6_e3m2", backward=backward, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)

    def loss_in(call, x):
        with torch.autocast("cpu", dtype):
            y = call(x)
        return y.float().square().mean() * 1024

    loss = loss_in(compiled, x)
    loss.backward()
    expected, gradients = eager.gradients(model, lambda call: loss_in(call, x), SAMPLED, "fp6_e3m2", 0)
    assert loss.item() == expected
    assert_gradients(model, gradients, rtol=0, atol=0)


def test_dynamic_shapes_do_not_recompile():
    model = TwoBlocks()
    backend = gws_compile.backend("fp6_e3m2")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch in (8, 3, 5):
        x = torch.randn(batch, 40)
        loss = loss_of(compiled, x)
        expected, _ = eager.gradients(model, lambda call, x=x: loss_of(call, x), SAMPLED, "fp6_e3m2", 0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len(backend.graphs) == 1


def test_reduce_overhead_keeps_the_parameters_static():
    """CUDA graphs record the addresses of static inputs: parameters stay such, keys and clock (24 bytes) are copied."""
    import torch._inductor.compile_fx as inductor

    seen = []

    def inner(gm, example_inputs):
        def spy(graph, inputs, **kwargs):
            seen.append((list(kwargs["static_input_idxs"]), [tuple(i.shape) for i in inputs]))
            return inductor.compile_fx_inner(graph, inputs, **kwargs)

        return inductor.compile_fx(gm, example_inputs, inner_compile=spy)

    static = []
    for backend in (inner, gws_compile.backend("fp6_e3m2", inner=inner)):
        torch._dynamo.reset()
        seen.clear()
        loss_of(torch.compile(TwoBlocks(), backend=backend), torch.randn(8, 40))
        indices, shapes = seen[0]
        static.append(sorted(shapes[i] for i in indices))
    assert static[0] == static[1]
    assert len(static[0]) == 8
    model, x = TwoBlocks(), torch.randn(8, 40)
    compiled = torch.compile(model, backend=gws_compile.backend("fp6_e3m2"), mode="reduce-overhead", fullgraph=True)
    loss = loss_of(compiled, x)
    expected, _ = eager.gradients(model, lambda call: loss_of(call, x), SAMPLED, "fp6_e3m2", 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_random_numbers_of_the_model_are_left_alone():
    """Three steps of GPT-2 with dropout: the generator's state is that of a plain run, and so are the masks."""
    tokens = torch.randint(96, (2, 16))
    results = []
    for backend in ("inductor", gws_compile.backend("e8m23", noise="none"), gws_compile.backend("fp6_e3m2")):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = gpt2(dropout=0.2, layers=1).train()
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        losses = []
        for _ in range(3):
            losses.append(loss_and_gradients(compiled, model, tokens)[0])
            optimizer.step()
        results.append((torch.stack(losses), torch.get_rng_state()))
    (plain, state), (lossless, lossless_state), (_, noisy_state) = results
    assert torch.equal(lossless, plain)  # the same masks
    assert torch.equal(lossless_state, state)
    assert torch.equal(noisy_state, state)


def test_dropout_masks_beside_noise_are_those_of_a_plain_run():
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            return nn.functional.dropout(torch.ones_like(x), 0.5), self.fc(x)

    model, masks = Masks(), []
    for backend in ("inductor", gws_compile.backend("fp6_e3m2")):
        torch._dynamo.reset()
        torch.manual_seed(3)
        compiled = torch.compile(copy.deepcopy(model), backend=backend)
        masks.append([compiled(torch.ones(16, 40))[0] for _ in range(2)])
    assert torch.equal(torch.stack(masks[0]), torch.stack(masks[1]))
    assert not torch.equal(*masks[0])
