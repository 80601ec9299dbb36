"""Checks of what holds adapters and names: the catalog, the store, and the store's clock."""

from __future__ import annotations

import os
import tempfile
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from pathlib import Path

from loray.cli.doctor.finding import Finding, Situation, error, ok, warning
from loray.cli.doctor.home import unwritable
from loray.errors import IntegrityError, LorayError
from loray.local.home import describe_store, has_local_s3
from loray.local.s3 import current_local_s3
from loray.locations import FileLocation, S3Location, parse_location
from loray.settings import LOCAL_S3_FOLDER

_TIMEOUT_S = 5.0
_SKEW_S, _MOST_SKEW_S = 30.0, 300.0  # S3 refuses what is signed more than 15 minutes before or after


def catalog(s: Situation) -> Finding:
    from loray.catalog.database import HEAD, revision_of, shown_url

    url = s.settings.catalog
    try:
        revision = revision_of(url)
    except IntegrityError as e:
        return error(str(e), "loray catalog restore FILE  (a backup, into a catalog with another name)")
    except (LorayError, OSError) as e:
        mend = "start the database, or set LORAY_CATALOG to where it is"
        return error(str(e), "unset LORAY_CATALOG  (to use SQLite in LORAY_HOME)" if url[:6] == "sqlite" else mend)
    if revision is None:
        return ok("the catalog is empty; its tables are made at first use")
    if revision == HEAD:
        return ok(f"catalog {shown_url(url)} answers")
    if revision.isdigit() and revision < HEAD:
        return warning(
            f"the catalog has the tables of an earlier loray (revision {revision}, this one has {HEAD}); servers of "
            "that version end when it is migrated",
            "loray catalog backup FILE && loray adapters ls  (the first command migrates it)",
        )
    return error(
        f"the catalog was migrated by a later loray (revision {revision}, this one knows {HEAD})",
        "pip install --upgrade loray",
    )


def store(s: Situation) -> Finding:
    location = parse_location(s.settings.store)
    if isinstance(location, FileLocation):
        reason = unwritable(location.folder)
        if reason is None:
            return ok(f"store {location.url} can be written to")
        return error(f"store {location.url} cannot be written to: {reason}", f"chown -R $USER {location.folder}")
    if _is_down(s):
        return ok(f"store {describe_store(s.settings)}")
    from loray.store.s3 import S3Store

    try:
        S3Store(location, quick=True).check()
    except (LorayError, OSError) as e:
        return error(f"store {location.url}: {e}", "set LORAY_STORE (s3://bucket?endpoint_url=…) and the keys of AWS_…")
    return ok(f"store {location.url} can be written to")


def clock(s: Situation) -> Finding:
    location = parse_location(s.settings.store)
    ahead = None
    if isinstance(location, FileLocation):
        ahead = _ahead_of_folder(location.folder)
    elif not _is_down(s):
        ahead = _ahead_of_server(location)
    return skew(ahead)


def skew(ahead: float | None) -> Finding:
    """`ahead`: seconds by which this machine's clock is ahead of the store's; None where it could not be asked."""
    if ahead is None:
        return ok("the store's clock could not be compared")
    told = f"this machine's clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    mend = "sudo timedatectl set-ntp true"
    if abs(ahead) >= _MOST_SKEW_S:
        return error(f"{told}: S3 refuses requests, and garbage is judged by its age", mend)
    return warning(told, mend) if abs(ahead) >= _SKEW_S else ok("the clocks of this machine and of the store agree")


def _is_down(s: Situation) -> bool:
    """Whether the store is this home's own server, which `loray up` starts, and does not run."""
    return has_local_s3(s.settings) and current_local_s3(s.settings.home / LOCAL_S3_FOLDER) is None


def _ahead_of_folder(folder: Path) -> float | None:
    """By the times that the file system, which may be another machine's, writes."""
    if not folder.is_dir():
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            return time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _ahead_of_server(location: S3Location) -> float | None:
    """By the header Date, which answers have also where they refuse."""
    from loray.store.aws import endpoint_of, region_of

    url = endpoint_of(location) or f"https://s3.{region_of(location) or 'us-east-1'}.amazonaws.com"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            date = response.headers.get("Date")
    except urllib.error.HTTPError as e:
        date = e.headers.get("Date")
    except (OSError, ValueError):
        return None
    return time.time() - parsedate_to_datetime(date).timestamp() if date else None
