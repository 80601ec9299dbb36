"""What a tenant's job may name as data, and how much it may take: for jobs that come through the API.

An administrator, and everybody where no key is needed, may name any data that the cluster reaches.
"""

from __future__ import annotations

from typing import NamedTuple

from loray.errors import PermissionDenied
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.spec import Principal, TrainSpec


class JobLimits(NamedTuple):
    """Of a tenant, at once; None: none."""

    jobs: int | None
    workers: int | None


def limits_of(principal: Principal, settings: Settings) -> JobLimits:
    """The smaller ones of key and tenant; where neither says anything, the deployment's, which do not bind its
    administrators.
    """
    given = (principal.limits, principal.tenant_limits)
    jobs = [limits.max_jobs for limits in given if limits.max_jobs is not None]
    workers = [limits.max_workers for limits in given if limits.max_workers is not None]
    default = JobLimits(None, None) if principal.is_admin else JobLimits(settings.max_jobs, settings.max_workers)
    return JobLimits(min(jobs, default=default.jobs), min(workers, default=default.workers))


def check_allowed(spec: TrainSpec, principal: Principal, settings: Settings) -> None:
    """Raises PermissionDenied for more workers, or other data, than the caller may have.

    A tenant names its own data: s3:// URLs without options below `LORAY_DATA/TENANT`. The driver opens them with the
    options of LORAY_DATA (`jobs.driver.data`), which are in no recipe, and with the cluster's credentials.
    """
    if principal.is_admin:
        return
    limit = limits_of(principal, settings).workers
    if limit is not None and spec.num_workers > limit:
        raise PermissionDenied(f"num_workers is {spec.num_workers}, and at most {limit} are allowed")
    for source in spec.data.paths:
        _check_source(source, principal.tenant, settings)


def _check_source(source: str, tenant: str, settings: Settings) -> None:
    if settings.data is None:
        raise PermissionDenied(
            f"data {source!r}: this deployment has no place for tenants' data; its operator sets LORAY_DATA to one, as "
            "s3://bucket/prefix"
        )
    place = parse_location(settings.data)
    assert isinstance(place, S3Location)  # Settings has checked it
    prefix = "/".join(part for part in (place.prefix, tenant) if part)
    folder = f"s3://{place.bucket}/{prefix}/"
    path = source.removeprefix(folder).removesuffix("/")
    is_plain = not any(char in source for char in "?#@%\\") and source.isprintable()
    if not source.startswith(folder) or not is_plain or {"", ".", ".."} & set(path.split("/")):
        raise PermissionDenied(f"data {source!r} must be an s3:// URL without options below {folder}")
