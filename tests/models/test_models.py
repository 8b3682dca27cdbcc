"""Whole models: the surgery alone changes nothing, and sampled training is training on the oracle's weights."""

import copy

import pytest
import torch
from support.models import gpt2, llama, loss_and_gradients
from support.oracle import sample_oracle

import gws_compile
from gws_compile.numerics.keys import key_words

transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(left, right):
    assert torch.equal(left[0], right[0])
    assert left[1].keys() == right[1].keys()
    assert [name for name in left[1] if not torch.equal(left[1][name], right[1][name])] == []


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "autocast"])
@pytest.mark.parametrize("make", [pytest.param(gpt2, marks=pytest.mark.slow), llama])
def test_lossless_format_without_noise_is_plain_inductor(make, autocast):
    model, tokens = make(layers=1), torch.randint(0, 96, (2, 24))
    plain = loss_and_gradients(torch.compile(model, fullgraph=True), model, tokens, autocast)
    backend = gws_compile.backend("e8m23", noise="none", backward="recompute" if autocast else "save")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(loss_and_gradients(compiled, model, tokens, autocast), plain)
    assert len(backend.report().rewritten) == (4 if make is gpt2 else 7)


def load_samples(target, model, backend, step):
    """Put the oracle's samples of ``model``'s weights into the plain model ``target``."""
    config = backend.config
    target.load_state_dict(model.state_dict())
    for record in backend.report().rewritten:
        weight = target.get_parameter(record.name)
        key = key_words(config.seed, record.name)
        value = sample_oracle(
            weight.detach().numpy(), key, step, config.fmt, config.bits, config.noise, config.block, config.scale
        )
        weight.data.copy_(torch.from_numpy(value))


UNIFORM = {"fmt": "fp6_e3m2", "noise": "uniform", "bits": 3.5, "scale": "ceil", "block": (16, 64)}


@pytest.mark.parametrize(
    ("make", "inner", "settings"),
    [
        (gpt2, "inductor", {"fmt": "fp8_e4m3"}),
        pytest.param(llama, "inductor", {**UNIFORM, "backward": "recompute"}, marks=pytest.mark.slow),
        (gpt2, "eager", {**UNIFORM, "backward": "recompute"}),
        (llama, "eager", {"fmt": "fp8_e4m3"}),
        (llama, "aot_eager", {"fmt": "fp4_e2m1", "scale": None}),
    ],
)
def test_training_step_equals_plain_training_on_the_samples(make, inner, settings):
    model, tokens = make(layers=1), torch.randint(0, 96, (2, 24))
    backend = gws_compile.backend(**settings, seed=7, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oracle = copy.deepcopy(model)
    plain = torch.compile(oracle, fullgraph=True) if inner == "inductor" else oracle
    for step in range(2):
        got = loss_and_gradients(compiled, model, tokens)
        load_samples(oracle, model, backend, step)
        assert_same(got, loss_and_gradients(plain, oracle, tokens))
        optimizer.step()


def test_evaluation_casts_without_noise():
    model, tokens = gpt2(layers=1), torch.randint(0, 96, (2, 24))
    backend = gws_compile.backend("fp8_e4m3")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss_and_gradients(compiled, model, tokens)
    deployed = copy.deepcopy(model)
    for record in backend.report().rewritten:
        weight = deployed.get_parameter(record.name)
        weight.data.copy_(gws_compile.quantize(weight.detach(), "fp8_e4m3"))
    with torch.no_grad():
        expected = torch.compile(deployed, fullgraph=True)(tokens).logits
        assert torch.equal(compiled(tokens).logits, expected)
    with torch.inference_mode():
        assert torch.equal(compiled(tokens).logits, expected)
    with backend.noise(False):
        assert torch.equal(compiled(tokens).logits, expected)


@pytest.mark.slow
def test_dropout_draws_what_it_draws_in_a_plain_run():
    model, tokens = gpt2(dropout=0.2, layers=1), torch.randint(0, 96, (2, 24))
    results = []
    for compiled in (
        torch.compile(model, fullgraph=True),
        torch.compile(model, backend=gws_compile.backend("e8m23", bits=24), fullgraph=True),
    ):
        torch.manual_seed(3)
        loss, _ = loss_and_gradients(compiled, model, tokens)
        results.append((loss, torch.get_rng_state()))
    assert torch.equal(results[0][1], results[1][1])
    # Noise of 2**-23 of the block maximum is all that differs: equal masks, equal losses to float32 accuracy.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
