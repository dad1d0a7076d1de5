"""The pages of the documentation, and the commands and blocks of code on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

REASON = "requirements-docs.txt is not installed"
markdown_it = pytest.importorskip("markdown_it", reason=REASON)
ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md"]
PAGES = sorted(
    [
        *(ROOT / name for name in OUTSIDE),
        *ROOT.glob("csrc/**/*.md"),
        *ROOT.glob("tests/**/*.md"),
        *ROOT.glob("docs/**/*.md"),
    ]
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tokens(page: Path) -> list:
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The first line, the language and the text of every fenced block of code."""
    for token in tokens(page):
        if token.type == "fence":
            yield token.map[0] + 1, token.info.strip(), token.content


OURS = re.compile(r"(\w+=\S+ )*(bash|make|pip|python|torchrun) ")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of a page: the page and line of each, and its words.

    Commands stand in fenced blocks of sh or console, in indented blocks, and in `code` in a line.
    """
    for token in tokens(page):
        fence = token.type == "fence" and token.info.strip() in ("sh", "console")
        if token.type == "inline":
            lines = [child.content for child in token.children if child.type == "code_inline"]
        elif fence or token.type == "code_block":
            lines = token.content.replace("\\\n", " ").splitlines()
        else:
            continue
        if any(line.startswith("$ ") for line in lines):  # the other lines are the output
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        command = ""
        for line in lines:
            command += line
            if not fence and not OURS.match(command):
                command = ""
                continue  # this line need not be a command
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # a quotation continues on the next line
                command += "\n"
                continue
            command = ""
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield f"{name(page)}:{token.map[0] + 1}", words
        assert not command, f"{name(page)}:{token.map[0] + 1}: a quotation has no end"
