"""Named points at which a test kills the process, to prove that a crash there loses and doubles nothing.

`LWD_CRASHPOINT=name` kills this process by SIGKILL the first time that it passes `crashpoint("name")`;
`LWD_CRASHPOINT=name:3` the third time. Without the variable a crash point costs one dictionary look-up.
"""

from __future__ import annotations

import ast
import os
import signal
from collections import Counter
from pathlib import Path

from infra.errors import ConfigError

VARIABLE = "LWD_CRASHPOINT"
_passed: Counter[str] = Counter()


def crashpoint(name: str) -> None:
    """Die here by SIGKILL if the environment names this point; `name` must be a string literal, unique in `infra`."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    target, _, count = wanted.partition(":")
    if target != name:
        return
    _passed[name] += 1
    if _passed[name] >= int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def registered(under: str = "") -> dict[str, str]:
    """Every crash point in the source of `infra`: name -> `path:line` relative to `infra`.

    Read from the source and not collected at run time, so that a point in a module that no test imports is found too.

    Args:
        under: keep the points of files whose path below `infra` begins with this.

    Raises:
        ConfigError: a name is used twice or is no string literal.
    """
    root = Path(__file__).parent
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if relative == "crashpoints.py":
            continue
        source = path.read_text(encoding="utf-8")
        if "crashpoint(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "crashpoint"):
                continue
            where = f"{relative}:{node.lineno}"
            argument = node.args[0] if node.args else None
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise ConfigError(f"crash point at {where} is not named by a literal", "write crashpoint('name')")
            if argument.value in found:
                raise ConfigError(
                    f"crash point {argument.value!r} is at {found[argument.value]} and at {where}", "rename one"
                )
            found[argument.value] = where
    return {name: where for name, where in found.items() if where.startswith(under)}
