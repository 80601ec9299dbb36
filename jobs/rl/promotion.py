"""Publishes the version of a run that it samples with now, while it goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from loray.bases.registry import ensure_base
from loray.catalog import AdapterVersion, Catalog, Job
from loray.errors import AdapterGone, ClusterError, LorayError
from loray.publishing import Destination, import_folder
from loray.settings import Settings
from loray.spec import ACTOR_NAMESPACE, trainer_actor
from loray.store import AdapterStore, open_store

_GIVEN_S = 60.0


def publish_rollout(job: Job, digest: str, settings: Settings, catalog: Catalog) -> AdapterVersion:
    """Publish a version that the trainer of the job's base has, under the adapter's name and with its digest, without
    an alias. Raises AdapterGone where the trainer has let go of it, and ClusterError where there is none.
    """
    files = given_files(job.recipe.base, digest)
    base = ensure_base(settings.home, job.recipe.base)
    with tempfile.TemporaryDirectory(prefix="loray-rollout-") as temporary:
        for name, data in files.items():
            (Path(temporary) / name).write_bytes(data)
        to = Destination(job.name, AdapterStore(open_store(settings.store)), catalog)
        return import_folder(Path(temporary), base, to)


def given_files(base: str, digest: str) -> Mapping[str, bytes]:
    """Ask the trainer of a base for the files of a version."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not ray.is_initialized():
        raise ClusterError("this server has no cluster, in which the version's trainer could be; `loray up` has one")
    try:
        trainer = ray.get_actor(trainer_actor(base), namespace=ACTOR_NAMESPACE)
        files: Mapping[str, bytes] = ray.get(trainer.give.remote(digest), timeout=_GIVEN_S)
        return files
    except ValueError as e:
        raise AdapterGone(f"the trainer of {base} has ended, and its versions with it") from e
    except RayTaskError as e:
        raise e.cause if isinstance(e.cause, LorayError) else ClusterError(str(e.cause)) from None
    except RayError as e:
        raise ClusterError(f"the trainer of {base} does not answer: {e}") from e
