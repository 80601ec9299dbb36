"""Ray Serve's request router, which knows which replica holds which adapter.

Serve says which replicas there are and how many requests they have (`QueueLengths`); which adapters they hold, they
report to this process (`serve_apps.channel`); which prompts it has sent and got no token for, the process knows itself
(`UnansweredPrompts`). Serve creates one router per handle, in the handle's process (the gateway's), and calls it on an
event loop of its own.

The adapter is read from the request. Serve's `multiplexed_model_id` has side effects: without MultiplexMixin, Serve
keeps every such request for ever; with it, requests wait for a replica that announces the model.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from threading import Lock
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from loray.policy.routing import (
    REASONS,
    Candidate,
    Known,
    Reason,
    ReplicaView,
    Routing,
    RoutingPolicy,
    RoutingReport,
    RoutingReports,
    routing_key,
)
from loray.spec import GenerateRequest
from loray.telemetry import get_logger

# By import path, for RequestRouterConfig. Serve pickles a class by value if the named module defines it, which would
# give every router its own copy of the state below, and by reference if the module imports it.
ROUTER_CLASS = "serve_apps.app.AdapterRouter"
_NOTHING = RoutingReport("", -1)  # of a replica that has not reported yet
_SUSPECT_S = 10.0  # longer than Serve needs to replace a replica whose engine has stopped
_ALIVE_S = 10.0  # since its last report, in which a replica is not asked whether it answers: as long as Serve's cache
_UNDER_WAY_S = 1.0  # after which a request that was sent is not waited for: it was cancelled, or its replica is silent
_FORGOTTEN_S = 300.0  # after which a prompt does not count: its call was cancelled at a moment at which nobody said so
_MAX_PLACED = 1 << 14

_log = get_logger(__name__)


class QueueLengths:
    """Counts the requests of each replica. Replicas by name, requests by any key; `clock` returns seconds.

    Serve says the length of a replica's queue with each request that the replica accepts. That is as of the acceptance:
    what was sent meanwhile is not in it. And a request that has got its replica is sent a turn of the event loop later.
    Both are counted here, so that requests that come at once do not all find the same replica idle.

    The length known of a replica contains its requests under way: sent, and neither accepted nor refused.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._known: dict[str, int] = {}
        self._chosen: dict[Hashable, str] = {}  # by request: not sent yet
        self._num_chosen: Counter[str] = Counter()
        self._sent: dict[str, OrderedDict[Hashable, float]] = {}  # by replica: not accepted yet

    def of(self, replica: str) -> int:
        return self.known(replica) + self._num_chosen[replica]

    def known(self, replica: str) -> int:
        """The length without those that are not sent yet."""
        return self._known.get(replica, 0)

    def chosen(self, request: Hashable, replica: str) -> None:
        """The request will be sent there, unless it is cancelled before: `leaves` or `withdrawn` follows."""
        self._chosen[request] = replica
        self._num_chosen[replica] += 1

    def leaves(self, request: Hashable) -> None:
        """The request is sent now: `sent` follows for its replica."""
        replica = self.withdrawn(request)
        if replica is not None:
            self._sent.setdefault(replica, OrderedDict())[request] = self.now()

    def withdrawn(self, request: Hashable) -> str | None:
        """The request will not be sent. Returns the replica that was chosen for it."""
        replica = self._chosen.pop(request, None)
        if replica is not None:
            self._num_chosen[replica] -= 1
        return replica

    def sent(self, replica: str) -> None:
        self._known[replica] = self.known(replica) + 1

    def heard(self, replica: str, length: int) -> None:
        """Take the length that comes with the answer to a request, of which `accepted` or `refused` follows."""
        self._known[replica] = length + self._num_sent(replica)

    def accepted(self, request: Hashable, replica: str) -> None:
        """The length that the replica said contains the request."""
        self._answered(request, replica)

    def refused(self, request: Hashable) -> None:
        """The request is on no replica, and will be sent again. Nothing happens if it was not sent."""
        for replica in self._sent:
            self._answered(request, replica)

    def probed(self, replica: str, length: int) -> None:
        """Take the length that a probe has found. Requests under way may be in it, and then count twice at first."""
        self._known[replica] = length + self._num_sent(replica)

    def ended(self, replica: str) -> None:
        self._known[replica] = max(0, self.known(replica) - 1)

    def retain(self, replicas: Collection[str]) -> None:
        """Forget what was sent to all others."""
        for numbers in (self._known, self._sent):
            for replica in [name for name in numbers if name not in replicas]:
                del numbers[replica]

    def _answered(self, request: Hashable, replica: str) -> None:
        under_way = self._sent.get(replica)
        if under_way is not None and under_way.pop(request, None) is not None:
            self.ended(replica)

    def _num_sent(self, replica: str) -> int:
        under_way = self._sent.get(replica, OrderedDict())
        while under_way and next(iter(under_way.values())) < self.now() - _UNDER_WAY_S:
            under_way.popitem(last=False)
        return len(under_way)


class _Sent(NamedTuple):
    replica: str
    num_tokens: int
    at: float


