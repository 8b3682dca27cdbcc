"""Coverage of real model code: which weights are rewritten, and which are not and why.

    python benchmarks/model_coverage.py                # every model of model_catalogue.py; writes docs/coverage.md
    python benchmarks/model_coverage.py Llama Mamba    # these only, printed

Every model is called once with random weights. For each, the program finds the weights by itself (from the modules
that own them, not from the pass), and checks that

- each is in the report of `gws_compile.explain`, as rewritten or with a reason,
- evaluation under ``no_grad`` casts what training samples,
- with ``fmt="e8m23", noise="none"``, which changes no value, outputs and gradients are those of plain
  ``torch.compile``, bit for bit,
- in a training step with noise, outputs and gradients are those of the plain model at the sampled weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gws_compile.passes import operations
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import gws_compile

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
FORMAT = "fp4_e2m1"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Skipped:
    """A reason, without paths and line numbers, and the names of the weights it holds for, without layer numbers."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """What was seen of one model.

    Attributes:
        name, family: of the entry.
        weights: parameters of two or more dims.
        rewritten: how many of them the pass rewrites.
        skipped: the others, by reason.
        graphs: graphs that Dynamo traced.
        breaks: graph breaks.
        eager: frames that Dynamo left to Python as a whole.
    """

    name: str
    family: str
    weights: int
    rewritten: int
    skipped: tuple[Skipped, ...]
    graphs: int
    breaks: int
    eager: int

    def row(self) -> tuple[str, ...]:
        """The line in the page's table."""
        texts = (s.reason.replace("*", r"\*") + ": " + ", ".join(f"`{n}`" for n in s.names) for s in self.skipped)
        numbers = (str(self.graphs), str(self.breaks), str(self.eager))
        return (self.name, str(self.weights), str(self.rewritten), "<br>".join(texts), *numbers)


# Modules whose parameters of two or more dims multiply activations. What is left are embeddings, norms, and bare
# parameters of other modules, which may be anything.
_MULTIPLYING = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip


# The only reasons for which a weight that its module multiplies by may be left alone.
BY_CHOICE = ("matches the exclude pattern", "also an embedding table (tied)", "computed with before ")


def weights_by_modules(model: nn.Module) -> set[str]:
    """Names of the weights of a model that its modules multiply by, whatever the traced graph says.

    A parametrized weight counts by its original parameters.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    names = set()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables:
            continue
        path = name.rpartition(".")[0].split(".parametrizations.")[0]
        owner = model.get_submodule(path)
        multiplies = isinstance(owner, _MULTIPLYING) or type(owner).__name__ in ("Conv1D", "Conv1d")
        if multiplies or ("xpert" in type(owner).__name__ and not name.endswith("bias")):
            names.add(name)
    return names


def loss_of(output: Any) -> torch.Tensor:
    """A number that depends on everything that a model returns."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.stack([x.float().square().mean() for x in leaves]).sum()


@contextlib.contextmanager
def surroundings(entry: Any) -> Iterator[None]:
    """One thread (gradients of embeddings add with atomics), a fresh Dynamo, and what the entry needs of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    # Plain torch.compile cannot train an LSTM on oneDNN's kernel (torch 2.13).
    with (
        torch._dynamo.config.patch(allow_rnn=entry.recurrent),
        warnings.catch_warnings(),
        torch.backends.mkldnn.flags(enabled=False) if entry.recurrent else contextlib.nullcontext(),
    ):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=gws_compile.GwsWarning)
        warnings.filterwarnings("ignore", message="no weight has been rewritten so far")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch._dynamo.reset()


def build(entry: Any) -> nn.Module:
    """The entry's model, with the same weights each time."""
    torch.manual_seed(0)
    model: nn.Module = entry.build()
    return model


