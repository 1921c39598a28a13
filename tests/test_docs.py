"""The pages: every command that they show can be typed, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from cli_tools import ROOT

from cocosctl.app import app
from cocosnet.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "datasets").glob("**/*.md"))]
ROOT_COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("https:", "http:")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """As GitHub names them in a link."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shown_commands_have_options_and_keys_that_exist(page):
    for words in shown_commands(page.read_text()):
        command, arguments = find(words)
        found, _, _ = command.make_parser(command.context_class(command)).parse_args(list(arguments))
        for key in (setting.partition("=")[0] for setting in found.get("overrides") or []):
            value = load_config("demo")
            for part in key.split("."):
                value = getattr(value, part)


def test_the_pages_show_commands():
    """What the test above reads is not nothing."""
    assert sum(len(shown_commands(page.read_text())) for page in PAGES) > 60


def shown_commands(text: str) -> list[list[str]]:
    """The words after `cocosctl` in blocks of code and in code within sentences, of commands and not of prose."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    code = [line for block in fenced for line in block.splitlines()]
    code += [line for line in prose if line.startswith("    ")]
    code += [span for line in prose if not line.startswith("    ") for span in re.findall(r"`([^`]+)`", line)]
    parts = [part for piece in code for part in re.split(r"[|;]|&&", piece.split(" # ")[0])]
    found = [match[1].strip("\"' ") for part in parts if (match := re.match(r"\s*(?:\S+ )*?cocosctl +(.+)", part))]
    return [words for words in map(shlex.split, found) if ROOT_COMMAND.get_command(None, words[0])]


def find(words: list[str]) -> tuple:
    """The command that these words call, and its arguments."""
    command = ROOT_COMMAND
    while hasattr(command, "commands") and words and (child := command.get_command(None, words[0])):
        command, words = child, words[1:]
    return command, words
