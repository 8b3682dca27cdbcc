"""The tables of docs/torch.md with what is private to torch; run as a program, it writes them there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gws_compile.torch_internals.private_names import PRIVATE_ATTRIBUTES, PRIVATE_NAMES, PrivateName

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"
BEGIN, END = "<!-- private names: python tests/support/private_tables.py -->\n", "<!-- end of private names -->\n"


def private_tables() -> str:
    """Both tables, in Markdown."""
    return "\n".join([_table("name", PRIVATE_NAMES), _table("attribute", PRIVATE_ATTRIBUTES)])


def _table(head: str, names: Mapping[str, PrivateName]) -> str:
    rows = [f"| `{name}` | {use.feature} | {use.public} |" for name, use in names.items()]
    return "\n".join([f"| {head} | lost without it | public |", "| --- | --- | --- |", *rows, ""])


def main() -> None:
    """Write the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + private_tables() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