def call(model: Callable[..., Any], owner: nn.Module, entry: Any) -> tuple[Tensors, Tensors]:
    """Outputs and gradients of one training call."""
    owner.zero_grad()
    output = model(**entry.inputs())
    loss_of(output).backward()
    outputs = {str(i): x.detach() for i, x in enumerate(tree_leaves(output)) if isinstance(x, torch.Tensor)}
    return outputs, {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def differing(left: tuple[Tensors, Tensors], right: tuple[Tensors, Tensors]) -> list[str]:
    """Names of the outputs and gradients that are not the same, bit for bit."""
    names = []
    for a, b in zip(left, right, strict=True):
        names += sorted(a.keys() ^ b.keys())
        names += [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return names


def explain(entry: Any) -> tuple[Coverage, gws_compile.Report]:
    """What `gws_compile.explain` says of a model, held against the modules' own weights.

    Raises:
        AssertionError: it leaves one out, or leaves one alone without a good reason.
    """
    with surroundings(entry):
        model = build(entry)
        torch._dynamo.utils.counters.clear()
        report = gws_compile.explain(model, **entry.inputs(), fmt=FORMAT)
        counters = torch._dynamo.utils.counters
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        eager = counters["frames"]["total"] - counters["frames"]["ok"]
    listed = {record.name for record in report}
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert matrices == listed, f"{entry.name}: listed and owned weights differ in {sorted(matrices ^ listed)}"
    multiplied = weights_by_modules(model)
    accepted = (*BY_CHOICE, "no traced graph has it") if entry.untraced else BY_CHOICE
    for record in report.skipped:
        good = record.reason.startswith(accepted) if record.name in multiplied else record.reason
        assert good, f"{entry.name}: {record.name} is left alone: {record.reason}"
    reasons: dict[str, list[str]] = {}
    for record in report.skipped:
        reasons.setdefault(_short_reason(record.reason), []).append(_short_name(record.name))
    skipped = tuple(Skipped(reason, tuple(dict.fromkeys(names))) for reason, names in reasons.items())
    rewritten = {record.name for record in report.rewritten}
    both = rewritten & {record.name for record in report.skipped}
    assert not both, f"{entry.name}: rewritten in one graph and left alone in another: {sorted(both)}"
    return Coverage(entry.name, entry.family, len(listed), len(rewritten), skipped, graphs, breaks, eager), report


def _short_reason(reason: str) -> str:
    return re.sub(r" at (?:\S*/)?([^/\s]+):\d+", r" (\1)", reason)


def _short_name(name: str) -> str:
    parts = ["*" if part.isdigit() else part for part in name.split(".") if part != "parametrizations"]
    return ".".join(parts[-3:])


def check_evaluation(entry: Any, report: gws_compile.Report) -> None:
    """Under ``no_grad`` and ``eval`` the cast is where the noise was.

    Raises:
        AssertionError: it is not.
    """
    with surroundings(entry), torch.no_grad():
        evaluated = gws_compile.explain(build(entry).eval(), **entry.inputs(), fmt=FORMAT)
    trained, cast = ({r.name for r in r.rewritten} for r in (report, evaluated))
    assert trained == cast, f"{entry.name}: training and evaluation differ in {sorted(trained ^ cast)}"


def check_surgery(entry: Any, inner: str = "aot_eager") -> None:
    """Without noise and with a lossless format, nothing differs from plain ``torch.compile(backend=inner)``.

    Inductor runs without its layout optimization: that one lays out a sampled convolution weight, which is no input of
    the graph, as channels-last, and oneDNN then adds up the gradients in another order.

    Raises:
        AssertionError: something does.
    """
    inductor = importlib.import_module("torch._inductor.config")
    with surroundings(entry), inductor.patch(layout_optimization=False):
        results = []
        for backend in (inner, gws_compile.backend("e8m23", noise="none", inner=inner)):
            torch._dynamo.reset()
            model = build(entry)
            results.append(call(torch.compile(model, backend=backend), model, entry))
    names = differing(*results)
    assert not names, f"{entry.name}: not bit-identical with {inner}: {names}"


def sampled(value: torch.Tensor, record: gws_compile.WeightRecord) -> torch.Tensor:
    """What the reference makes of a weight in the first step."""
    # Of three dims, those of a convolution are one matrix, those of experts are several.
    matrix = value.flatten(1) if record.op.startswith("conv") else value
    if record.noise == "none":
        return gws_compile.quantize(matrix, FORMAT).view_as(value)
    return gws_compile.sample(matrix, FORMAT, name=record.name).view_as(value)


def check_samples(entry: Any, report: gws_compile.Report) -> None:
    """A training step with noise is one of the plain model, at the weights that `gws_compile.sample` gives.

    Raises:
        AssertionError: an output or gradient differs by more than reordered float32 additions explain.
    """
    with surroundings(entry):
        model = build(entry)
        compiled = torch.compile(model, backend=gws_compile.backend(FORMAT, inner="eager"))
        outputs, gradients = call(compiled, model, entry)
        plain = build(entry)
        rewritten = {record.name: record for record in report.rewritten}
        values = {}
        for name, parameter in plain.named_parameters():
            value = sampled(parameter.detach(), rewritten[name]) if name in rewritten else parameter.detach()
            values[name] = value.clone().requires_grad_(parameter.requires_grad)
        output = functional_call(plain, values, (), entry.inputs())
        loss_of(output).backward()
    expected = {str(i): x.detach() for i, x in enumerate(tree_leaves(output)) if isinstance(x, torch.Tensor)}
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{entry.name}: {m}")
    wanted = {name: v.grad for name, v in values.items() if v.grad is not None}
    assert gradients.keys() == wanted.keys(), f"{entry.name}: {sorted(gradients.keys() ^ wanted.keys())}"
    for name, gradient in gradients.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(
            gradient,
            wanted[name],
            rtol=1e-3,
            atol=1e-5 * max(scale, 1.0),
            msg=lambda m, n=name: f"{entry.name} {n}: {m}",
        )


def check(entry: Any) -> Coverage:
    """Everything above, for one model."""
    coverage, report = explain(entry)
    check_evaluation(entry, report)
    check_surgery(entry)
    check_samples(entry, report)
    return coverage


# --- The page --------------------------------------------------------------------------------------------------------

HEADERS = ("model", "weights", "rewritten", "left alone, and why", "graphs", "graph breaks", "eager frames")

TOP = """# Coverage of real model code

Written by `python benchmarks/model_coverage.py` (`pip install '.[dev,examples]'`), torch {torch}, transformers
{transformers}, on a CPU; `tests/models/test_coverage.py` holds it. The models are those of
[benchmarks/model_catalogue.py](../benchmarks/model_catalogue.py): real model code with one to three layers of width 32.

Of each model this was checked:

- every parameter of two or more dims is in the report of `gws_compile.explain`, as rewritten or with a reason; for the
  weights of its linear layers, convolutions, recurrent layers, attention and experts, which are enumerated by the
  modules and not by the pass, the only reasons are names that are excluded, tied tables and computed weights;
- evaluation under `no_grad` casts what training samples;
- with `fmt="e8m23", noise="none"`, which changes no value, outputs and gradients are those of plain `torch.compile`
  with the same inner compiler, bit for bit (`aot_eager`; for a model of each kind Inductor too, with
  `layout_optimization=False`);
- a training step with noise has the outputs and gradients of the plain model at the weights that `gws_compile.sample`
  gives.

"Weights" counts the parameters of two or more dims, tied ones once; layers of one kind are named once (`*`). "Eager
frames" are functions that Dynamo left to Python as a whole; with a graph break they run in parts.
{rewritten} of {weights} weights in {models} models are rewritten, and {left} are left alone, each with its reason.
"""

BOTTOM = """## What the reasons mean

- **embedding look-up**, **norms, position tables, state matrices** ("no matrix product or convolution reads it"): no
  operand of a matrix product; the method is about those.
- **also an embedding table (tied)**, **matches the exclude pattern**: left alone by default; `include` and `exclude`
  say otherwise.
- **computed with before ... reads it**: weight norm, spectral norm, orthogonal and other parametrizations, weight
  standardization, adapters that are merged into their base before the product. What is deployed there is the computed
  weight, not the parameters: noise on the parameters would be another noise than the method's, of another size. Remove
  the parametrization, or call base and adapters apart (as `peft` does), to have the weights sampled.
- **no traced graph has it**: code that Dynamo left to eager Python, or that this call does not reach.

Weights that are joined before use (fused projections, stacked experts) are sampled one by one, by their own names. Of
an adapted model (LoRA) the frozen base is cast without noise and the adapters are sampled. Under `vmap` and `grad` of
`torch.func` the sample is taken outside of the transform: one sample for all that is mapped over.

`nn.LSTM`, `nn.GRU` and `nn.RNN` are traced by Dynamo only under `torch._dynamo.config.allow_rnn = True`. Then they are
rewritten like any other. Plain `torch.compile` (2.13) cannot train an LSTM on oneDNN's kernel: on a CPU also set
`torch.backends.mkldnn.enabled = False`. Cells (`nn.LSTMCell`) need neither.

## Operations that read weights

{operations}

A parameter of two or more dims that another operation uses is left alone. If the operation is one that
`gws_compile` does not know, the reason names it, with file and line, and asks for it.
"""


def page(results: Sequence[Coverage]) -> str:
    """The text of docs/coverage.md."""
    families: dict[str, list[Coverage]] = {}
    for coverage in results:
        families.setdefault(coverage.family, []).append(coverage)
    weights, rewritten = sum(c.weights for c in results), sum(c.rewritten for c in results)
    top = TOP.format(
        torch=torch.__version__.partition("+")[0],
        transformers=version("transformers"),
        models=len(results),
        weights=weights,
        rewritten=rewritten,
        left=weights - rewritten,
    )
    tables = (f"## {family[0].upper()}{family[1:]}\n\n{table(rows)}\n" for family, rows in families.items())
    return "\n".join([top, *tables, BOTTOM.format(operations=operations_table())])


def table(rows: Iterable[Coverage]) -> str:
    """A table of the page."""
    return _table(HEADERS, [c.row() for c in rows])


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_FUSED = frozenset(n for n in operations.READS if re.search(r"attention|encoder|lstm|gru|rnn", n))


def operations_table() -> str:
    """Which operations read weights, from the pass."""
    groups = {
        "linear layers, matrix products": operations.READS.keys() - operations.CONVOLUTIONS - _FUSED,
        "convolutions": operations.CONVOLUTIONS,
        "fused attention, recurrent layers": _FUSED,
        "followed to what reads their result": operations.TRANSPARENT,
    }
    rows = [(group, ", ".join(f"`{name}`" for name in sorted(names))) for group, names in groups.items()]
    return _table(("", "operations"), rows)


def main() -> None:
    """Run the program."""
    from model_catalogue import ENTRIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models of model_catalogue.py; all by default")
    names = parser.parse_args().names
    if unknown := set(names) - {entry.name for entry in ENTRIES}:
        parser.error(f"no such models: {', '.join(sorted(unknown))}; known: {', '.join(e.name for e in ENTRIES)}")
    results, failed = [], 0
    for entry in ENTRIES:
        if names and entry.name not in names:
            continue
        try:
            results.append(check(entry))
            print(f"{entry.name}: ok", file=sys.stderr)
        except Exception as error:  # the other models are still of interest
            failed += 1
            print(f"{entry.name}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{failed} of {len(results) + failed} models fall short")
    if names:
        print(table(results))
    else:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
