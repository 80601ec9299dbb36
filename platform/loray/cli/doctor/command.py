"""`loray doctor`: runs all checks and tells what they found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.markup import escape

from loray.cli.doctor import home, kernels, machine, serving, speed, stores
from loray.cli.doctor.facts import Facts
from loray.cli.doctor.finding import Check, Finding, Situation, error
from loray.cli.output import console, emit, json_option
from loray.errors import LorayError, SpecError
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec, read_mapping

CHECKS: Sequence[Check] = (
    Check("python", machine.python, serves=False),
    Check("packages", machine.packages, serves=False),
    Check("server", serving.server, serves=False),
    Check("home", home.writable),
    Check("disk", machine.disk),
    Check("memory", machine.memory),
    Check("shm", machine.shared_memory),
    Check("files", machine.open_files),
    Check("compiler", kernels.compiler),
    Check("kernels", kernels.library),
    Check("base", home.base),
    Check("machine", speed.rates),
    Check("speed", speed.base),
    Check("catalog", stores.catalog),
    Check("store", stores.store),
    Check("clock", stores.clock),
    Check("cluster", home.cluster),
    Check("encryption", serving.encryption),
    Check("port", serving.port),
)
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@click.option(
    "--spec", "spec_file", type=click.Path(path_type=Path), help="The deployment, a YAML file as of `loray up`."
)
@click.option("--base", "base_name", help="The base model that is to be served (default smollm2).")
@click.option("--port", type=int, help="The port that is to be served at (default 8000).")
@click.option("--deep", is_flag=True, help="Hash the whole base model.")
@click.option("--here", is_flag=True, help="Also what serving on this machine needs, where LORAY_URL names a server.")
@json_option
def doctor(
    spec_file: Path | None, base_name: str | None, port: int | None, deep: bool, here: bool, as_json: bool
) -> None:
    """Find what is wrong with this machine and the deployment, and say what mends it.

    Changes nothing, apart from compiling kernels and measuring the machine once. Exits with 1 where there is an error;
    warnings alone are no error.
    """
    settings = Settings.from_env()
    spec, others = _specs(spec_file, base_name, port)
    situation = Situation(settings, spec, Facts.read(settings.home), deep, others, spec_file)
    chosen = [check for check in CHECKS if here or settings.url is None or not check.serves]
    results: list[tuple[str, Finding]] = []
    out = console()
    for name, finding in examined(chosen, situation):
        results.append((name, finding))
        if not as_json:
            style = _STYLES[finding.severity]
            out.print(f"[{style}]{finding.severity:<8}[/] {name:<10} {escape(finding.message)}", soft_wrap=True)
            if finding.mend is not None:
                out.print(f"{'':<19} → [bold]{escape(finding.mend)}[/]", soft_wrap=True)
    errors = sum(finding.severity == "error" for _, finding in results)
    if as_json:
        emit({"ok": not errors, "checks": [{"name": name, **finding._asdict()} for name, finding in results]})
    elif errors:
        click.echo(f"{errors} of {len(results)} checks found an error")
    if errors:
        raise click.exceptions.Exit(1)


def _specs(file: Path | None, base: str | None, port: int | None) -> tuple[ServeSpec, tuple[ServeSpec, ...]]:
    """The base that is examined, and those beside it. SpecError where there are several and `base` is none of them."""
    fields = {} if file is None else read_mapping(file)
    given = {name: value for name, value in (("base", base), ("port", port)) if value is not None}
    fleet = FleetSpec.parse(fields, source=str(file))
    if len(fleet.bases) == 1:
        chosen = fleet.bases[0].model_dump(exclude_unset=True) | given
        return ServeSpec.parse(chosen, source="the command line"), ()
    for spec in fleet.bases:
        if spec.base == base:
            others = tuple(other for other in fleet.bases if other is not spec)
            return spec if port is None else spec.model_copy(update={"port": port}), others
    names = ", ".join(fleet.names)
    raise SpecError(f"{file} has several bases ({names}); say which one to examine, as in --base {fleet.names[0]}")


def examined(checks: Sequence[Check], situation: Situation) -> Iterator[tuple[str, Finding]]:
    """Each check's finding as it comes. A check that fails itself is an error too, and the others go on."""
    for check in checks:
        try:
            yield check.name, check.run(situation)
        except (LorayError, OSError) as e:
            yield check.name, error(str(e), "LORAY_LOG_LEVEL=DEBUG loray doctor")
