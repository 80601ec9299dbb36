"""A publisher as a process of its own, which the test kills: `python -m tests.serve_apps.kills.publisher OPTIONS`.

It pushes its share as a user would: who is told that the server does not answer gives the same command again. What has
been acknowledged it notes in a file, and leaves out when it is started again.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from loray.cli.main import cli
from loray.client import CatalogClient
from loray.errors import CatalogError, ClusterError, StoreError
from loray.schemas.resources import VersionDetail
from tests.fixtures.publisher import write_adapter

T = TypeVar("T")

NUM_NAMES = 20
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Options:
    """Publication `number` of `count` is of the publisher number % step == first."""

    first: int
    step: int
    count: int
    url: str
    base: str
    template: str
    acknowledged: str  # a file


class Acknowledged(NamedTuple):
    number: int
    name: str
    version: int
    digest: str


def read_acknowledged(path: Path) -> list[Acknowledged]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Acknowledged(*json.loads(line)) for line in lines if line.endswith("\n")]


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    note = os.open(options.acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    done = {each.number for each in read_acknowledged(Path(options.acknowledged))}
    again(lambda: _abandon(options))
    for number in range(options.first, options.count, options.step):
        if number in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            write_adapter(Path(options.template), folder, number)
            version = _push(folder, f"a{number % NUM_NAMES}", options.base)
        acknowledged = Acknowledged(number, version.name, version.version, version.digest)
        os.write(note, json.dumps(acknowledged).encode() + b"\n")


def again(call: Callable[[], T]) -> T:
    while True:
        try:
            return call()
        except (CatalogError, ClusterError, StoreError) as e:
            print(f"again after: {e}", file=sys.stderr, flush=True)


def _push(folder: Path, name: str, base: str) -> VersionDetail:
    command = ["adapters", "push", str(folder), "--name", name, "--base", base, "--alias", "prod", "--json"]

    def push() -> VersionDetail:
        with redirect_stdout(io.StringIO()) as printed:
            cli.main(command, standalone_mode=False)
        return VersionDetail.model_validate_json(printed.getvalue())

    return again(push)


def _abandon(options: Options) -> None:
    """Begins an upload that nobody ends."""
    with CatalogClient(options.url, retry_s=60) as client:
        upload = client.begin_upload(f"abandoned by {options.first}")
        client.put_file(upload.id, Path(options.template) / CONFIG)


def arguments(options: Options) -> list[str]:
    return [sys.executable, "-m", __name__, json.dumps(asdict(options))]


if __name__ == "__main__":
    main()
