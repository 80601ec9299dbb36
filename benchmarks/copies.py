"""Many small adapters in little time: copies of a few templates, which differ in one value each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from tests.fixtures.publisher import write_adapter


def publish_copies(
    folder: Path, base: BaseModel, settings: Settings, configs: Sequence[Any], count: int, prefix: str = "a"
) -> list[str]:
    """Publishes `count` adapters of PEFT's `configs` in turn, with strong random weights. Returns their names, which
    are `prefix` and a number.
    """
    from tests.fixtures.peft_adapters import make_adapter

    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    for number, config in enumerate(configs):
        make_adapter(base, folder / f"template-{number}", config, seed=number, std=0.3)
    names = []
    for number in range(count):
        copy = folder / "copies" / f"{prefix}{number}"
        write_adapter(folder / f"template-{number % len(configs)}", copy, number + 1)
        names.append(publish(copy, base, Destination(copy.name, store, catalog)).name)
    return names
