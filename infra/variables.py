"""The product's variables: names that begin with `LWD_`, in the environment or in the folder's `.env`.

Others share both places: a variable without the prefix is never looked at. One with the prefix that the product does
not know is refused, since a typo would otherwise be a setting that silently does not hold. Values are not part of
messages: any of them may be a secret.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterable
from pathlib import Path

from dotenv.main import resolve_variables
from dotenv.parser import parse_stream

from infra.errors import ConfigError

PREFIX = "LWD_"
DOTENV = Path(".env")
OTHERS = {
    "LWD_CONTRACTS": "a folder of edited contracts",
    "LWD_SERVERS_DIR": "programs and data of `lwd servers`",
    "LWD_CRASHPOINT": "where a test kills a process",
    "LWD_COMMAND_ID": "the command that started this process (infra.lifeline)",
}
"""Variables that are no settings of a deployment."""


def variable(name: str) -> str | None:
    """A variable's value: of the environment, or else of `.env`; None if it is unset or empty."""
    return os.environ.get(name) or dotenv_variables().get(name) or None


def dotenv_variables() -> dict[str, str]:
    """The product's variables in `.env`, by upper-case name; a comment, or a line of somebody else, is passed over.

    Raises:
        ConfigError: a line begins with the prefix and is no assignment, or gives a variable for a second time.
    """
    try:
        text = DOTENV.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{DOTENV.resolve()} cannot be read ({error.strerror})", "make it readable") from error
    lines, names = [], set[str]()
    for binding in parse_stream(io.StringIO(text)):
        if binding.key is not None:
            lines.append((binding.key, binding.value))
        written = binding.original.string.strip().removeprefix("export ").lstrip()
        if not written.upper().startswith(PREFIX):
            continue
        where = f"{DOTENV}, line {binding.original.line}"
        if binding.error or binding.key is None or binding.value is None:
            raise ConfigError(f"{where}: no assignment of a variable", f"write it as {PREFIX}NAME=value")
        if binding.key.upper() in names:
            raise ConfigError(f"{where}: {binding.key.upper()} is given a second time", "keep one of the two")
        names.add(binding.key.upper())
    values = resolve_variables(lines, override=False)  # `${HOME}` in a value
    return {name.upper(): value for name, value in values.items() if name.upper() in names and value is not None}


def require_known(settings: Iterable[str]) -> None:
    """Refuse a variable with the prefix that names neither a setting nor one of `OTHERS`.

    Args:
        settings: names of the settings, lower-case, without the prefix.

    Raises:
        ConfigError: naming the variable, where it stands and the nearest one that exists.
    """
    known = {PREFIX + name.upper() for name in settings} | OTHERS.keys()
    for place, names in (("the environment", os.environ), (str(DOTENV), dotenv_variables())):
        for name in names:
            if name.upper().startswith(PREFIX) and name.upper() not in known:
                near = difflib.get_close_matches(name.upper(), known, 1, 0)[0]
                raise ConfigError(
                    f"{place} has {name}, which is no variable of LWD",
                    f"did you mean {near}? else unset it; docs/operations.md lists them all",
                )
