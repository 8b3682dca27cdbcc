"""A weight that is multiplied or divided by one number before its read: it is sampled, then scaled."""

import pytest
import torch
from support.graphs import reasons
from torch import nn
from torch.nn import functional as F

import gws_compile

FMT = "fp4_e2m1"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("reset")


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.lambdas = nn.Parameter(torch.tensor([0.3, 1.2]))
        self.block = nn.Parameter(torch.full((1, 1), 1.5))
        self.register_buffer("norm", torch.tensor(3.0))
        self.scale = scale

    def forward(self, x):
        return F.linear(x, self.scale(self, self.weight))


NUMBERS = {
    "a number": lambda m, w: w * 0.3,
    "a number in front": lambda m, w: 0.3 * w,
    "an int": lambda m, w: 3 * w,
    "mul": lambda m, w: w.mul(other=0.3),
    "torch.mul": lambda m, w: torch.mul(0.3 * m.gain, other=w),
    "multiply": lambda m, w: torch.multiply(input=w, other=m.gain),
    "a parameter": lambda m, w: w * m.gain,
    "a parameter in front": lambda m, w: m.gain * w,
    "one of two": lambda m, w: m.lambdas[1] * w,
    "a parameter of two dims": lambda m, w: w * m.block,
    "a buffer": lambda m, w: w / m.norm,
    "a quotient": lambda m, w: w / 8**0.5,
    "div": lambda m, w: torch.div(w, other=m.gain),
    "true_divide": lambda m, w: w.true_divide(3.0),
    "computed of the gain": lambda m, w: w * torch.sigmoid(m.gain),
    "two of them": lambda m, w: m.gain * (w / m.norm),
    "behind a view": lambda m, w: (w.t() * m.gain).t(),
    "cast first": lambda m, w: w.to(torch.float64).float() * m.gain,
}


@pytest.mark.parametrize(
    ("form", "inner"),
    [*((form, "aot_eager") for form in NUMBERS), ("a parameter", "inductor"), ("two of them", "inductor")],
)
def test_a_weight_that_is_scaled_is_sampled(form, inner):
    """The sample is scaled, as the layer that is served scales the weight that was cast; its scale gets a gradient."""
    model = Scaled(NUMBERS[form])
    backend = gws_compile.backend(FMT, inner=inner)
    out = torch.compile(model, backend=backend, fullgraph=True)(X)
    out.square().sum().backward()
    assert reasons(backend)["weight"] == "linear"

    twin = Scaled(NUMBERS[form])
    twin.load_state_dict(model.state_dict())
    sampled = gws_compile.sample(model.weight.detach(), FMT, name="weight")
    with torch.no_grad():
        twin.weight.copy_(sampled)
    expected = twin(X)
    expected.square().sum().backward()
    # Inductor may round the product once where eager does twice.
    tolerance = {"rtol": 0, "atol": 0} if inner == "aot_eager" else {}
    torch.testing.assert_close(out, expected, **tolerance)
    for name, p in model.named_parameters():
        other = twin.get_parameter(name).grad
        assert (p.grad is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(p.grad, other, **tolerance)


MORE_THAN_A_NUMBER = {
    "rows": lambda m, w: w * m.weight.norm(dim=1, keepdim=True),
    "normalized": lambda m, w: w * (m.gain / w.norm()),
    "a sum": lambda m, w: w + m.gain,
    "itself": lambda m, w: w * w,
    "a function": lambda m, w: torch.tanh(w),
    "a rounding mode": lambda m, w: torch.div(w, 0.25, rounding_mode="floor"),
    "the number divided": lambda m, w: 1.0 / w,
}


@pytest.mark.filterwarnings("ignore::gws_compile.GwsWarning")
@pytest.mark.parametrize("form", MORE_THAN_A_NUMBER)
def test_what_is_computed_otherwise_is_left_alone(form):
    model = Scaled(MORE_THAN_A_NUMBER[form])
    backend = gws_compile.backend(FMT, inner="aot_eager")
    out = torch.compile(model, backend=backend)(X)
    assert torch.equal(out, model(X))
    assert reasons(backend)["weight"].startswith("computed with before linear reads it: ")


def test_a_gain_is_no_weight():
    model = Scaled(NUMBERS["a parameter of two dims"])
    backend = gws_compile.backend(FMT, inner="aot_eager")
    torch.compile(model, backend=backend)(X)
    assert reasons(backend)["block"] == "no matrix product or convolution reads it, only: mul"


@pytest.mark.parametrize("spell", ["x += pos", "x *= pos", "x.add_(pos)"])
def test_what_is_added_in_place_is_known(spell):
    """What is written is the activation, also where a parameter was copied into it before."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.cls, self.pos = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            x = torch.cat((self.cls, x))
            if spell == "x += pos":
                x += self.pos
            elif spell == "x *= pos":
                x *= self.pos
            else:
                x.add_(self.pos)
            return self.fc(x)

    backend = gws_compile.backend(FMT, inner="aot_eager")
    torch.compile(Tokens(), backend=backend)(X)
    found = reasons(backend)
    op = {"x += pos": "iadd", "x *= pos": "imul", "x.add_(pos)": "add_"}[spell]
    assert found["fc.weight"] == "linear"
    assert found["pos"] == f"no matrix product or convolution reads it, only: {op}"
    assert found["cls"].startswith(found["pos"])  # the activation goes on to the layer
