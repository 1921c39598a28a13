"""Names that lead to code: built-in ones and those of installed packages, through one door.

A name stands for "module:attribute", which is imported when it is asked for, never before.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cocosnet.errors import CocosError, ConfigError, MissingDependency

GROUPS = {"metric": "cocosctl.metrics", "extractor": "cocosctl.extractors"}  # of entry points


def doors(group: str, built_in: Mapping[str, str]) -> dict[str, EntryPoint]:
    """Entry points of `group` by name; another package cannot take over a built-in name. Imports nothing.

    Of two packages' with one name that of the package whose name sorts first counts, as it does for commands.
    """
    points = sorted(entry_points(group=group), key=lambda point: (point.dist and point.dist.name) or "", reverse=True)
    found = {point.name: point for point in points}
    return found | {name: EntryPoint(name, target, group) for name, target in built_in.items()}


def open_door(name: str, kind: str, table: Mapping[str, EntryPoint]) -> Any:
    """Import what `name` stands for; `kind` ("edge extractor") is how messages call it.

    Raises:
        ConfigError: no such name.
        MissingDependency: another package's module does not import.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no {kind} is called {name!r}{guess}; it is one of {', '.join(sorted(table))}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where stdout is for data, a package's greeting is none
            return table[name].load()
    except CocosError:
        raise
    except (Exception, SystemExit) as error:  # another package's import may fail in any way
        raise MissingDependency(
            f"{kind} {name!r}: cannot import {table[name].value} ({error}); mend or remove the package that offers it"
        ) from error


def import_package(module: str, user: str, package: str) -> Any:
    """Import a module of another package; `user` ("fid") is what needs it, `package` what it is installed as.

    Raises:
        MissingDependency: it is absent or broken, such as by a torchvision that was made for another PyTorch.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        reason = " ".join(str(error).split())
        raise MissingDependency(
            f"{user} needs {package}, which does not load ({reason}); install it again, and torchvision from the index "
            "that PyTorch came from"
        ) from error
