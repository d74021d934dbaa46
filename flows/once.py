"""Command lines on which an option stands twice are refused: the parser would keep the last and say nothing."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """A command whose options are each given once, unless they are made to be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises typer's UsageError naming the option."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for place, option in enumerate(order):
            if option in order[:place] and not getattr(option, "multiple", False):
                ctx.fail(f"Option {option.opts[0]!r} is given twice.")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A `typer.Typer` of such commands."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        """As `typer.Typer.command`."""
        return super().command(name, **{"cls": OnceCommand} | options)