class UnansweredPrompts:
    """Counts the tokens of prompts that wait for a first token, by replica.

    Routers and the gateway use it, in threads of their own. `clock` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._sent: dict[str, _Sent] = {}  # by request, the oldest first
        self._tokens: Counter[str] = Counter()  # by replica; none is zero

    def of(self, replica: str) -> int:
        """The tokens sent to the replica."""
        return self._tokens.get(replica, 0)

    def sent(self, request_id: str, replica: str, num_tokens: int) -> None:
        now = self._clock()
        with self._lock:
            self._drop(request_id)
            while self._sent and (oldest := next(iter(self._sent.items())))[1].at <= now - _FORGOTTEN_S:
                self._drop(oldest[0])
            self._sent[request_id] = _Sent(replica, num_tokens, now)
            self._tokens[replica] += num_tokens

    def answered(self, request_id: str) -> None:
        """The request's first token has come, or it has ended. Nothing happens if it was not sent."""
        with self._lock:
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._tokens[sent.replica] -= sent.num_tokens
            if not self._tokens[sent.replica]:
                del self._tokens[sent.replica]


# What this process knows. Its routers and its gateway share it.
_decisions: dict[str, dict[Reason, int]] = {}  # by deployment: there is one for each base
_placed: dict[str, str] = {}  # request → the replica that has accepted it
_replicas: dict[str, frozenset[str]] = {}  # by deployment
_suspects: dict[str, float] = {}  # replica → end of suspicion; used by the routers' event loop and the gateway's

_unanswered = UnansweredPrompts()
reports = RoutingReports()  # the gateway's listener writes them, in the gateway's event loop


def decisions(deployment: str) -> dict[str, int]:
    """Count the requests routed to a deployment by this process, by reason (`loray.policy.routing.Reason`)."""
    return {str(reason): n for reason, n in _decisions.get(deployment, dict.fromkeys(REASONS, 0)).items()}


def replicas(deployment: str) -> frozenset[str]:
    """Return the names of a deployment's replicas, as Serve has given them last."""
    return _replicas.get(deployment, frozenset())


def is_held(deployment: str, besides: str, digest: str) -> bool:
    """Tell whether another replica of the deployment than `besides` has reported that it has the adapter."""
    key = routing_key(digest)
    known = (reports.of(name) for name in replicas(deployment) if name != besides)
    return any(key in k.report.in_pool or key in k.report.on_host for k in known if k is not None)


def suspect(replica: str) -> None:
    """Make routers avoid a replica that does not answer or whose engine has stopped, until Serve has replaced it."""
    now = time.monotonic()
    for name in [n for n, until in list(_suspects.items()) if until < now]:
        _suspects.pop(name, None)
    _suspects[replica] = now + _SUSPECT_S


def replica_of(request_id: str) -> str | None:
    """Name the replica that has accepted the request, until `forget`."""
    return _placed.get(request_id)


def answered(request_id: str) -> None:
    """The request's first token has come."""
    _unanswered.answered(request_id)


