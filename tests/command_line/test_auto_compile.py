"""`gws run --auto` compiles the outermost modules of a script that compiles nothing, and only those."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from support import eager
from support.accumulation import loss_of, train
from support.small_models import Net
from torch import nn

import gws_compile
from gws_compile.command_line.auto_compile import AutoCompile
from gws_compile.command_line.torch_compile_patch import AUTO, AUTO_COPY, CompileCalls, TorchCompilePatch
from gws_compile.compiler.backend import Backend
from gws_compile.config import Config

SAMPLED = ["up.weight", "down.weight"]
FMT = "fp6_e3m2"


@pytest.fixture
def auto():
    torch._dynamo.reset()
    torch.manual_seed(0)
    patch = TorchCompilePatch(Backend(Config.make(FMT, inner="aot_eager")), CompileCalls())
    auto = AutoCompile(patch)
    original = nn.Module.__call__
    patch.install()
    auto.install()
    yield patch
    auto.remove()
    patch.remove()
    assert nn.Module.__call__ is original


def compiled_names(patch, reason=AUTO):
    return [call.target for call in patch.calls.taken if call.reason == reason]


def evaluated_with_the_cast(model, x):
    """What a `Net` computes with its weights cast and no noise."""
    values = {n: gws_compile.quantize(p, FMT) if p.ndim > 1 else p for n, p in model.named_parameters()}
    return torch.func.functional_call(model, values, x)


def test_the_first_call_already_has_noise(auto):
    """From the first forward on, losses are those of the oracle, which samples with `gws_compile.sample`."""
    model = Net()
    oracle = copy.deepcopy(model)
    batches = [[torch.randn(8, 40) for _ in range(2)] for _ in range(3)]
    losses = train(model, model, batches)
    assert compiled_names(auto) == ["Net"]
    assert not any(part._compiled_call_impl for part in (model.up, model.down))
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # the oracle runs without
    expected = eager.train(oracle, batches, loss_of, SAMPLED, FMT)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_containers_of_torch(auto):
    model = nn.Sequential(nn.Linear(40, 72), nn.ReLU(), nn.Linear(72, 40))
    oracle = copy.deepcopy(model)
    batches = [[torch.randn(8, 40)] for _ in range(3)]
    losses = train(model, model, batches)
    assert compiled_names(auto) == ["Sequential"]
    nn.Module.__call__ = nn.Module._wrapped_call_impl
    expected = eager.train(oracle, batches, loss_of, ["0.weight", "2.weight"], FMT)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_evaluation_first(auto):
    """Before the first training call a model is left as it is; from then on evaluation casts, without noise."""
    model, x = Net(), torch.randn(4, 40)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(before, model.forward(x))
    assert compiled_names(auto) == []
    model(x).sum().backward()
    assert compiled_names(auto) == ["Net"]
    values = {n: gws_compile.quantize(p, FMT) if p.ndim > 1 else p for n, p in model.named_parameters()}
    with torch.no_grad():
        after = model(x)
        expected = x + torch.relu(x @ values["up.weight"].T + values["up.bias"]) @ values["down.weight"].T
    torch.testing.assert_close(after, expected + values["down.bias"], rtol=1e-5, atol=1e-6)


def test_two_models_a_loss_and_a_frozen_teacher(auto):
    generator, critic, teacher, loss = Net(), Net(), Net().requires_grad_(False), nn.MSELoss()
    norm = nn.LayerNorm(40)
    x = torch.randn(4, 40)
    y = norm(generator(x))
    (loss(y, teacher(x)) + critic(y).mean()).backward()
    assert sum(auto.calls.taken.values()) == 2
    assert [m._compiled_call_impl is not None for m in (generator, critic, teacher, loss, norm)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    teacher.requires_grad_(True)
    teacher(x)
    assert teacher._compiled_call_impl is not None  # a stage of training in which it is no longer frozen


class Average(nn.Module):
    """As timm's ModelEmaV3 holds its copy."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x):
        return self.module(x)


