"""Threads, several backends, several models, copies, pickles, moves: none mixes up keys."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from support.small_models import OneLayer

import gws_compile

pytestmark = pytest.mark.usefixtures("reset")


def net():
    return OneLayer(bias=False)


EYE = torch.eye(40)


def used(call, dtype=torch.float32):
    return call(EYE.to(dtype)).detach().t()


def sample(model, name="fc.weight", fmt="fp6_e3m2", **settings):
    return gws_compile.sample(model.fc.weight, fmt, name=name, **settings)


def make(fmt="fp6_e3m2", **settings):
    return gws_compile.backend(fmt, inner="eager", **settings)


def test_two_backends_on_two_models():
    one, two = net(), net()
    first, second = make(), make("fp4_e2m1", seed=7)
    a, b = torch.compile(one, backend=first), torch.compile(two, backend=second)
    for _ in range(2):
        assert torch.equal(used(a), sample(one))
        assert torch.equal(used(b), sample(two, fmt="fp4_e2m1", seed=7))
    first.step()
    assert torch.equal(used(a), sample(one, step=1))
    assert torch.equal(used(b), sample(two, fmt="fp4_e2m1", seed=7))


def test_one_model_compiled_twice():
    model = net()
    backends = [make(), make("fp4_e2m1"), make(seed=3)]
    compiled = [torch.compile(model, backend=b) for b in backends]
    for _ in range(2):
        assert torch.equal(used(compiled[0]), sample(model))
        assert torch.equal(used(compiled[1]), sample(model, fmt="fp4_e2m1"))
        assert torch.equal(used(compiled[2]), sample(model, seed=3))
    again = torch.compile(model, backend=backends[0])
    assert torch.equal(used(again), sample(model))  # the same backend: the same key
    assert [len(b.state_dict()["weights"]) for b in backends] == [1, 1, 1]


def test_two_models_share_a_backend():
    """Weights of one name: the first seen keeps it, the next ones are numbered, for good."""
    models, backend = [net() for _ in range(3)], make()
    compiled = [torch.compile(m, backend=backend) for m in models]
    for _ in range(2):
        for i in (1, 0, 2):
            name = "fc.weight" if i == 1 else f"fc.weight#{1 + i // 2}"
            assert torch.equal(used(compiled[i]), sample(models[i], name))
    assert backend.state_dict()["weights"] == [
        ["fc.weight", [40, 40]], ["fc.weight#1", [40, 40]], ["fc.weight#2", [40, 40]]
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_deep_copies(how):
    model, backend = net(), make()
    compiled = torch.compile(model, backend=backend) if how == "torch.compile" else model
    if how == "Module.compile":
        model.compile(backend=backend)
    assert torch.equal(used(compiled), sample(model))
    copied = copy.deepcopy(compiled)
    if how == "Module.compile":  # torch drops what was compiled from copies and pickles: it is a plain model again
        assert torch.equal(used(copied), model.fc.weight)
        copied.compile(backend=backend)
    assert torch.equal(used(copied), sample(model, "fc.weight#1"))
    assert torch.equal(used(compiled), sample(model))
    assert len(backend.state_dict()["weights"]) == 2


def test_pickles():
    model, backend = net(), make(seed=4)
    model.compile(backend=backend)
    assert torch.equal(used(model), sample(model, seed=4))
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(used(loaded), model.fc.weight)  # torch leaves out what was compiled
    backend.step()
    used(model)
    # A model made by torch.compile takes its backend along, with settings and state.
    buffer = io.BytesIO()
    torch.save(torch.compile(model, backend=backend), buffer)
    buffer.seek(0)
    torch._dynamo.reset()
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(used(again), sample(model, seed=4, step=1))
    restored = pickle.loads(pickle.dumps(backend))
    assert restored is not backend
    assert restored.config == backend.config
    assert restored.state_dict() == backend.state_dict()


def test_moves_between_dtypes():
    model, backend = net(), make()
    compiled = torch.compile(model, backend=backend)
    assert torch.equal(used(compiled), sample(model))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model.to(dtype)
        assert torch.equal(used(compiled, dtype), sample(model))
    assert len(backend.state_dict()["weights"]) == 1
    model.double()  # float64 is not sampled: that is said, and nothing is mixed up
    assert torch.equal(used(compiled, torch.float64), model.fc.weight)
    assert backend.report().skipped[0].reason == "float64 weights are not sampled"


def test_threads():
    """Eight threads, each with a model of its own, meet one backend and one compiled code at once."""
    models, backend = [net() for _ in range(8)], make()
    compiled = [torch.compile(m, backend=backend) for m in models]
    used(compiled[0])
    start, results = threading.Barrier(8), [[] for _ in range(8)]

    def work(i):
        start.wait()
        for _ in range(20):
            results[i].append(used(compiled[i]))

    used(compiled[0])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    names = [name for name, _ in backend.state_dict()["weights"]]
    assert sorted(names) == sorted({"fc.weight", *(f"fc.weight#{i}" for i in range(1, 8))})
    drawn_by = []
    for model, values in zip(models, results, strict=True):
        assert len(values) == 20
        samples = {name: sample(model, name) for name in names}
        drawn_by += [name for name, value in samples.items() if all(torch.equal(got, value) for got in values)]
    assert sorted(drawn_by) == sorted(names)  # one and the same name in all calls, and each model its own
    assert drawn_by[0] == "fc.weight"


def test_nothing_keeps_a_dead_model():
    """Neither keys, nor tables, nor the stack that was searched for names."""
    backend = make()
    model = net()
    compiled = torch.compile(model, backend=backend)
    used(compiled)
    left = [weakref.ref(one) for one in (model, compiled, model.fc.weight)]
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert [one() for one in left] == [None, None, None]
    assert backend.state_dict()["weights"] == []


def test_following_optimizers_keeps_no_backend():
    backend = make()
    alive = weakref.ref(backend)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
    del backend
    gc.collect()
    assert alive() is None


class TiedBlock(torch.nn.Module):
    """The first layer's weight is read again in a block that is compiled by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.block = net().fc, net()
        self.block.fc.weight = self.first.weight

    def forward(self, x):
        return self.block(self.first(x))


@pytest.mark.parametrize("compiled", ["block", "both"])
@pytest.mark.parametrize("first", ["the model", "the block"])
def test_a_block_with_a_tied_weight_that_is_also_called_alone(compiled, first):
    """Whoever is called, the weight has one name: that by which it was known first."""
    model, backend = TiedBlock(), make()
    model.block.compile(backend=backend)
    call = torch.compile(model, backend=backend) if compiled == "both" else model
    name = "first.weight" if first == "the model" else "fc.weight"
    expected = gws_compile.sample(model.first.weight, "fp6_e3m2", name=name)
    once = model.first.weight if compiled == "block" else expected  # what the first layer uses
    for caller in ("the model", "the block") if first == "the model" else ("the block", "the model", "the block"):
        if caller == "the model":
            assert torch.equal(used(call), (EYE @ once.t() @ expected.t()).detach().t())
        else:
            assert torch.equal(used(model.block), expected)
    assert [weight for weight, _ in backend.state_dict()["weights"]] == [name]
