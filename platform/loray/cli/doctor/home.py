"""Checks of LORAY_HOME: whether it can be written to, its base, and what died in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from loray.bases.checkpoint import check_tensors
from loray.bases.registry import get_base, verify_base
from loray.cli.doctor.facts import existing
from loray.cli.doctor.finding import Finding, Situation, error, ok
from loray.errors import BaseNotFound, LorayError
from loray.local.cluster import current_cluster, dead_cluster
from loray.local.processes import session_members


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to the folder, or made where it does not exist yet; None where it can."""
    nearest = existing(folder)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as e:
        return e.strerror or str(e)


def writable(s: Situation) -> Finding:
    home = s.settings.home
    reason = unwritable(home)
    if reason is None:
        return ok(f"LORAY_HOME={home} can be written to")
    return error(
        f"LORAY_HOME={home} cannot be written to: {reason}",
        "export LORAY_HOME=FOLDER  (one that is yours, as ~/.loray)",
    )


def base(s: Situation) -> Finding:
    """Reads the weights' headers; hashes all bytes with `deep`."""
    name, mend = s.spec.base, f"loray base add {s.spec.base}"
    try:
        found = get_base(s.settings.home, name)
    except BaseNotFound:
        return error(f"the base model {name} is not on this machine", mend)
    except (LorayError, OSError) as e:
        return error(f"the base model {name} is damaged: {e}", _again(s))
    source = found.source.removeprefix("hf:")
    try:
        if s.deep:
            verify_base(found)
        else:
            check_tensors(found.path, found.config)
    except (LorayError, OSError, ValueError) as e:
        return error(f"the base model {name} is damaged: {e}", f"loray base add {source} --name {name}")
    return ok(f"base model {name}{', every byte' if s.deep else ''}")


def _again(s: Situation) -> str:
    return f"rm -r {s.settings.home / 'bases' / s.spec.base} && loray base add {s.spec.base}"


def cluster(s: Situation) -> Finding:
    home = s.settings.home
    if s.settings.address is not None:
        return ok(f"LORAY_ADDRESS={s.settings.address} names a cluster")
    if (running := current_cluster(home)) is not None:
        return ok(f"Ray runs at {running.address} as process {running.pid}")
    dead = dead_cluster(home)
    if dead is None:
        return ok("no Ray cluster runs")
    left = len(session_members(dead.pid)) if dead.is_of_this_boot else 0
    also = f", and {left} of its processes go on" if left else ""
    return error(f"the Ray cluster of an earlier `loray up` (process {dead.pid}) has died{also}", "loray down")
