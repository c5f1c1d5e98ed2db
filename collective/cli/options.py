"""Options in sections, as --help lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["Problem", "SectionedCommand", "SectionedOption", "option"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Problem(click.ClickException):
    """Nothing was started: one paragraph says why, and what to do."""

    exit_code = 2
    command = "collective run"

    def show(self, file: Any = None) -> None:
        click.echo(f"{click.style(f'{self.command}:', fg='red', bold=True)} {self.message}", file=file, err=True)


class SectionedOption(click.Option):
    """An option with the title of its section."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """Its --help has the sections in the order in which their first options were declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = parameter.section if isinstance(parameter, SectionedOption) else "Help"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def option(section: str, *names: str, **attributes: Any) -> Callable[[Function], Function]:
    """click.option, in a section."""
    return click.option(*names, cls=SectionedOption, section=section, **attributes)
