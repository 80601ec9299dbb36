"""The trackers of a run: which there are, what each is told, and what happens where one does not answer.

A tracker's library is imported only where a recipe names it. What it reaches, and with which key, the library reads
from its own environment variables (MLFLOW_…, WANDB_…), which no recipe and no event shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from jobs.events.schema import Emit, Event
from jobs.events.tensorboard import scalars
from loray.errors import LorayError, SpecError, TrainingError
from loray.spec import TrackerName, TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_MODULES: Mapping[TrackerName, str] = {"mlflow": "jobs.tracking.mlflow", "wandb": "jobs.tracking.wandb"}


class TrackedRun(NamedTuple):
    """What a tracker shows of a run. `at` names it among all runs, so that a resumed run goes on in its tracker too.

    name   of the adapter, with its tenant
    sweep  of which it is a trial
    """

    name: str
    at: str
    recipe: TrainSpec
    sweep: str | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """The recipe, by dotted names."""
        return dict(_flat(self.recipe.model_dump(mode="json"), ""))

    @property
    def tags(self) -> dict[str, str]:
        tags = {"loray.run": self.at, "loray.adapter": self.name, "loray.base": self.recipe.base}
        return tags if self.sweep is None else tags | {"loray.sweep": self.sweep}


class Tracker(Protocol):
    """A run in a tracker. Its methods may raise any error of its library."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def tag(self, tags: Mapping[str, str]) -> None: ...

    def end(self, *, succeeded: bool) -> None: ...


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raises SpecError with what to install where a tracker's library is missing."""
    for name in names:
        if name in _MODULES and find_spec(name) is None:
            raise SpecError(f"tracking: {name} is not installed on this machine: pip install 'loray[{name}]'")


class Trackers:
    """The open trackers of one run. One that fails is left out with a warning: training does not end for it."""

    def __init__(self, opened: Mapping[TrackerName, Tracker], emit: Emit) -> None:
        self._opened, self._emit = dict(opened), emit

    def emit(self, event: Event) -> None:
        """Tells the trackers, and the caller of `tracked`."""
        self.tell(event)
        self._emit(event)

    def tell(self, event: Event) -> None:
        values, step = scalars(event)
        if values:
            self._each(lambda tracker: tracker.log(values, step))
        if event["event"] == "published":
            tags = {"loray.version": event["label"], "loray.digest": event["digest"]}
            self._each(lambda tracker: tracker.tag(tags))

    def end(self, *, succeeded: bool) -> None:
        self._each(lambda tracker: tracker.end(succeeded=succeeded))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in tuple(self._opened.items()):
            try:
                call(tracker)
            except Exception as e:
                log.debug("%s failed", name, exc_info=True)
                log.warning("%s is told nothing more of this run: %s", name, e)
                del self._opened[name]


@contextmanager
def tracked(run: TrackedRun, emit: Emit = lambda event: None) -> Iterator[Trackers]:
    """Opens the trackers that the recipe names. TrainingError where one cannot be reached."""
    trackers = Trackers({name: _opened(name, run) for name in run.recipe.tracking if name in _MODULES}, emit)
    try:
        yield trackers
    except BaseException:
        trackers.end(succeeded=False)
        raise
    trackers.end(succeeded=True)


def _opened(name: TrackerName, run: TrackedRun) -> Tracker:
    opener = import_module(_MODULES[name])
    try:
        opened: Tracker = opener.open_run(run)
    except LorayError:
        raise
    except Exception as e:
        raise TrainingError(f"tracking: {name} cannot be reached, or refuses: {e}") from e
    return opened


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{path}.{name}" if path else name)
    elif value is not None:
        yield path, str(value)