class Fabric(nn.Module):
    """As Lightning Fabric wraps a model."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = model

    def forward(self, x):
        return self._forward_module(x)


def reloaded(model):
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


COPIES = {
    "deep copy": lambda model: copy.deepcopy(model).requires_grad_(False),
    "reloaded": reloaded,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "module": Average,
    "Fabric": lambda model: Fabric(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("wrap", [lambda model: model, Fabric], ids=["bare", "wrapped"])
def test_copies_are_evaluated_with_the_cast(way, wrap, auto):
    """Averages of weights, target networks, reloaded models: as the model itself is evaluated, and without a trace.

    The noise of the model that is trained stays that of the oracle, and it alone is in the report as noisy.
    """
    model = Net()
    oracle = copy.deepcopy(model)
    batches = [[torch.randn(8, 40)] for _ in range(4)]
    x = torch.randn(4, 40)
    called = wrap(model)
    losses = train(called, model, batches[:2])
    other, then = COPIES[way](model), copy.deepcopy(model)
    with torch.no_grad():
        got = [other(x), called(x), other(x)]
    losses += train(called, model, batches[2:])
    assert compiled_names(auto, AUTO_COPY) == ["Net"]
    rows = {record.name: record.noise for record in auto.backend.report()}
    theirs = [f"module.{name}" if way == "module" else f"{name}#1" for name in SAMPLED]
    assert rows == {**dict.fromkeys(SAMPLED, "rounded_normal"), **dict.fromkeys(theirs, "none")}
    assert [name for name, _ in auto.backend.state_dict()["weights"]] == SAMPLED
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # the oracle runs without
    with torch.no_grad():
        torch.testing.assert_close(got, [evaluated_with_the_cast(then, x)] * 3, rtol=1e-5, atol=1e-6)
    expected = eager.train(oracle, batches, loss_of, SAMPLED, FMT)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_what_is_no_copy_is_evaluated_as_it_is(auto):
    """Another class, other shapes; a frozen teacher that is called with gradients; what the script has compiled."""

    class Other(Net):
        pass

    model, other, x = Net(), Other(), torch.randn(4, 40)
    wider, teacher = nn.Linear(40, 72), Net().requires_grad_(False)
    narrow = nn.Linear(40, 71)
    with torch.no_grad():
        early = copy.deepcopy(model)
        early(x)  # before there is anything that it could be a copy of
    model(x).sum().backward()
    wider(x).sum().backward()
    teacher(x)
    scripts = Net()
    scripts.up = torch.compile(scripts.up)
    with torch.no_grad():
        for module in (other, narrow, scripts):
            module(x)
    assert compiled_names(auto, AUTO_COPY) == []
    with torch.no_grad():
        early(x)
    assert compiled_names(auto, AUTO_COPY) == ["Net"]


def test_what_the_script_compiles_is_not_compiled_twice(auto):
    whole, part, in_place = Net(), Net(), Net()
    x = torch.randn(4, 40)
    compiled = torch.compile(whole)
    part.up = torch.compile(part.up)
    in_place.compile()
    for model in (compiled, whole, part, in_place):
        model(x).sum().backward()
    assert compiled_names(auto) == []
    assert [call.target for call in auto.calls.taken] == ["Net", "Linear", "Net"]
    assert whole._compiled_call_impl is None
    assert part._compiled_call_impl is None


def test_compilation_that_the_script_has_switched_off(auto):
    torch.compile(Net(), disable=True)(torch.randn(4, 40))
    assert compiled_names(auto) == ["Net"]


def test_a_compiled_function_that_calls_a_model(auto):
    model = Net()

    @torch.compile(fullgraph=True)
    def step(x):
        return loss_of(model, x)

    step(torch.randn(4, 40)).backward()
    assert {r.name for r in auto.backend.report().rewritten} == set(SAMPLED)
    assert len(auto.backend.graphs) == 1


def test_graphs_are_those_of_torch_compile(auto):
    """The same graph as `torch.compile(model)` gives: nothing of ours is traced."""
    model, x = Net(), torch.randn(4, 40)
    model(x)
    plain = Backend(Config.make(FMT, inner="aot_eager"))
    torch._dynamo.reset()
    torch.compile(copy.deepcopy(model), backend=plain)(x)
    assert str(plain.graphs[0].graph) == str(auto.backend.graphs[0].graph)


def test_the_model_stays_the_same_to_others(auto):
    model = Net()
    keys = list(model.state_dict())
    model(torch.randn(4, 40)).sum().backward()
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model)._compiled_call_impl is None  # and is compiled on its own first call
    assert type(model) is Net


def test_a_checkpoint_called_by_the_script(auto):
    """Parts that are called by a function of the script are outermost; run again in backward they stay as they are."""
    first, second = Net(), Net()
    x = torch.randn(4, 40)
    y = torch.utils.checkpoint.checkpoint(lambda v: second(first(v)), x, use_reentrant=False)
    y.square().mean().backward()
    grads = [p.grad.clone() for p in first.parameters()]
    assert sum(auto.calls.taken.values()) == 2
    first.zero_grad()
    second.zero_grad()
    second(first(x)).square().mean().backward()  # without an optimizer step: the same sample
    for grad, parameter in zip(grads, first.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_lazy_and_scripted_modules(auto):
    """A lazy module is compiled when its weights are there; TorchScript, traced or scripted, is left as it is."""
    x = torch.randn(4, 40)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(4))
    lazy(x)
    lazy(x)
    assert compiled_names(auto) == ["Sequential"]
    torch.jit.trace(Net(), x)(x)
    torch.jit.script(Net())(x)
    assert compiled_names(auto) == ["Sequential"]


def test_under_fsdp2(auto, tmp_path):
    """Sharded per block and whole; the root is the outermost module, and the names are those of the model."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(Net(), Net())
        oracle = copy.deepcopy(model)
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
        batches = [[torch.randn(8, 40)] for _ in range(3)]
        losses = train(model, model, batches)
        assert compiled_names(auto) == ["FSDPSequential"]
    finally:
        dist.destroy_process_group()
    nn.Module.__call__ = nn.Module._wrapped_call_impl
    names = [f"{i}.{name}" for i in range(2) for name in SAMPLED]
    expected = eager.train(oracle, batches, loss_of, names, FMT)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_an_error_in_forward_leaves_nothing_behind(auto):
    installed = nn.Module.__call__
    with pytest.raises(RuntimeError):
        Net()(torch.randn(4, 3))
    assert nn.Module.__call__ is installed
    Net()(torch.randn(4, 40))
    assert len(auto.backend.report().rewritten) == 2


