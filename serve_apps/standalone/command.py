"""The command `loray serve`. Importing this module imports neither torch nor FastAPI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from loray.bases.registry import get_base
from loray.errors import LorayError, SpecError
from loray.local.processes import bind
from loray.local.s3 import move_to_local_s3, start_home_store
from loray.local.serving import ServingAddress, announced
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from loray.telemetry import configure_logging
from serve_apps.command import welcome
from serve_apps.deployment import DRAIN_S
from serve_apps.options import cannot_listen, check_keys, read_spec, reserve_names, spec_options

_HINTS = (("loray status", "what runs, and which adapters are in memory"), ("Ctrl-C", "stop it"))

_REPLICAS: Mapping[str, Callable[[ServeSpec], bool]] = {
    "autoscaling": lambda spec: spec.autoscaling is not None,
    "num_replicas": lambda spec: spec.num_replicas > 1,
    "num_gateways": lambda spec: spec.num_gateways > 1,
}


@click.command()
@click.argument("model", required=False)
@spec_options
def serve(model: str | None, spec_file: Path | None, s3: bool, **options: Any) -> None:
    """Serve the base MODEL (default smollm2) and all adapters published for it, in this process and without Ray.

    Ctrl-C ends it. For replicas, autoscaling and more than one machine there is `loray up`.
    """
    began = time.monotonic()
    settings = Settings.from_env()
    configure_logging(settings.log_level)
    if model is not None and options["base"] not in (None, model):
        raise SpecError(f"MODEL is {model} and --base is {options['base']}; give one of them")
    spec = one_engine(read_spec(spec_file, options | ({} if model is None else {"base": model})))
    check_keys(spec.host, settings)
    base = get_base(settings.home, spec.base)
    reserve_names([base], settings)
    screen = Console(stderr=True)
    with ExitStack() as held:
        try:
            listener = held.enter_context(bind(spec.host, spec.port))
        except OSError as e:
            raise cannot_listen(spec.host, spec.port, e, "loray serve") from e
        with screen.status("starting the store"):
            settings = move_to_local_s3(settings) if s3 else start_home_store(settings)
        spinner = screen.status("loading the base and the engine")
        spinner.start()
        held.callback(spinner.stop)
        url = ServingAddress(spec.host, spec.port).url

        def started() -> None:
            spinner.stop()
            held.enter_context(announced(settings.home, url))
            seconds = time.monotonic() - began
            # In a thread, because it asks this server for its models.
            threading.Thread(target=_welcome, args=(url, spec, seconds), daemon=True).start()

        def stopping(num_requests: int) -> None:
            if num_requests:
                waits = f"requests under way: {num_requests}; waiting up to {DRAIN_S:.0f} s, again Ctrl-C ends them"
                screen.print(waits, highlight=False)

        from serve_apps.standalone.server import run  # late: it imports FastAPI

        run(spec, base, settings, listener, started=started, stopping=stopping)
    screen.print("stopped serving", highlight=False)


def one_engine(fleet: FleetSpec) -> ServeSpec:
    """Return the spec of the one base. Raises SpecError for what needs several engines, and so Ray."""
    spec, *others = fleet.bases
    if others:
        raise SpecError(
            f"`loray serve` runs one engine and so one base: of {', '.join(fleet.names)} give one, or use `loray up`"
        )
    wanted = [name for name, is_set in _REPLICAS.items() if is_set(spec)]
    if wanted:
        raise SpecError(f"`loray serve` runs one engine: leave out {' and '.join(wanted)}, or use `loray up`")
    return spec


def _welcome(url: str, spec: ServeSpec, seconds: float) -> None:
    try:
        welcome(url, FleetSpec.of(spec), f"ready after {seconds:.1f} s", _HINTS)
    except LorayError as e:  # it serves nevertheless
        Console().print(f"serving {spec.base} at {url}/v1, ready after {seconds:.1f} s ({e})", highlight=False)
