"""The pages: every command that they show can be typed, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_tools import ROOT

from cocosctl.registry import ALIASES, COMMANDS, load_command
from cocosnet.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "datasets").glob("**/*.md"))]


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
    """The words after `cocosctl` in indented lines and in code within sentences, of commands and not of prose."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    code = [line for line in lines if line.startswith("    ")]
    code += [span for line in lines if not line.startswith("    ") for span in re.findall(r"`([^`]+)`", line)]
    parts = [part for piece in code for part in re.split(r"[|;]|&&", piece.split(" # ")[0])]
    found = [match[1].strip("\"' ") for part in parts if (match := re.match(r"\s*(?:\S+ )*?cocosctl +(.+)", part))]
    return [words for words in map(shlex.split, found) if ALIASES.get(words[0], words[0]) in names()]


def names() -> set[str]:
    return {command.name for command in COMMANDS}


def find(words: list[str]) -> tuple:
    """The command that these words call, and its arguments."""
    name = ALIASES.get(words[0], words[0])
    command, rest = load_command(next(row for row in COMMANDS if row.name == name)), words[1:]
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest
