"""`preread`: one name in front of every command, which is imported when it is called: a help text never loads torch."""

import errno
import importlib
import io
import os
import sys
from typing import Any, cast

import click

from preread_cli.config_file import masked, with_config
from preread_cli.failures import CommandFailed
from preread_cli.flags import option

# Section -> command -> its module in preread_cli.commands and its help, in the order a newcomer meets them.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Passages, once": {
        "index": ("index", "Read passages from files and store their states."),
        "encode-worker": ("serve", "Keep an encoder running for other machines to send passages to."),
    },
    "Queries, many times": {
        "serve": ("serve", "Start the reranking server."),
        "warm": ("warm", "Fill a server's KV and prefix caches for some passages."),
        "rerank": ("rerank", "Rank passages for a query, or for a file of queries."),
        "tune": ("evaluate", "Choose stored ratio, codec and read ratio by measuring them."),
        "evaluate": ("evaluate", "Measure how well a checkpoint reranks a judged collection."),
    },
    "Looking after it": {
        "stats": ("collection", "Show what the store holds."),
        "verify": ("collection", "Read a whole collection back and report damage."),
        "collection": ("collection", "Manage collections: aliases, names, single passages, upkeep, removal."),
        "checkpoint": ("checkpoint", "Describe a checkpoint, or make a random one."),
        "check": ("evaluate", "Check whether a model's scores are the right ones."),
        "convert-ctxl": ("checkpoint", "Convert a ctxl reranker to a classifier."),
        "doctor": ("doctor", "Check whether this machine, checkpoint and store can serve."),
        "health": ("doctor", "Ask a server, of either kind, whether it is ready."),
    },
}
_MODULES = {name: module for section in COMMANDS.values() for name, (module, _) in section.items()}


class _LazyGroup(click.Group):
    """Imports a command when it is called, gives it --config, and turns every error into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"preread_cli.commands.{_MODULES[cmd_name]}")
        return with_config(cast(click.Command, getattr(module, cmd_name.replace("-", "_"))))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as exc:
            # Click quotes what it did not expect: a store URL whose flag was forgotten.
            exc.message = masked(exc.message)  # type: ignore[misc]  # final in its stubs
            raise
        except (Exception, KeyboardInterrupt) as exc:
            has_no_reader = isinstance(exc, OSError) and exc.errno == errno.EPIPE  # of our output: click ends quietly
            if has_no_reader or isinstance(exc, click.exceptions.Exit | click.Abort):
                raise
            raise CommandFailed.of(exc, debug=bool(ctx.params.get("debug"))) from exc


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="preread", prog_name="preread")
@option("--debug", is_flag=True, help="Show where an error came from, and every setting of a server at its start.")
def cli(debug: bool) -> None:
    """Rerank with a model that has read your passages before the query comes.

    \b
    In two steps:
      preread index passages.jsonl --collection docs-1 --alias docs     once, slow
      preread serve                                                     then this answers

    \b
    and, while it runs, in another terminal:
      preread rerank "why is the sky blue" --collection docs

    A second collection, docs-2, takes the alias over when the first is to be replaced.

    Every option can also be set in the environment: --store is PREREAD_STORE. Or in a file, which every
    command takes with --config, or by PREREAD_CONFIG: store = "...", for one command below its name: [serve].
    `preread COMMAND --help` explains one command.
    """


def main() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # begun without it: the next socket would take its number, and get what is printed
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # an odd locale must not end a command
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="preread")
