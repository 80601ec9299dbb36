"""The recipe that goes on from an adapter, as a plan needs it: with what the catalog knows of that adapter."""

from __future__ import annotations

from loray.bases.config import ModelConfig
from loray.recipes.continued import continued
from loray.spec import TrainSpec


def with_parent(spec: TrainSpec, model: ModelConfig) -> TrainSpec:
    """`spec` with the RoPE of its `init_adapter`, if it has one. Raises NotFoundError, and SpecError as `continued`."""
    if spec.init_adapter is None:
        return spec
    from loray.cli.services import open_services  # the catalog, which other plans do not need

    with open_services() as services:
        ref = services.catalog.resolve(spec.init_adapter)
        parent = services.catalog.version(ref.name, ref.version).manifest
    return continued(spec, parent, ref.label, model)
