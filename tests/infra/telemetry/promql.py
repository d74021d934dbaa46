"""Just enough of PromQL to find the metrics and labels that an expression names; for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

_WORD = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_TOKEN = re.compile(rf'"(?:\\.|[^"\\])*"|\d[\w.]*|{_WORD}|\$\w+|!=|=~|!~|==|>=|<=|\S')
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_MATCHING = {"=", "!=", "=~", "!~"}
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "Inf", "NaN"}


@dataclass
class Named:
    """What an expression names: labels of each selected metric, and labels that results are grouped by."""

    metrics: dict[str, set[str]] = field(default_factory=dict)
    grouping: set[str] = field(default_factory=set)


def named(expression: str) -> Named:
    """Parse `expression`; ValueError if its brackets do not match."""
    tokens = _TOKEN.findall(re.sub(r"#.*", "", expression))
    found, place = Named(), 0
    while place < len(tokens):
        token = tokens[place]
        after = tokens[place + 1] if place + 1 < len(tokens) else ""
        if token in _GROUPING and after == "(":
            end = _end(tokens, place + 1, "(", ")")
            found.grouping |= {word for word in tokens[place + 2 : end] if word != ","}
            place = end
        elif token == "[":
            place = _end(tokens, place, "[", "]")
        elif re.fullmatch(_WORD, token) and token not in _KEYWORDS and after not in {"(", *_GROUPING}:
            # Not a function: that is followed by its bracket, directly or after its grouping.
            labels = found.metrics.setdefault(token, set())
            if after == "{":
                end = _end(tokens, place + 1, "{", "}")
                labels |= {word for word, operator in pairwise(tokens[place + 2 : end]) if operator in _MATCHING}
                place = end
        place += 1
    return found


def _end(tokens: list[str], start: int, opening: str, closing: str) -> int:
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] == opening) - (tokens[place] == closing)
        if depth == 0:
            return place
    raise ValueError(f"{opening} is not closed in {' '.join(tokens)}")
