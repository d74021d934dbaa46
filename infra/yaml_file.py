"""Reads a YAML file that a person wrote. A key that stands twice is an error: YAML drops the first without a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from infra.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain values only; a mapping's keys are unique, and dates stay the text that was written.

    Numbers are what YAML 1.1 and 1.2 agree on, and `1e-3`. What one of them reads as a number of another base (`010`,
    `1:30`) stays text.
    """


_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path, what: str, missing: str) -> Any:
    """The document of a YAML file; None if it is empty.

    Args:
        path: the file.
        what: what it is, for messages: `gate`, `contract`.
        missing: what to do where there is no such file.

    Raises:
        ConfigError: missing, not UTF-8, not YAML, more than one document, or a key stands twice in one mapping; names
            file and line.
    """
    return parse_yaml(path, read_text(path, what, missing), what)


def read_text(path: Path, what: str, missing: str) -> str:
    """The text of a file; raises ConfigError where there is none, or none that is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path} not found", missing) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{what} {path} cannot be read ({error})", f"restore the {what}'s file, as UTF-8") from error


def parse_yaml(path: Path, text: str, what: str) -> Any:
    """As `read_yaml`, of a text that was read from `path`."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_unique_keys(loader, node, path, what)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise ConfigError(f"{what} {where} is not YAML: {problem}", "fix the file at the line named") from error


def _require_unique_keys(loader: yaml.SafeLoader, root: yaml.Node, path: Path, what: str) -> None:
    """Raise for two keys of one mapping that are equal once read: `1` and `0x1` too."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen:  # an alias: the same node stands in several places
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for key, value in node.value:
                stack.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line, merge = key.start_mark.line + 1, key.tag == "tag:yaml.org,2002:merge"
                name = "<<" if merge else loader.construct_object(key)
                if name in lines:
                    raise ConfigError(
                        f"{what} {path}:{line}: the key {key.value!r} stands twice, first in line {lines[name]}",
                        "keep one of the two; for more entries, add them to the list of the first",
                    )
                lines[name] = line