def test_threads(auto):
    """Modules called at the same time in two threads: each is compiled on its own first call."""
    installed = nn.Module.__call__
    models = [Net(), Net()]
    errors = []

    def work(model):
        try:
            for _ in range(3):
                model(torch.randn(4, 40)).sum().backward()
        except Exception as error:  # shown by the assertion
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(model._compiled_call_impl is not None for model in models)
    assert nn.Module.__call__ is installed


def test_under_ddp(auto, tmp_path):
    """The wrapper is the outermost module; names and noise are those of the model inside."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Net()
        oracle = copy.deepcopy(model)
        batches = [[torch.randn(8, 40)] for _ in range(3)]
        parallel = nn.parallel.DistributedDataParallel(model)
        losses = train(parallel, model, batches[:2])
        with torch.no_grad():
            x, then = torch.randn(4, 40), copy.deepcopy(model)
            got = [parallel.module(x), parallel(x)]  # evaluation often leaves the wrapper out
        losses += train(parallel, model, batches[2:])
        assert compiled_names(auto) == ["DistributedDataParallel"]
        assert compiled_names(auto, AUTO_COPY) == ["Net"]
    finally:
        dist.destroy_process_group()
    nn.Module.__call__ = nn.Module._wrapped_call_impl
    with torch.no_grad():
        torch.testing.assert_close(got, [evaluated_with_the_cast(then, x)] * 2, rtol=1e-5, atol=1e-6)
    expected = eager.train(oracle, batches, loss_of, SAMPLED, FMT)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
