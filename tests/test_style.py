"""House rules that a machine can check, over the syntax trees of both packages."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "cocosnet").rglob("*.py"))
COMMANDS = sorted((ROOT / "cocosctl").rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST = 80  # lines of a function


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def functions(paths: list[Path]):
    return [(path, node) for path in paths for node in ast.walk(tree(path)) if isinstance(node, FUNCTION)]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def test_functions_are_short():
    lengths = {f"{name(path)}:{node.name}": length(node) for path, node in functions(LIBRARY + COMMANDS)}
    assert {where: lines for where, lines in lengths.items() if lines > LONGEST} == {}
    assert statistics.median(lengths.values()) <= 12
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 40


@pytest.mark.parametrize("path", LIBRARY + COMMANDS, ids=name)
def test_public_things_have_docstrings(path):
    missing = [] if ast.get_docstring(tree(path)) else ["the module"]

    def visit(scope: ast.Module | ast.ClassDef) -> None:
        for node in scope.body:
            if isinstance(node, (ast.ClassDef, *FUNCTION)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    missing.append(f"{node.lineno}: {node.name}")
                if isinstance(node, ast.ClassDef):
                    visit(node)

    visit(tree(path))
    assert missing == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_never_prints_nor_exits(path):
    """A `print` to a file that is named (`file=stream`) is writing, not printing."""
    faults = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print" and not any(keyword.arg == "file" for keyword in node.keywords):
                faults.append(f"{node.lineno}: print")
            if called in ("exit", "quit", "sys.exit", "os._exit"):
                faults.append(f"{node.lineno}: {called}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.argv", "sys.stdout"):
            faults.append(f"{node.lineno}: {ast.unparse(node)}")
    assert faults == []


@pytest.mark.parametrize("path", LIBRARY + COMMANDS, ids=name)
def test_no_assert_and_no_unsafe_loading(path):
    faults = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assert):
            faults.append(f"{node.lineno}: assert")
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("strict", "weights_only")
            and ast.unparse(node.value) == "False"
        ):
            if node.arg == "weights_only" or not _is_another_strict(path, node):
                faults.append(f"{node.value.lineno}: {node.arg}=False")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"{node.lineno}: bare except")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "pickle" in ast.unparse(node):
            faults.append(f"{node.lineno}: pickle")
    assert faults == []


def _is_another_strict(path: Path, keyword: ast.keyword) -> bool:
    """Whether it is that of `zip` or of `torch.export.export` (how it traces), not that of `load_state_dict`."""
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func) in ("zip", "torch.export.export")
        and any(k.value.lineno == keyword.value.lineno for k in call.keywords)
        for call in calls
    )


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_the_command_line_imports_torch_only_where_it_runs(path):
    heavy = ("torch", "torchvision", "numpy", "PIL", "scipy", "click")
    top = [node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in top if isinstance(node, ast.ImportFrom) and node.module]
    assert [module for module in found if module.partition(".")[0] in heavy] == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_does_not_know_the_command_line(path):
    imports = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = [ast.unparse(node) for node in imports]
    assert [text for text in named if "cocosctl" in text or "typer" in text] == []


def test_dataset_cards_are_no_package():
    """`datasets` would shadow Hugging Face's library of that name."""
    assert not list((ROOT / "datasets").rglob("*.py"))
