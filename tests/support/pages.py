"""The documentation's pages: their code blocks, quoted messages, headings and links.

HTML comments directly above a block steer its check, and no reader sees them:

    <!-- not run: reason -->        the block is left out
    <!-- before: code -->           Python that runs first, in the page's namespace
    <!-- shows: expression -->      a text block that is this expression's value

A text block without a comment is what the Python blocks since the last one have printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

_COMMENT = re.compile(r"<!--\s*(not run|before|shows):\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the number of its first line of text, from 1."""

    language: str
    text: str
    line: int
    comments: dict[str, str] = field(default_factory=dict)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, comments, lines, i = [], {}, text.splitlines(), 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            body = "\n".join(lines[i + 1 : end])
            found.append(Block(lines[i].removeprefix("```").strip(), body, i + 2, comments))
            comments, i = {}, end
        elif lines[i].startswith("<!--"):
            end = next(j for j in range(i, len(lines)) if lines[j].endswith("-->"))
            match = _COMMENT.fullmatch("\n".join(lines[i : end + 1]))
            if match:
                comments = {**comments, match[1]: match[2]}
            i = end
        elif lines[i].strip():
            comments = {}
        i += 1
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def quotes(text: str) -> list[str]:
    """The block quotes of a page, each on one line: the messages that it explains."""
    found: list[str] = []
    before = ""
    for line in prose(text).splitlines():
        if line.startswith("> "):
            part = line.removeprefix("> ").strip()
            if before.startswith("> "):
                found[-1] += f" {part}"
            else:
                found.append(part)
        before = line
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if "://" not in target]
