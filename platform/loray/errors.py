"""Every error that loray raises on purpose.

    LorayError
    ├── SpecError              a recipe or serve spec is wrong (also a ValueError)
    ├── SettingsError          a LORAY_* environment variable is wrong (also a ValueError)
    ├── DataError              a data file is missing, empty or not in a known format
    ├── NotFoundError
    │   ├── BaseNotFound       no such base model on this machine
    │   ├── AdapterNotFound    no such adapter, version or alias in the catalog
    │   ├── KeyNotFound        no such API key or tenant in the catalog
    │   └── JobNotFound        no such training job in the catalog or in Ray
    │       └── LogsGone       the job is known, but Ray no longer has its log
    ├── Unauthenticated        no API key, or none that is valid
    │   └── KeyRevoked         the key was revoked or blocked while its request was answered
    ├── PermissionDenied       the key is valid, but may not do this
    │   └── LimitExceeded      it may, but not more than it has already
    ├── ConflictError          the name, version or alias is taken, or another writer has changed it
    │   ├── RevisionConflict   an alias has another revision than the caller expected
    │   └── GateRefused        the evaluations of a LongLoRA adapter do not pass the gate before an alias
    ├── CatalogFull            gateways could not hold more names in memory; nobody publishes until that is changed
    ├── CatalogError           the catalog's database cannot be reached or stays locked
    ├── StoreError             the adapter store cannot be reached or refuses a request
    ├── ClusterError           the local Ray cluster does not start
    ├── IntegrityError         bytes differ from their digest, or a published folder is incomplete
    ├── UnsupportedError       an architecture, adapter type or option that loray does not implement
    ├── BaseMismatch           the adapter was trained on another base (fingerprints differ)
    ├── RequestError           a generation request that can never be served
    │   ├── ContextLengthExceeded
    │   └── GrammarTooExpensive  the masks of its constraint take too long
    ├── DeadlineExceeded       the request took longer than it or the deployment allows
    ├── Overloaded             the server takes no more such requests now; retry after `retry_after_s` seconds
    ├── RateLimited            a key or a tenant has used up a limit; retry after `retry_after_s` seconds
    ├── EvaluationError        a measured value is not finite
    ├── EngineError            the engine stopped, or a request inside it failed
    │   ├── RankLost           a rank of it has ended, and the engine with it
    │   ├── EngineStopped      a step has failed, and the engine has ended; `adapters` were in that step
    │   ├── BaseStarting       no replica ran, and the one that is being started is not ready; retry after a while
    │   └── ReplicaUnavailable the request never reached an engine: it may be sent to another replica
    │       ├── ReplicaLost    the process that had the request died, or its connection broke
    │       └── ReplicaLeaving the replica was removed, and has had its time for the request
    ├── AdapterQuarantined     a replica died while it loaded this adapter, which is refused for `retry_after_s` seconds
    └── TrainingError          a run ended without a usable adapter (for example, too many non-finite steps)

Every message says what was wrong and what to do. `serve_apps` maps errors to HTTP status codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from reprlib import Repr

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 120


class LorayError(Exception):
    """Base of all errors raised on purpose by loray."""


class SpecError(LorayError, ValueError):
    pass


class SettingsError(LorayError, ValueError):
    pass


class DataError(LorayError):
    pass


class NotFoundError(LorayError):
    pass


class BaseNotFound(NotFoundError):
    pass


class AdapterNotFound(NotFoundError):
    pass


class JobNotFound(NotFoundError):
    pass


class LogsGone(JobNotFound):
    """The job is known, but Ray no longer has its log."""


class KeyNotFound(NotFoundError):
    pass


class Unauthenticated(LorayError):
    pass


class KeyRevoked(Unauthenticated):
    pass


class PermissionDenied(LorayError):
    pass


class LimitExceeded(PermissionDenied):
    pass


class ConflictError(LorayError):
    pass


class RevisionConflict(ConflictError):
    pass


class GateRefused(ConflictError):
    pass


class CatalogFull(LorayError):
    pass


class CatalogError(LorayError):
    pass


class StoreError(LorayError):
    """`retry_after_s`: when the caller may try again, where that is known."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class ClusterError(LorayError):
    pass


class IntegrityError(LorayError):
    pass


class UnsupportedError(LorayError):
    pass


class BaseMismatch(LorayError):
    pass


class RequestError(LorayError, ValueError):
    """`param` names the request field at fault, as OpenAI's error objects do."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # every argument in `args`: these errors cross process boundaries
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


class ContextLengthExceeded(RequestError):
    pass


class GrammarTooExpensive(RequestError):
    pass


class DeadlineExceeded(LorayError):
    pass


class _RetryLater(Exception):
    """An error that says when to try again, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Overloaded(_RetryLater, LorayError):
    pass


class RateLimited(LorayError):
    """`headers`: what OpenAI's headers say of the limits."""

    def __init__(self, message: str, retry_after_s: float = 1.0, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, retry_after_s, headers)
        self.retry_after_s: float = retry_after_s
        self.headers: Mapping[str, str] = headers or {}

    def __str__(self) -> str:
        return str(self.args[0])


class EvaluationError(LorayError):
    pass


class EngineError(LorayError):
    pass


class RankLost(EngineError):
    """A rank of the engine has ended, and the engine with it: its requests may go on at another engine."""


class EngineStopped(EngineError):
    """A step has failed, and the engine has ended. `adapters`: digests of those that were in the step."""

    def __init__(self, message: str, adapters: Collection[str] = ()) -> None:
        super().__init__(message, tuple(adapters))
        self.adapters = tuple(adapters)

    def __str__(self) -> str:
        return str(self.args[0])


class BaseStarting(_RetryLater, EngineError):
    """The base had no replica, and the one that was started is not ready yet."""


class ReplicaUnavailable(EngineError):
    """The request never reached an engine: it may be sent to another replica. `replica` is the one that failed."""

    def __init__(self, message: str, replica: str | None = None) -> None:
        super().__init__(message, replica)
        self.replica = replica

    def __str__(self) -> str:
        return str(self.args[0])


class ReplicaLost(ReplicaUnavailable):
    pass


class ReplicaLeaving(ReplicaUnavailable):
    pass


class AdapterQuarantined(_RetryLater, LorayError):
    pass


class TrainingError(LorayError):
    pass


def shown(value: object) -> str:
    """`repr` of what a caller sent, cut to a length that fits into a message."""
    return _SHOWN.repr(value)
