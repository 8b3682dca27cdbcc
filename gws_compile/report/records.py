"""What a report is made of: frozen records of weights, their reads, graphs and graph breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

_HINTS = {
    "matches the exclude pattern": "to rewrite it, give exclude= a list without this pattern",
    "no include pattern matches": "to rewrite it, add a pattern that matches its name to include=",
    "no matrix product or convolution reads it, only:": (
        "if one of these operations multiplies or convolves with it, gws_compile does not know the operation yet: "
        "report its name, as it stands here, with the versions of torch and gws_compile"
    ),
    "no traced graph has it: not used": (
        "see the graph breaks: mend them, or call torch.compile(module, backend=...) on the module that holds it"
    ),
}
"""How a reason begins -> what to do about it."""


@dataclass(frozen=True)
class ReadRecord:
    """One read of a weight.

    Attributes:
        op: the operation, such as ``"linear"``.
        location: ``file:line in function`` of the user's code (or a library's) that calls it; empty where unknown.
        code: that line.
        stack: the callers, outermost first, as ``file:line in function``; ``location`` is the last.
    """

    op: str
    location: str
    code: str
    stack: tuple[str, ...]


@dataclass(frozen=True)
class WeightRecord:
    """One weight in the report.

    Attributes:
        name: qualified name, relative to the compiled module.
        shape: the weight's.
        dtype: the weight's, such as ``"float32"``.
        op: the operation that reads it (``"linear"``); several are joined by ``", "``; empty if none does.
        rewritten: whether its reads see the cast weight.
        reason: why it was left alone; empty when rewritten.
        fmt: the format, or preset, that it is cast to; empty when left alone.
        bits: the bit width b of its noise, at the current draw of a schedule; None when left alone, cast without noise,
            or learned.
        noise: ``"rounded_normal"``, ``"uniform"``, or ``"none"`` for a cast without noise (frozen weights, and graphs
            traced with gradients disabled); empty when left alone.
        location: ``file:line`` of the first read in the user's code.
        block: the shape of its blocks, such as ``"32 x 32"``, ``"row"`` or ``"matrix"``; empty when left alone.
        scale: the rule of its block scale, ``"none"`` for none; empty when left alone.
        rule: the rule that holds of it, as text; empty where none does.
        stored_bytes: of the cast weight with its scales, as a file has them; None when left alone, and with learned
            widths, of which `BitsSummary.stored_bytes` tells.
        reads: every read.
        sparsity: what of it is zero: ``"2:4"``, or the text of `PrunedGroups`; empty for a dense weight.
        dense_because: why it is dense, although a setting says that it is not; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    op: str
    rewritten: bool
    reason: str
    fmt: str
    bits: float | None
    noise: str
    location: str
    block: str = ""
    scale: str = ""
    rule: str = ""
    stored_bytes: int | None = None
    reads: tuple[ReadRecord, ...] = ()
    sparsity: str = ""
    dense_because: str = ""

    @property
    def hint(self) -> str:
        """What to do if a weight that was left alone should be rewritten; empty where there is nothing to say."""
        return next((hint for start, hint in _HINTS.items() if self.reason.startswith(start)), "")


@dataclass(frozen=True)
class GraphBreak:
    """A place that Dynamo could not trace.

    Attributes:
        reason: Dynamo's own words: the cause on the first line, then explanation and hints.
        location: ``file:line in function`` of the user's code; empty where the frame was left as a whole, of which
            Dynamo keeps the cause alone.
    """

    reason: str
    location: str

    @property
    def cause(self) -> str:
        """The first line of the reason."""
        return self.reason.strip().partition("\n")[0]


@dataclass(frozen=True)
class ProductRecord:
    """One product of a graph, forward or backward, and how its operands are rounded.

    Attributes:
        graph: number of the graph.
        weight: name of the sampled weight whose product it is; empty for another product.
        kind: ``"forward"``, ``"dgrad"`` or ``"wgrad"`` of that weight; ``"attention"``; empty for another product.
        op: the operation, such as ``"mm"``.
        location: ``file:line`` of the user's code; empty where unknown.
        operands: ``"weight"``, ``"activation"``, ``"gradient"``, ``"attention"`` -> how it is rounded, in words; empty
            text for one that is not.
        reason: why operands are not rounded that could be; empty where there is none.
    """

    graph: int
    weight: str
    kind: str
    op: str
    location: str
    operands: Mapping[str, str]
    reason: str = ""

    @property
    def rounded(self) -> bool:
        """Whether an operand that is no weight is."""
        return any(text for role, text in self.operands.items() if role != "weight")

    @property
    def text(self) -> str:
        """How its operands are rounded, in one line."""
        return "; ".join(f"{role} {text or 'not rounded'}" for role, text in self.operands.items())


@dataclass(frozen=True)
class GraphRecord:
    """One traced graph.

    Attributes:
        number: from 0, in the order of tracing.
        compile_id: Dynamo's ``"frame/number"``; a number above 0 is a recompilation.
        location: ``file:line in function`` of its first operation's outermost caller, decorators' wrappers left out.
        gradients: traced with gradients enabled.
        graph_break: what ended it early; None where it ends with its function.
        recompiled: why its frame was compiled again: the guard that failed; empty for a first compilation.
        before: the graph as Dynamo gave it, as readable code.
        graph: as it was rewritten.
    """

    number: int
    compile_id: str
    location: str
    gradients: bool
    graph_break: GraphBreak | None
    recompiled: str
    before: str = field(repr=False)
    graph: fx.GraphModule = field(repr=False)

    @property
    def after(self) -> str:
        """The rewritten graph, as readable code."""
        return self.graph.print_readable(print_output=False)
