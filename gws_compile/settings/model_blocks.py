"""The blocks of a model by their names: `edge_blocks`, for rules about the first and the last of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..torch_internals.compilers import unwrapped
from ..weight_names import WRAPPERS


def edge_blocks(model: nn.Module, *, first: int = 0, last: int = 0) -> list[str]:
    """Globs on the weights of a model's first and last blocks, for a rule.

        rules=[(gws_compile.edge_blocks(model, first=2, last=8), None), ("*.mlp.*", "nvfp4")]

    The blocks are the numbered children of one class, in ``nn.ModuleList`` or ``nn.Sequential``, that hold most of the
    model's parameters: decoder layers, residual blocks. They are counted through the model, in the order in which it
    holds them; numbers in names stay those that the model gives.

    Args:
        model: wrapped or compiled as it may be.
        first: how many from the front.
        last: how many from the back.

    Returns:
        A glob for each block, such as ``"model.layers.0.*"``.

    Raises:
        ValueError: the model has no such blocks, or fewer; or a number is no int of 0 or more.
    """
    for name, value in (("first", first), ("last", last)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"edge_blocks: {name} must be an int, 0 or more, got {value!r}")
    blocks = _blocks(unwrapped(model))
    if first + last > len(blocks):
        raise ValueError(
            f"edge_blocks: first={first} and last={last} are more than the {len(blocks)} blocks of the model"
            + (f": {blocks[0]} to {blocks[-1]}" if blocks else ", in which no numbered modules of one class are found")
        )
    return [f"{name}.*" for name in [*blocks[:first], *blocks[len(blocks) - last :]]]


def _blocks(model: nn.Module) -> list[str]:
    """The names of the blocks."""
    by_class: dict[type[nn.Module], dict[str, int]] = {}
    for name, module in _numbered(model, ""):
        by_class.setdefault(type(module), {})[name] = sum(p.numel() for p in module.parameters())
    repeated = [found for found in by_class.values() if len(found) > 1 and any(found.values())]
    if not repeated:
        return []
    largest = max(repeated, key=_elements)
    return list(largest)


def _elements(found: dict[str, int]) -> int:
    return sum(found.values())


def _numbered(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are numbered children of a list, with their names, without those of wrappers."""
    children = list(module.named_children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and all(name.isdecimal() for name, _ in children)
    for name, child in children:
        path = prefix if name in WRAPPERS else f"{prefix}.{name}" if prefix else name
        if is_list and len({type(one) for _, one in children}) == 1:
            yield path, child
        else:
            yield from _numbered(child, path)
