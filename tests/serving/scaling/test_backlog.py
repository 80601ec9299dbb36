"""A queue as a load: work that the running replicas leave until another one has started."""

from __future__ import annotations

from loray.policy.autoscaling import Decision, ScalingState, decide
from loray.spec import AutoscalingSpec
from tests.serving.scaling.made import observation

SPEC = AutoscalingSpec(max_replicas=8, target_utilization=0.8, window_s=60, startup_s=20, drain_s=10, wait_slo_s=None)
AT_ONCE = SPEC.model_copy(update={"upscale_delay_s": 0.0, "downscale_delay_s": 0.0})
NOW = 10_000.0


def test_a_queue_counts_with_what_the_running_replicas_leave_of_it() -> None:
    """Two replicas with a demand of one can do 20 s of work in the 20 s of a start, beside the demand."""

    def decided(backlog: float) -> Decision:
        seen = [observation(tokens=60 * 500.0, capacity=1000.0, backlog=backlog * 500.0) for _ in range(2)]
        return decide(seen, SPEC, ScalingState(), target=2, now=NOW)

    assert decided(20).target == 2
    assert "backlog" not in decided(20).reason
    decision = decided(45)  # 25 s are left: 2.5 replicas for 10 s, beside the demand; without a delay
    assert decision[:2] == (4, "backlog")
    assert decision.reason.startswith(
        "backlog of 45000 tokens needs 4 replicas (25 s of one replica's work are left when another has started, to be "
        "done in 10 s); tokens need 2 replicas (1000 of 1000 tokens/s each); working set"
    )
    assert decided(1000).reason.endswith("; 8 replicas are the most allowed")


def test_a_queue_is_no_reason_while_the_capacity_is_unknown() -> None:
    assert decide([observation(backlog=1e9)], AT_ONCE, ScalingState(), target=1, now=NOW).target == 1


def test_a_queue_that_the_running_replicas_leave_keeps_them() -> None:
    """Demand alone would need one of four."""
    seen = [observation(tokens=60 * 100.0, capacity=1000.0, backlog=27_000.0) for _ in range(4)]
    decision = decide(seen, AT_ONCE, ScalingState(), target=4, now=NOW)  # 108 s of work, less 20 s of 3.6 replicas
    assert decision.target == 4
    assert decision.reason.startswith("backlog of 108000 tokens needs 4 replicas (36 s of one replica's work are left")


def test_a_queue_lifts_the_delay_of_its_own_number_only() -> None:
    """The working set needs eight replicas; the queue four, at once. The eight come when their delay has passed."""
    spec = SPEC.model_copy(update={"upscale_delay_s": 10.0})
    seen = [observation(range(60), capacity=1000.0, backlog=60_000.0)]  # 40 s of work are left: 4 replicas
    first = decide(seen, spec, ScalingState(), target=1, now=NOW)
    assert first[:2] == (4, "backlog")
    assert first.reason.startswith("backlog of 60000 tokens needs 4 replicas")
    assert "working set 60.0 MiB of 60 adapters needs 8 replicas" in first.reason
    second = decide(seen, spec, first.state, target=4, now=NOW + 9)
    assert second.target == 4
    third = decide(seen, spec, second.state, target=4, now=NOW + 10)
    assert third[:2] == (8, "working set")


def test_a_queue_from_before_the_window_counts_once() -> None:
    """Two replicas do 30 s of work in the 20 s of a start if half a replica's requests come meanwhile. The rest of the
    tokens, those of the queue itself, come no more.
    """

    def decided(old: float) -> Decision:
        seen = observation(tokens=60 * 500.0 + 42_000.0, capacity=1000.0, backlog=42_000.0, old_backlog=old)
        idle = observation(capacity=1000.0)
        return decide([seen, idle], SPEC, ScalingState(), target=2, now=NOW)

    assert "(26 s of one replica's work" in decided(0.0).reason
    assert decided(0.0).target == 4
    assert "(12 s of one replica's work" in decided(42_000.0).reason
    assert decided(42_000.0).target == 2
