"""A teacher in full precision beside a sampled student, in the three ways in which a teacher is called."""

import functools
from types import SimpleNamespace

import pytest
import torch
from support.eager import gradients
from torch import nn
from torch.nn import functional as F

import gws_compile

FMT, TEMPERATURE = "int3", 2.0
EXCLUDE = (*gws_compile.DEFAULT_EXCLUDE, "teacher.*")

pytestmark = pytest.mark.usefixtures("reset")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def loss_of(given, wanted, labels):
    soft = F.kl_div(
        F.log_softmax(given / TEMPERATURE, -1),
        F.log_softmax(wanted / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    return 0.7 * TEMPERATURE**2 * soft + 0.3 * F.cross_entropy(given, labels)


def models(*, frozen=True):
    return Net(), Net().requires_grad_(not frozen)


def step_of(student, teacher):
    def step(x, labels):
        with torch.no_grad():
            wanted = teacher(x)
        given = student(x)
        return loss_of(given, wanted, labels), given, wanted

    return step


def check(outputs, student, teacher, x, labels, names, fmt=FMT):
    """Against the unmodified models: the teacher as it is, the student's weights sampled with the public reference."""
    loss, given, wanted = outputs
    with torch.no_grad():
        expected = teacher(x)
    assert torch.equal(wanted, expected)
    seen = []

    def of_student(call):
        seen.append(call(x))
        return loss_of(seen[0], expected, labels)

    value, grads = gradients(student, of_student, names, fmt, 0)
    assert torch.equal(given, seen[0])
    assert loss.item() == value
    loss.backward()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.grad, grads[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def data():
    return torch.randn(6, 24), torch.randint(24, (6,))


WEIGHTS = [name for name, parameter in Net().named_parameters() if parameter.ndim == 2]


def in_a_module(student, teacher):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = student, teacher
            self.step = step_of(student, teacher)

        def forward(self, x, labels):
            with torch.no_grad():
                wanted = self.teacher(x)
            given = self.student(x)
            return loss_of(given, wanted, labels), given, wanted

    return Both()


def as_arguments(student, teacher):
    def step(x, labels, *, student, teacher):
        return step_of(student, teacher)(x, labels)

    return lambda backend: functools.partial(torch.compile(step, backend=backend), student=student, teacher=teacher)


def of_a_trainer(student, teacher):
    class Trainer:
        def __init__(self):
            self.student, self.teacher = student, teacher

        def step(self, x, labels):
            return step_of(self.student, self.teacher)(x, labels)

    return Trainer().step


def in_a_dict(student, teacher):
    models = {"student": student, "teacher": teacher}
    return lambda x, labels: step_of(models["student"], models["teacher"])(x, labels)


def in_a_namespace(student, teacher):
    models = SimpleNamespace(student=student, teacher=teacher)
    return lambda x, labels: step_of(models.student, models.teacher)(x, labels)


def in_a_nested_closure(student, teacher):
    inner = step_of(student, teacher)
    return lambda x, labels: inner(x, labels)


def compiled_by_itself(student, teacher):
    """A graph of plain torch.compile is traced through: what it was compiled with does not count."""
    return step_of(student, torch.compile(teacher, backend="aot_eager"))


WAYS = [step_of, in_a_dict, in_a_namespace, of_a_trainer, in_a_nested_closure, as_arguments, compiled_by_itself]


@pytest.mark.parametrize(
    ("way", "inner"), [(way, "eager") for way in WAYS] + [(step_of, "aot_eager"), (compiled_by_itself, "aot_eager")]
)
def test_both_in_one_function(way, inner):
    """The teacher is known by what the function calls it; the student draws by its own names."""
    student, teacher = models()
    pqt = gws_compile.backend(FMT, exclude=EXCLUDE, inner=inner)
    made = way(student, teacher)
    step = made(pqt) if way is as_arguments else torch.compile(made, backend=pqt, fullgraph=True)
    x, labels = data()
    check(step(x, labels), student, teacher, x, labels, WEIGHTS)
    assert sorted(r.name for r in pqt.report().rewritten) == WEIGHTS
    left = {r.reason for r in pqt.report().skipped}
    assert left == {"matches the exclude pattern 'teacher.*'"}
    assert len(pqt.report().skipped) == len(WEIGHTS)


def test_both_in_one_module():
    """Names are those in the module: the student draws by ``student.…``."""
    student, teacher = models()
    pqt = gws_compile.backend(FMT, exclude=EXCLUDE, inner="aot_eager")
    x, labels = data()
    outputs = torch.compile(in_a_module(student, teacher), backend=pqt)(x, labels)
    names = [f"student.{name}" for name in WEIGHTS]
    assert sorted(r.name for r in pqt.report().rewritten) == names
    _, given, wanted = outputs
    values = {n: p.detach() for n, p in student.named_parameters()}
    values |= {n: gws_compile.sample(values[n], FMT, name=f"student.{n}") for n in WEIGHTS}
    assert torch.equal(wanted, teacher(x))
    assert torch.equal(given, torch.func.functional_call(student, values, (x,)))


@pytest.mark.parametrize("teacher_call", ["eager", "compiled"])
def test_a_teacher_outside(teacher_call):
    """Called eagerly, or by a plain ``torch.compile``, no graph of the student's backend has it."""
    student, teacher = models()
    pqt = gws_compile.backend(FMT, inner="aot_eager")
    called = teacher if teacher_call == "eager" else torch.compile(teacher, backend="aot_eager")
    compiled = torch.compile(student, backend=pqt)
    x, labels = data()
    with torch.no_grad():
        wanted = called(x)
    given = compiled(x)
    check((loss_of(given, wanted, labels), given, wanted), student, teacher, x, labels, WEIGHTS)
    assert sorted(r.name for r in pqt.report()) == WEIGHTS


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_that_is_not_excluded_is_cast(frozen):
    """Frozen or not: what the documentation warns of. Its logits are those of the cast weights, without noise."""
    student, teacher = models(frozen=frozen)
    pqt = gws_compile.backend(FMT, inner="eager")
    x, labels = data()
    _, _, wanted = torch.compile(step_of(student, teacher), backend=pqt)(x, labels)
    values = {n: p.detach() for n, p in teacher.named_parameters()}
    values |= {n: gws_compile.quantize(values[n], FMT) for n in WEIGHTS}
    assert torch.equal(wanted, torch.func.functional_call(teacher, values, (x,)))
    assert len(pqt.report().rewritten) == 2 * len(WEIGHTS)


def test_a_pattern_that_matches_nothing_names_both_models():
    student, teacher = models()
    step = torch.compile(
        step_of(student, teacher), backend=gws_compile.backend(FMT, exclude=["techer.*"], inner="eager")
    )
    with pytest.warns(
        gws_compile.GwsWarning, match=r"exclude='techer.\*' has matched no weight.*teacher.blocks.*student.blocks"
    ):
        step(*data())


def test_rules_by_model():
    """Rules see the same names: a student in another format than a second one in the same function."""
    student, teacher = models()
    rules = [("teacher.*", None), ("student.blocks.0.*", "fp8_e4m3")]
    pqt = gws_compile.backend(FMT, rules=rules, inner="eager")
    torch.compile(step_of(student, teacher), backend=pqt)(*data())[0].backward()
    assert {r.name: r.fmt for r in pqt.report().rewritten} == {
        name: "fp8_e4m3" if name.startswith("blocks.0") else FMT for name in WEIGHTS
    }


def test_a_graph_break_between_the_two_changes_nothing():
    student, teacher = models()
    pqt = gws_compile.backend(FMT, exclude=EXCLUDE, inner="eager")

    def step(x, labels):
        given = student(x)
        torch._dynamo.graph_break()
        with torch.no_grad():
            wanted = teacher(x)
        return loss_of(given, wanted, labels), given, wanted

    x, labels = data()
    with pytest.warns(gws_compile.GwsWarning, match="has matched no weight so far"):  # the student's graph comes first
        outputs = torch.compile(step, backend=pqt)(x, labels)
    check(outputs, student, teacher, x, labels, WEIGHTS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models(kind):
    """A teacher wider than its student, called with the same tokens in one graph."""
    transformers = pytest.importorskip("transformers")
    build = {
        "gpt2": lambda width: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40,
                n_embd=width,
                n_layer=1,
                n_head=2,
                n_positions=8,
                use_cache=False,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "llama": lambda width: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=40,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=8,
                use_cache=False,
            )
        ),
    }[kind]
    student, teacher = build(16), build(32).requires_grad_(False)
    tokens = torch.randint(40, (3, 8))

    def step(tokens):
        with torch.no_grad():
            wanted = teacher(input_ids=tokens).logits
        given = student(input_ids=tokens).logits
        return loss_of(given.flatten(0, 1), wanted.flatten(0, 1), tokens.flatten()), given, wanted

    pqt = gws_compile.backend(FMT, exclude=EXCLUDE, inner="eager")
    loss, given, wanted = torch.compile(step, backend=pqt, fullgraph=True)(tokens)
    names = [r.name for r in pqt.report().rewritten]
    assert len(names) == {"gpt2": 4, "llama": 7}[kind]
    assert torch.equal(wanted, teacher(input_ids=tokens).logits)
    values = {n: p.detach() for n, p in student.named_parameters()}
    values |= {n: gws_compile.sample(values[n], FMT, name=n) for n in names}
    assert torch.equal(given, torch.func.functional_call(student, values, kwargs={"input_ids": tokens}).logits)
    loss.backward()
    assert all(dict(student.named_parameters())[name].grad is not None for name in names)
