"""Nothing that is fetched or stored is executed: no pickle, no torch.load of code, no pickled arrays outside tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infra", "lwd_model", "data_contracts", "flows", "bench")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"}


def modules(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every module that is imported anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module


def unsafe(source: str) -> list[tuple[int, str]]:
    """Line and name of everything in the source that could execute what it reads."""
    tree, found = ast.parse(source), []
    for node, module in modules(tree):
        if module.split(".")[0] in PICKLERS:
            found.append((node.lineno, f"import {module}"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append((node.lineno, called))
        if given.get("allow_pickle", "False") != "False":
            found.append((node.lineno, f"{called}(allow_pickle)"))
        if called.startswith("yaml.") and called.split(".")[1] in UNSAFE_YAML and "Safe" not in given.get("Loader", ""):
            found.append((node.lineno, called))
        if called in ("eval", "exec"):
            found.append((node.lineno, called))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_executes_nothing_that_it_reads(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle as c",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_the_check_finds_what_it_looks_for(line: str) -> None:
    assert unsafe(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "agent.eval()",
        "from infra.pickles import x",
    ],
)
def test_the_check_lets_safe_calls_pass(line: str) -> None:
    assert unsafe(line) == []