def forget(request_id: str) -> None:
    """The request has ended."""
    _unanswered.answered(request_id)
    _placed.pop(request_id, None)


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Returns every candidate as a group of its own: within a group, Serve chooses the replica with the shortest queue.

    It overrides private methods of Serve's router where Serve has no public hook; each says why.
    """

    def initialize_state(self, **policy: Any) -> None:
        """`policy`: RoutingPolicy's fields."""
        self._routing = Routing(RoutingPolicy(**policy))
        self._seen: dict[str, RoutingReport] = {}  # the last report of each replica
        self._lengths = QueueLengths()
        self._probing: asyncio.Task[Any] | None = None
        self._deployment = str(self._deployment_id.name)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve calls it again, with pauses, until a replica accepts the request."""
        self._probe_silent(candidate_replicas)
        now = time.monotonic()
        request = _request(pending_request)
        replicas = {_name(r): r for r in candidate_replicas}
        views = [self._view(r, now) for r in candidate_replicas]
        self._remind([replicas[v.id] for v in views if not v.suspect and v.age_s <= _ALIVE_S])
        ranked = self._routing.rank(
            views,
            _adapter(request),
            now=now,
            tie="" if request is None else request.request_id,
        )
        if pending_request is not None:
            pending_request.ranked = ranked
            pending_request.routing_context.should_backoff = True  # every replica has been offered
        return [[replicas[c.replica]] for c in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called when a replica has accepted the request, right after `on_new_queue_len_info` of its answer."""
        self._lengths.accepted(id(pending_request), str(replica_id.unique_id))
        request = _request(pending_request)
        if request is None:
            return
        if len(_placed) < _MAX_PLACED:
            _placed[request.request_id] = str(replica_id.unique_id)
        ranked: Sequence[Candidate] = getattr(pending_request, "ranked", ())
        chosen = next((c for c in ranked if c.replica == replica_id.unique_id), None)
        if chosen is not None:
            self._routing.sent(chosen, _adapter(request), now=time.monotonic())
            _decisions.setdefault(self._deployment, dict.fromkeys(REASONS, 0))[chosen.reason] += 1
            _log.debug("request %s to replica %s: %s", request.request_id, chosen.replica, chosen.reason)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called whenever a replica is added or removed."""
        _replicas[self._deployment] = names = frozenset(map(_name, replicas))
        self._routing.retain(names)
        self._seen = {name: report for name, report in self._seen.items() if name in names}
        self._lengths.retain(names)
        super().update_replicas(replicas)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        suspect(replica_id.unique_id)
        super().on_replica_actor_unavailable(replica_id)

    # Serve forgets a queue's length after ten seconds without a request, although requests may run for longer, and then
    # counts from zero. So the lengths are also kept here, from every value that Serve receives, see `QueueLengths`.

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        self._lengths.heard(replica_id.unique_id, num_ongoing_requests)
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Private in Serve, which has no public hook between the choice of a replica and the sending."""
        pending = self._get_pending_request_matching_internal_request_id(request_metadata)
        if pending is not None:
            self._lengths.chosen(id(pending), _name(replica))
            if (request := _request(pending)) is not None:
                num_tokens = len(request.prompt_ids) + len(request.output_ids)
                _unanswered.sent(request.request_id, _name(replica), num_tokens)
        super()._fulfill_next_pending_request(replica, request_metadata)

    async def _choose_replica_for_request(self, pending_request: PendingRequest, **options: Any) -> RunningReplica:
        """Private in Serve, which sends the request as soon as this returns."""
        request = id(pending_request)
        self._lengths.refused(request)  # Serve tries those again that a replica has refused
        _not_sent(pending_request)
        try:
            replica: RunningReplica = await super()._choose_replica_for_request(pending_request, **options)
        except BaseException:  # it is cancelled, maybe after a replica was chosen
            self._lengths.withdrawn(request)
            _not_sent(pending_request)
            raise
        self._lengths.leaves(request)
        return replica

    def on_send_request(self, replica_id: ReplicaID) -> None:
        self._lengths.sent(replica_id.unique_id)
        super().on_send_request(replica_id)

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        self._lengths.ended(replica_id.unique_id)
        super().decrement_queue_len_cache(replica_id)

    async def _probe_queue_lens(
        self, replicas: list[RunningReplica], backoff_index: int
    ) -> list[tuple[RunningReplica, int | None]]:
        """Private in Serve, which has no public hook for the results of its probes."""
        answers: list[tuple[RunningReplica, int | None]] = await super()._probe_queue_lens(replicas, backoff_index)
        for replica, length in answers:
            if length is not None:
                self._lengths.probed(_name(replica), length)
        return answers

    def _probe_silent(self, replicas: Sequence[RunningReplica]) -> None:
        """Ask busy replicas for the length of their queues if Serve has not received it for a while.

        A request that is cancelled, or whose replica cannot be reached, before it is accepted counts as sent and never
        as ended. The replica then seems to be busy, and gets no request whose response would correct the number.
        """
        silent = [r for r in replicas if self._lengths.known(_name(r)) and not self._is_known(r)]
        if silent and (self._probing is None or self._probing.done()):
            self._probing = asyncio.get_running_loop().create_task(self._probe_queue_lens(silent, 0))

    def _remind(self, replicas: Sequence[RunningReplica]) -> None:
        """Tell Serve the lengths that it has forgotten. Otherwise it asks the replica chosen for a request, and all
        requests that come meanwhile are ranked before the first of them counts: they would all get this replica.
        """
        for replica in replicas:
            if not self._is_known(replica):
                self.replica_queue_len_cache.update(replica.replica_id, self._lengths.known(_name(replica)))

    def _is_known(self, replica: RunningReplica) -> bool:
        return self.replica_queue_len_cache.get(replica.replica_id) is not None

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        """Find the request with these metadata, for whose adapter a replica was chosen.

        Private in Serve, which matches by an id that all calls of one HTTP request share (`n`, several prompts): it
        would find only the first of them, and the others would wait for ever.
        """
        for pending in self._pending_requests_to_fulfill:  # private: Serve's queue of these requests
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _view(self, replica: RunningReplica, now: float) -> ReplicaView:
        name = _name(replica)
        report, at = reports.of(name) or Known(_NOTHING, now)
        if self._seen.get(name, _NOTHING) is not report:
            self._seen[name] = report
            self._routing.reported(name, report.in_pool | report.on_host)
        return ReplicaView(
            id=name,
            load=self._lengths.of(name),
            limit=replica.max_ongoing_requests,
            in_pool=report.in_pool,
            on_host=report.on_host,
            age_s=now - at,
            suspect=_suspects.get(name, now) > now,
            unanswered=_unanswered.of(name),
        )


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _request(pending: PendingRequest | None) -> GenerateRequest | None:
    """The request of a call of `generate`; None for other calls."""
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, GenerateRequest) else None


def _not_sent(pending: PendingRequest) -> None:
    if (request := _request(pending)) is not None:
        _unanswered.answered(request.request_id)


def _adapter(request: GenerateRequest | None) -> str | None:
    return None if request is None or request.adapter is None else routing_key(request.adapter.digest)
