"""Print docs/cli.md: the help of every built-in command, as `cocosctl ... --help` shows it at 100 columns.

make docs
"""

from __future__ import annotations

import os
import subprocess
import sys

from cocosctl.registry import COMMANDS, load_command


def commands() -> list[str]:
    """The root (""), then every built-in command in the order of its help, groups by their commands."""
    groups = {command.name: getattr(load_command(command), "commands", {"": None}) for command in COMMANDS}
    return ["", *(f"{name} {part}".rstrip() for name, parts in groups.items() for part in parts)]


def help_text(command: str) -> str:
    """The help of one command ("" is the root), from a process of its own."""
    arguments = [sys.executable, "-m", "cocosctl", *command.split(), "--help"]
    environment = os.environ | {"COLUMNS": "102"}
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.rstrip()


def page() -> str:
    """The whole page as Markdown."""
    parts = ["# Commands\n\nMade by `make docs` from the commands themselves; a test compares.\n"]
    parts += [f"## cocosctl {command}".rstrip() + f"\n\n```text\n{help_text(command)}\n```\n" for command in commands()]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
