"""The rewritten graphs themselves, pinned."""

import torch
from expecttest import TestCase
from support.graphs import rewritten_graph, show
from torch import nn
from torch.utils.checkpoint import checkpoint


class Conv1D(nn.Module):
    """GPT-2's linear layer: (in, out) weight, read by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Tied(nn.Module):
    """One Parameter under two names, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)
        self.down = nn.Linear(4, 4, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x).relu())


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda y: self.fc(y).relu(), x, use_reentrant=False)


class MixedUses(nn.Module):
    """A view of the weight that serves a matrix product and a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        w = self.weight.t()
        return x @ w, w.square().sum()


class OwnCasts(nn.Module):
    """Weights that the module converts itself: to what its input has, on the way through another dtype, to two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))

    def forward(self, x):
        x = x.to(torch.bfloat16)
        y = nn.functional.linear(x, self.a.to(x.dtype)) @ self.b.half().t().to(x.dtype)
        return nn.functional.linear(y, self.c.to(x.dtype)).float() @ self.c


class LocalAutocast(nn.Module):
    """Autocast inside a checkpoint, and switched off around one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def block(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float())

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


class TestRewrittenGraphs(TestCase):
    def setUp(self) -> None:
        torch._dynamo.reset()
        self.x = torch.ones(2, 4)

    def test_linear(self) -> None:
        graph = rewritten_graph(nn.Sequential(nn.Linear(4, 4)), self.x)
        self.assertExpectedInline(
            show(graph),
            """\
sample_weight = sample_weight(0.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
input_1 = linear(l_args_0_, sample_weight, 0.bias)
return (input_1,)""",
        )

    def test_linear_cast_only(self) -> None:
        with torch.no_grad():
            graph = rewritten_graph(nn.Sequential(nn.Linear(4, 4)), self.x, fmt="fp6_e3m2", scale=None)
        self.assertExpectedInline(
            show(graph),
            """\
sample_weight = sample_weight(0.weight, None, None, 0, 'e3m2', 4.0, 'none', [32, 32], '', None, '', [], [], None, None, True, 0, '', 9)
input_1 = linear(l_args_0_, sample_weight, 0.bias)
return (input_1,)""",
        )

    def test_tied_weights_are_sampled_once(self) -> None:
        self.assertExpectedInline(
            show(rewritten_graph(Tied(), self.x)),
            """\
sample_weight = sample_weight(up.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
linear = linear(l_x_, sample_weight, None)
relu = relu(linear)
linear_1 = linear(relu, sample_weight, None)
return (linear_1,)""",
        )

    def test_gpt2_addmm(self) -> None:
        self.assertExpectedInline(
            show(rewritten_graph(nn.Sequential(Conv1D()), self.x)),
            """\
sample_weight = sample_weight(0.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
input_1 = addmm(0.bias, l_args_0_, sample_weight)
return (input_1,)""",
        )

    def test_checkpointed_block(self) -> None:
        self.assertExpectedInline(
            show(rewritten_graph(Checkpointed(), self.x)),
            """\
wrap_body_0:
    sample_weight = sample_weight(fc.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
    linear = linear(l_x_, sample_weight, fc.bias)
    relu = relu(linear)
    return (relu,)
tag_activation_checkpoint = tag_activation_checkpoint(wrap_body_0, l_x_, fc.weight, fc.bias, gws_key_0, gws_clock, use_reentrant=False)
getitem = getitem(tag_activation_checkpoint, 0)
return (getitem,)""",
        )

    def test_convolution(self) -> None:
        graph = rewritten_graph(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.ones(1, 4, 5, 5))
        self.assertExpectedInline(
            show(graph),
            """\
sample_weight = sample_weight(0.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
input_1 = conv2d(l_args_0_, sample_weight, 0.bias, (1, 1), (0, 0), (1, 1), 1)
return (input_1,)""",
        )

    def test_other_uses_keep_the_weight(self) -> None:
        self.assertExpectedInline(
            show(rewritten_graph(MixedUses(), self.x)),
            """\
sample_weight = sample_weight(weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
w = t(weight)
w_1 = t(sample_weight)
matmul = matmul(l_x_, w_1)
square = square(w)
sum_1 = sum(square)
return (matmul, sum_1)""",
        )

    def test_autocast_is_the_operators(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            graph = rewritten_graph(nn.Sequential(nn.Linear(4, 4)), self.x)
        self.assertExpectedInline(
            show(graph),
            """\
sample_weight = sample_weight(0.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, torch.bfloat16, True, 0, '', 9)
input_1 = linear(l_args_0_, sample_weight, 0.bias)
return (input_1,)""",
        )

    def test_own_casts_are_the_operators(self) -> None:
        """The first on the way; none where two reads differ."""
        self.assertExpectedInline(
            show(rewritten_graph(OwnCasts(), self.x)),
            """\
x = to(l_x_, torch.bfloat16)
sample_weight = sample_weight(a, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, torch.bfloat16, True, 0, '', 9)
to_1 = to(sample_weight, torch.bfloat16)
linear = linear(x, to_1)
sample_weight_1 = sample_weight(b, gws_key_1, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, torch.float16, True, 0, '', 9)
half = half(sample_weight_1)
t = t(half)
to_2 = to(t, torch.bfloat16)
y = matmul(linear, to_2)
sample_weight_2 = sample_weight(c, gws_key_2, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
to_3 = to(sample_weight_2, torch.bfloat16)
linear_1 = linear(y, to_3)
float_1 = float(linear_1)
matmul_1 = matmul(float_1, sample_weight_2)
return (matmul_1,)""",
        )

    def test_autocast_regions(self) -> None:
        with torch.autocast("cpu", torch.float16):
            graph = rewritten_graph(LocalAutocast(), self.x)
        self.assertExpectedInline(
            show(graph),
            """\
wrap_body_0:
    _enter_autocast = _enter_autocast('cpu', torch.bfloat16, True, None)
    sample_weight = sample_weight(first.weight, gws_key_0, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, torch.bfloat16, True, 0, '', 9)
    x = linear(l_x_, sample_weight, None)
    _enter_autocast_1 = _enter_autocast('cpu', None, False, None)
    float_1 = float(x)
    sample_weight_1 = sample_weight(second.weight, gws_key_1, gws_clock, 0, 'e4m3', 5.0, 'rounded_normal', [32, 32], 'floor', None, '', [], [], None, None, True, 0, '', 9)
    linear_1 = linear(float_1, sample_weight_1, None)
    _exit_autocast = _exit_autocast(_enter_autocast_1)
    _exit_autocast_1 = _exit_autocast(_enter_autocast)
    return (linear_1,)
tag_activation_checkpoint = tag_activation_checkpoint(wrap_body_0, l_x_, first.weight, second.weight, gws_key_0, gws_clock, gws_key_1, use_reentrant=False)
getitem = getitem(tag_activation_checkpoint, 0)
return (getitem,)""",
        )
