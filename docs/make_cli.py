"""Print docs/cli.md: the help of every built-in command, as `cocosctl ... --help` shows it at 100 columns.

make docs
"""

from __future__ import annotations

import os
import subprocess
import sys

COMMANDS = (
    "",
    "prepare",
    "train",
    "translate",
    "warp-visualize",
    "eval",
    "bench matching",
    "bench ablation",
    "export",
    "weights list",
    "config list",
    "config show",
    "config validate",
    "config diff",
    "doctor",
    "plugins list",
)


def help_text(command: str) -> str:
    """The help of one command ("" is the root), from a process of its own."""
    arguments = [sys.executable, "-m", "cocosctl", *command.split(), "--help"]
    environment = os.environ | {"COLUMNS": "102"}
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.rstrip()


def page() -> str:
    """The whole page as Markdown."""
    parts = ["# Commands\n\nMade by `make docs` from the commands themselves; a test compares.\n"]
    parts += [f"## cocosctl {command}".rstrip() + f"\n\n```text\n{help_text(command)}\n```\n" for command in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
