"""The command itself, and its sub-commands: `run`, and a line for each tool."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import click

from .. import __version__
from .run import run
from .top import top

__all__ = ["main"]


@dataclass(frozen=True)
class Tool:
    """A module with a function main(arguments), which has options of its own."""

    name: str
    module: str
    help: str


TOOLS = (
    Tool("doctor", "collective.doctor.cli", "Check a set-up, and say what is wrong and what to do."),
    Tool("info", "collective.info", "Show versions, MPI, ranks, memory and devices."),
    Tool("bench", "collective.bench.cli", "Measure collectives and steps beside MPI and gloo."),
    Tool("predict", "collective.predict.cli", "Predict how a training scales to more nodes."),
    Tool("trace", "collective.trace.cli", "Merge the parts of a trace that ranks have left."),
    Tool("cuda-aware", "collective.cuda_aware", "Try whether this MPI can send device memory."),
    Tool("ucx", "collective.ucx", "Print the environment for a UCX with CUDA, for eval."),
)


class ToolCommand(click.Command):
    """Hands everything that follows its name, --help too, to the tool."""

    def __init__(self, tool: Tool) -> None:
        super().__init__(tool.name, help=tool.help, add_help_option=False)
        self.tool = tool

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []

    def invoke(self, ctx: click.Context) -> None:
        module = importlib.import_module(self.tool.module)
        ctx.exit(module.main(ctx.args) or 0)


class Group(click.Group):
    """Lists what has to do with jobs apart from the tools."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        tools = {tool.name for tool in TOOLS}
        for title, names in (
            ("Start and watch jobs", [name for name in self.list_commands(ctx) if name not in tools]),
            ("Tools (collective TOOL --help lists a tool's own options)", [tool.name for tool in TOOLS]),
        ):
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(80)) for name in names])


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Completion, for bash (or zsh, fish): eval "$(_COLLECTIVE_COMPLETE=bash_source collective)"',
)
@click.version_option(__version__, "-v", "--version", message="%(prog)s %(version)s")
def group() -> None:
    """Data-parallel training over MPI."""


group.add_command(run)
group.add_command(top)
for _tool in TOOLS:
    group.add_command(ToolCommand(_tool))


def main() -> None:
    """Run the command of this process, and end it."""
    group.main(prog_name="collective")
