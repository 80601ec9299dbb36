"""The folder of a job of several adapters, and how far it was when its driver died.

many/NAME/TIME/plan.json        its adapters
               shares.json      which of them each worker has
               events.jsonl     what its own log shows
               SHARE/round_…    the last snapshot of a worker's adapters
runs/ADAPTER/TIME/part_of       this folder
                  ended.json    how the training of the adapter has ended, with its checkpoint beside it
                  published.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jobs.runs.folders import PART_OF, RunFolder, Runs
from jobs.runs.history import PUBLISHED
from loray.errors import SpecError
from loray.spec import Frozen, qualified_name

PLAN, _SHARES = "plan.json", "shares.json"


class _Shares(Frozen):
    shares: dict[str, tuple[str, ...]]


def read_shares(folder: RunFolder) -> dict[str, tuple[str, ...]]:
    """Returns the adapters of each share, which stay together: their states are in one snapshot."""
    found = folder.read_model(_Shares, _SHARES)
    return {} if found is None else dict(found.shares)


def write_shares(folder: RunFolder, shares: Mapping[str, Sequence[str]]) -> None:
    folder.write_model(_SHARES, _Shares(shares={share: tuple(names) for share, names in shares.items()}))


def begun(names: Sequence[str], tenant: str, runs: Runs) -> tuple[str, dict[str, str]]:
    """Finds the job that began the last runs of these adapters, to go on with. Returns its folder below `many`, and
    where the run of each is; an adapter that it does not have is missing there. SpecError if there is none, or several.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        at = _last_part(qualified_name(tenant, name), runs)
        if at is not None:
            found.setdefault(at[0], {})[name] = at[1]
    if not found:
        raise SpecError(
            f"no job has trained {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} together, so there is "
            "nothing to go on with; train without --resume"
        )
    if len(found) > 1:
        jobs = "; ".join(f"{', '.join(list(of)[:3])} in {folder}" for folder, of in found.items())
        raise SpecError(f"these adapters were begun by different jobs ({jobs}): go on with each by itself")
    return found.popitem()


def _last_part(name: str, runs: Runs) -> tuple[str, str] | None:
    """Returns (folder of the job, run) of the last run that a job of several adapters began; None for none. Of a run
    alone that came later and was published, the job's is over.
    """
    for run in runs.newest_first(name):
        part_of = run.read(PART_OF)
        if part_of is not None:
            return part_of.decode(), run.path.removeprefix(f"{runs.root}/")
        if run.read(PUBLISHED) is not None:
            return None
    return None
