"""Short text of rewritten graphs, and small ways to get at them."""

import re

import torch
from torch import fx

import gws_compile


def show(gm: fx.GraphModule, depth: int = 0) -> str:
    """The graph's computing nodes, one a line; parameters under their own names, checkpoint bodies indented."""
    lines, names = [], {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = _parameter_name(node)
        elif node.op == "get_attr":
            names[node] = str(node.target)
            lines += [f"{node.target}:", show(getattr(gm, node.target), depth + 1)]
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
        else:
            names[node] = node.name
            target = node.target if node.op == "call_method" else _target(node.target)
            values = [_text(a, names) for a in node.args] + [f"{k}={_text(v, names)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {target}({', '.join(values)})")
    return "\n".join("    " * (depth > 0) + line for line in "\n".join(lines).splitlines())


def _parameter_name(node: fx.Node) -> str:
    match = re.search(r"(?:modules_(\w+?)_)?parameters_(\w+?)_$", str(node.target))
    return f"{match[1]}.{match[2]}" if match and match[1] else match[2] if match else node.name


def _target(target: object) -> str:
    packet = getattr(target, "overloadpacket", target)
    return getattr(packet, "__name__", str(packet))


def _text(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v, names) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value)


def rewritten_graph(model: torch.nn.Module, *args: torch.Tensor, **settings: object) -> fx.GraphModule:
    """The one rewritten graph of a training call."""
    backend = gws_compile.backend(**{"inner": "eager", **settings})
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    (graph,) = backend.graphs
    return graph


def reasons(backend: gws_compile.Backend) -> dict[str, str]:
    """Weight name -> the operation that reads it, or why it was left alone."""
    return {r.name: r.op if r.rewritten else r.reason for r in backend.report()}


class Reader(torch.nn.Module):
    """A module with one weight, read by a given function of the input and the weight."""

    def __init__(self, weight, read):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.read = read

    def forward(self, x):
        return self.read(x, self.weight)
