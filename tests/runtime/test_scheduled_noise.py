"""Schedules in training: noise from a step to a step, widths over steps; nothing is compiled again."""

import pytest
import torch
from support.small_models import OneLayer

import gws_compile
from gws_compile import LearnedBits, Schedule

pytestmark = pytest.mark.usefixtures("fresh")

STEPS = 6


def setup(schedule, *, inner="eager", **settings):
    torch.manual_seed(0)
    model = OneLayer(bias=False)
    backend = gws_compile.backend(schedule=schedule, inner=inner, **settings)
    return model, torch.compile(model, backend=backend), backend


def used(compiled, model):
    """The weight that a training forward multiplies with."""
    return compiled(torch.eye(model.fc.in_features)).t()


def wanted(model, step, bits=None, noise="rounded_normal", fmt="fp8_e4m3"):
    return gws_compile.sample(model.fc.weight.detach(), fmt, name="fc.weight", step=step, bits=bits, noise=noise)


def step_of(optimizer, out):
    optimizer.zero_grad()
    out.square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_noise_from_start_to_stop_at_the_width_of_the_step(inner, backward):
    schedule = Schedule(start=1, stop=5, bits=((2, 8.0), (4, 4.0)))
    model, compiled, backend = setup(schedule, inner=inner, backward=backward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    widths = {1: 8.0, 2: 8.0, 3: 6.0, 4: 4.0}
    for step in range(STEPS):
        noise = "rounded_normal" if step in widths else "none"
        out = used(compiled, model)
        assert torch.equal(out, wanted(model, step, widths.get(step), noise)), step
        if step in widths:
            assert backend.report().records[0].bits == backend.average_bits() == widths[step]
            assert backend.metrics()["fc.weight"].bits == widths[step]
        step_of(optimizer, out)
    with torch.no_grad():
        assert torch.equal(used(compiled, model), gws_compile.quantize(model.fc.weight, "fp8_e4m3"))
    assert len(backend.graphs) == 2  # of training and of evaluation


def test_the_gradient_is_that_of_the_same_draw():
    """Under recomputation backward samples again: with the width of its own forward, not that of the step behind it."""
    model, compiled, backend = setup(Schedule(bits=((0, 8.0), (1, 3.0))), backward="recompute", inner="aot_eager")
    x = torch.randn(3, model.fc.in_features, requires_grad=True)
    first = compiled(x)
    backend.step()
    assert torch.equal(used(compiled, model), wanted(model, 1, 3.0))
    first.sum().backward()
    assert torch.allclose(x.grad, wanted(model, 0, 8.0).sum(0).expand_as(x), atol=1e-5)


def test_a_thousand_steps_compile_nothing_again():
    model, compiled, backend = setup(Schedule(start=10, stop=900, bits=((0, 9.0), (1000, 4.0))))
    x = torch.randn(2, model.fc.in_features)
    for _ in range(1000):
        compiled(x)
        backend.step()
    assert len(backend.graphs) == 1
    assert backend.draw == 1000


def test_micro_batches_share_a_draw_and_its_width():
    model, compiled, _ = setup(Schedule(bits=((0, 8.0), (1, 4.0))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, bits in ((0, 8.0), (1, 4.0)):
        for _ in range(3):
            out = used(compiled, model)
            assert torch.equal(out, wanted(model, step, bits))
            out.sum().backward()
        optimizer.step()


def test_a_resumed_run_stands_where_it_was():
    schedule = Schedule(start=1, bits=((0, 8.0), (4, 4.0)))
    model, compiled, backend = setup(schedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        step_of(optimizer, used(compiled, model))
    state = backend.state_dict()
    model, compiled, backend = setup(schedule)
    backend.load_state_dict(state)
    assert torch.equal(used(compiled, model), wanted(model, 2, 6.0))


def test_switching_noise_off_wins_over_the_schedule():
    model, compiled, backend = setup(Schedule(start=0, stop=5))
    with backend.noise(False):
        assert torch.equal(used(compiled, model), gws_compile.quantize(model.fc.weight.detach(), "fp8_e4m3"))
    assert torch.equal(used(compiled, model), wanted(model, 0))


def test_report_and_page_tell_the_schedule(tmp_path):
    """A width that moves is no number in a graph: the drawing says where it comes from, the table what it is now."""
    model, compiled, backend = setup(Schedule(start=1, bits=((0, 8.0), (4, 4.0))), rules=[("fc.*", {"block": (1, 16)})])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        step_of(optimizer, used(compiled, model))
    schedule = "noise from step 1; b = 8 at step 0, 4 at step 4"
    assert str(backend.report()).endswith(f"schedule: {schedule}")
    backend.report().to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"schedule: {schedule}" in page
    assert "b scheduled" in page
    assert "1 x 16, floor" in page
    assert "rule fc.<wbr>*=block=1x16" in page


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_group"])
def test_scheduled_widths_of_other_formats(fmt):
    model, compiled, _ = setup(Schedule(bits=((0, 4.0), (2, 2.0))), fmt=fmt, inner="inductor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, bits in enumerate((4.0, 3.0, 2.0)):
        out = used(compiled, model)
        assert torch.equal(out, wanted(model, step, bits, fmt=fmt))
        step_of(optimizer, out)


def test_the_target_of_learned_widths_moves():
    """`bit_loss` is the distance to what the schedule says; the reparametrization stays."""
    model, compiled, backend = setup(Schedule(bits=((0, 6.0), (2, 3.0))), bits=LearnedBits(init=7, target=4))
    backend.prepare(model, torch.randn(2, model.fc.in_features))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for distance in (1.0, 2.5, 4.0, 4.0):
        out = used(compiled, model)
        assert backend.bit_loss().item() == pytest.approx(distance)
        step_of(optimizer, out)
    assert backend.bits()["fc.weight"].unique().tolist() == [7.0]


def test_the_average_of_learned_widths_moves():
    """The constraint leads to what the schedule says at each step: the sign of its pull is that of the distance."""
    bits = LearnedBits(init=5, target=4, average=3.0)
    model, compiled, backend = setup(Schedule(bits=((0, 4.0), (1, 6.0))), bits=bits)
    backend.prepare(model, torch.randn(2, model.fc.in_features))
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=0.0)
    pulls = []
    for _ in range(3):
        optimizer.zero_grad()
        (used(compiled, model).square().sum() + backend.bit_loss()).backward()
        own = [p.grad.clone() for p in backend.parameters()]
        for p in backend.parameters():
            p.grad = None
        backend.bit_loss().backward()
        pulls.append([p.grad.sign().unique().tolist() for p in backend.parameters()])
        for p, grad in zip(backend.parameters(), own, strict=True):
            p.grad = grad
        optimizer.step()
    # Without a gradient seen yet it has no scale; then the average of 5 lies below 6: the loss falls with b_i.
    assert pulls[0] == [[0.0]]
    assert pulls[1] == pulls[2] == [[-1.0]]
