"""Every error that loray raises on purpose.

    LorayError
    ├── SpecError              a recipe or serve spec is wrong (also a ValueError)
    ├── SettingsError          a LORAY_* environment variable is wrong (also a ValueError)
    ├── DataError              a data file is missing, empty or not in a known format
    ├── NotFoundError
    │   ├── BaseNotFound       no such base model on this machine
    │   ├── AdapterNotFound    no such adapter, version or alias in the catalog
    │   ├── AdapterGone        an ephemeral adapter, whose bytes no cache and no trainer has any more
    │   ├── KeyNotFound        no such API key or tenant in the catalog
    │   ├── UserFileNotFound   no such file of `/v1/files`, or of another tenant
    │   ├── BatchNotFound      no such batch of `/v1/batches`, or of another tenant
    │   ├── ResponseNotFound   no such answer of the Responses API, of which none is stored
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
    │   ├── GrammarTooExpensive  the masks of its constraint take too long
    │   ├── ModelNotSupported    the model does not do what the route is for
    │   ├── ThreadsUnsupported   it asks that its conversation is stored here
    │   ├── UnknownParameter     it has a field that no one knows, most likely a typing error
    │   └── UnsupportedParameter it has a field that is known, changes the answer, and is not supported
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

Every message says what was wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from reprlib import Repr

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 120


class LorayError(Exception):
    """Base of all errors raised on purpose by loray.

    status         of the answer over HTTP
    code, param    of OpenAI's error object; `param` is the field at fault
    retry_after_s  when the caller may try again, where that is known
    """

    status: int = 500
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # the message; further arguments are of the error itself


class SpecError(LorayError, ValueError):
    status = 422


class SettingsError(LorayError, ValueError):
    status = 409


class DataError(LorayError):
    status = 422


class NotFoundError(LorayError):
    status = 404
    code = "model_not_found"
    param = "model"


class BaseNotFound(NotFoundError):
    pass


class AdapterNotFound(NotFoundError):
    pass


class AdapterGone(NotFoundError):
    """Nobody has the bytes of an ephemeral adapter any more, or nobody gives them now: publish it again."""

    code = "adapter_gone"


class ResponseNotFound(NotFoundError):
    code = "response_not_found"
    param = "id"


class JobNotFound(NotFoundError):
    code = "job_not_found"
    param = "id"


class LogsGone(JobNotFound):
    """The job is known, but Ray no longer has its log."""

    status = 410


class KeyNotFound(NotFoundError):
    pass


class UserFileNotFound(NotFoundError):
    code = "file_not_found"
    param = "id"


class BatchNotFound(NotFoundError):
    code = "batch_not_found"
    param = "id"


class Unauthenticated(LorayError):
    status = 401
    code = "invalid_api_key"


class KeyRevoked(Unauthenticated):
    code = "key_revoked"


class PermissionDenied(LorayError):
    status = 403
    code = "permission_denied"


class LimitExceeded(PermissionDenied):
    pass


class ConflictError(LorayError):
    status = 409


class RevisionConflict(ConflictError):
    status = 412


class GateRefused(ConflictError):
    pass


class CatalogFull(LorayError):
    status = 507


class CatalogError(LorayError):
    status = 503
    code = "catalog_unavailable"
    retry_after_s = 1.0


class StoreError(LorayError):
    status = 503
    code = "store_unavailable"
    retry_after_s = 5.0

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class ClusterError(LorayError):
    status = 503


class IntegrityError(LorayError):
    code = "adapter_damaged"
    param = "model"


class UnsupportedError(LorayError):
    status = 501
    code = "adapter_unsupported"
    param = "model"


class BaseMismatch(LorayError):
    status = 404
    code = "base_mismatch"
    param = "model"


class RequestError(LorayError, ValueError):
    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # every argument in `args`: these errors cross process boundaries
        self.param = param


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class ModelNotSupported(RequestError):
    code = "model_not_supported"


class ThreadsUnsupported(RequestError):
    code = "thread_unsupported_request"  # Anthropic's clients know it, and send the whole conversation then


class GrammarTooExpensive(RequestError):
    code = "grammar_too_expensive"


class UnknownParameter(RequestError):
    code = "unknown_parameter"


class UnsupportedParameter(RequestError):
    code = "unsupported_parameter"


class DeadlineExceeded(LorayError):
    status = 504
    code = "deadline_exceeded"


class _RetryLater(LorayError):
    """An error that says when to try again, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class Overloaded(_RetryLater):
    status = 429
    code = "overloaded"


class RateLimited(LorayError):
    """`headers`: what OpenAI's headers say of the limits."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float = 1.0, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, retry_after_s, headers)
        self.retry_after_s: float = retry_after_s
        self.headers: Mapping[str, str] = headers or {}


class EvaluationError(LorayError):
    pass


class EngineError(LorayError):
    status = 503
    code = "engine_unavailable"
    retry_after_s = 1.0


class RankLost(EngineError):
    """A rank of the engine has ended, and the engine with it: its requests may go on at another engine."""


class EngineStopped(EngineError):
    """A step has failed, and the engine has ended. `adapters`: digests of those that were in the step."""

    def __init__(self, message: str, adapters: Collection[str] = ()) -> None:
        super().__init__(message, tuple(adapters))
        self.adapters = tuple(adapters)


class BaseStarting(_RetryLater, EngineError):
    """The base had no replica, and the one that was started is not ready yet."""

    code = "base_starting"
    param = "model"


class ReplicaUnavailable(EngineError):
    """The request never reached an engine: it may be sent to another replica. `replica` is the one that failed."""

    def __init__(self, message: str, replica: str | None = None) -> None:
        super().__init__(message, replica)
        self.replica = replica


class ReplicaLost(ReplicaUnavailable):
    pass


class ReplicaLeaving(ReplicaUnavailable):
    pass


class AdapterQuarantined(_RetryLater):
    status = 503
    code = "adapter_quarantined"
    param = "model"


class TrainingError(LorayError):
    pass


def shown(value: object) -> str:
    """`repr` of what a caller sent, cut to a length that fits into a message."""
    return _SHOWN.repr(value)
