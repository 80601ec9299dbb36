"""Loggers, progress callbacks, and every metric as data.

Metrics follow Prometheus' conventions (base units, `_total`) and vLLM's names where vLLM has one. The gateway exposes
`METRICS` at `/metrics`. Ray's nodes expose `TRAINING_METRICS` and the objectives' figures, with the prefix `ray_`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

PREFIX = "loray_"

Progress = Callable[[str, float], None]  # (name of the stage, share of it that is done, 0 to 1)
StageProgress = Callable[[float], None]  # (share that is done, 0 to 1)


class Metric(NamedTuple):
    """A metric. Every one of a replica also has the labels `replica` and `base`, one of a gateway the label `gateway`.
    `buckets` are ascending upper bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class HistogramCounts(NamedTuple):
    """A histogram. `counts[i]` counts values in (bounds[i - 1], bounds[i]]; the last entry counts those above every
    bound. `sum` is the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


def _table(*metrics: Metric) -> Mapping[str, Metric]:
    """Metrics by name. Keys have no prefix."""
    return {m.name: m._replace(name=PREFIX + m.name) for m in metrics}


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", help, labels, buckets)


_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_LOAD_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_QUEUE_SECONDS = (0.001, 0.005, *_FIRST_TOKEN_SECONDS[1:])
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_STEP_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

# Each replica counts latencies and requests, by `method` (base, lora, vera, longlora).
REQUEST_METRICS = _table(
    _histogram(
        "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS, "method"
    ),
    _histogram("inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_SECONDS, "method"),
    _histogram(
        "e2e_request_latency_seconds", "From a request's arrival to its last token.", _REQUEST_SECONDS, "method"
    ),
    _histogram(
        "request_queue_time_seconds",
        "From being queued to the first step, the adapter's loading included.",
        _QUEUE_SECONDS,
        "method",
    ),
    _histogram("request_prompt_tokens", "Prompt tokens of a finished request.", _REQUEST_TOKENS, "method"),
    _histogram("request_generation_tokens", "Output tokens of a finished request.", _REQUEST_TOKENS, "method"),
    _counter(
        "request_success_total",
        "Requests that ended, by reason: stop, length, or abort where the caller left.",
        "method",
        "finished_reason",
    ),
    _counter(
        "request_errors_total",
        "Requests that were refused or failed in the replica, by the error's class.",
        "method",
        "error",
    ),
)

# Each replica counts these of its engine.
ENGINE_METRICS = _table(
    _gauge("num_requests_running", "Requests in the engine's batch."),
    _gauge("num_requests_waiting", "Requests that wait for blocks, a place in the batch or their adapter."),
    _counter("prompt_tokens_total", "Prompt tokens computed or found in the prefix cache, each once."),
    _counter("generation_tokens_total", "Tokens generated."),
    _counter("preemptions_total", "Running requests put back into the queue for want of blocks."),
    _counter("requests_aborted_total", "Requests refused as they could not have had their first token in time."),
    _counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    _counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
    _counter("spec_decode_num_draft_tokens_total", "Guessed tokens that were computed."),
    _counter("spec_decode_num_accepted_tokens_total", "Guessed tokens that were right."),
    _counter("engine_steps_total", "Steps of the engine."),
    _histogram("engine_step_seconds", "A step: batch, forward pass, sampling.", _STEP_SECONDS),
    _histogram("engine_step_tokens", "Tokens computed in a step.", _STEP_TOKENS),
    _histogram("engine_step_adapters", "Different adapters in a step.", _STEP_ADAPTERS),
    _gauge(
        "pool_blocks",
        "Blocks of the pool by what they hold: free, kv (of requests), cached (prefixes that no request holds), "
        "layered (rows of adapters in layers), flat (other rows of adapters), run (VeRA pairs).",
        "kind",
    ),
    _gauge("kv_cache_usage_ratio", "Share of the pool's blocks that hold requests' KV cache."),
    _gauge("adapters", "Adapters by where they are: pool, host (and not in the pool), loading.", "tier"),
    _gauge("adapter_host_bytes", "Host memory of adapters and prefixes."),
    _counter(
        "adapter_requests_total",
        "Requests for an adapter, by where it was when they came: pool, host, or store.",
        "tier",
    ),
    _counter("adapter_loads_total", "Loads of adapters into host memory begun."),
    _counter(
        "adapter_sources_total",
        "The same by where the bytes come from: the node's cache, the store, or an ephemeral adapter's actor.",
        "source",
    ),
    _counter("adapter_load_failures_total", "Adapters that could not be loaded or placed."),
    _counter("adapter_loaded_bytes_total", "Bytes of loaded adapters in host memory."),
    _histogram("adapter_load_seconds", "From the start of a load until the engine has the adapter.", _LOAD_SECONDS),
    _counter("adapter_evictions_total", "Adapters thrown out of the pool or of host memory.", "tier"),
    _gauge(
        "warm_start_adapters",
        "Adapters that the replica loaded before it took requests: in the pool, on the host, failed, or late.",
        "outcome",
    ),
    _gauge("warm_start_seconds", "For which the replica loaded adapters before it took requests."),
    _gauge("replica_start_time_seconds", "When the replica started, in seconds since the epoch."),
)

# Each gateway counts these.
GATEWAY_METRICS = _table(
    _counter(
        "http_requests_total",
        "HTTP requests that ended, by status code; 499 where the client left before it had one.",
        "route",
        "code",
    ),
    _counter(
        "requests_total",
        "HTTP requests that ended, by outcome: ok, client_error, refused (401, 403, 429), failed before the first byte,"
        " broken after it, or left (the client, before it).",
        "route",
        "outcome",
    ),
    _gauge("http_requests_in_flight", "HTTP requests under way, this one included."),
    _gauge("http_requests_waiting", "Of these, requests that wait for their tenant's turn while the gateway is late."),
    _counter("routing_decisions_total", "Choices of a replica, by reason.", "base", "reason"),
    _counter(
        "resumes_total",
        "Begun answers that went on at another replica, by reason: the first was lost, or removed (moved).",
        "base",
        "reason",
    ),
    _counter(
        "canary_requests_total",
        "Requests for aliases that have a canary, by version (stable or canary) and outcome (ok or error).",
        "version",
        "outcome",
    ),
    _counter("canary_rollbacks_total", "Canaries that left a bound and were ended: error_rate, ttft or itl.", "bound"),
    _counter(
        "ignored_fields_total",
        "Fields of requests that nobody knows here and that were ignored, by name; `other` beyond 100 names.",
        "field",
    ),
    _gauge("catalog_adapters", "Adapters of this base in the catalog's snapshot.", "base"),
    _gauge("catalog_age_seconds", "Since the catalog was last read with success."),
    _gauge("keys_age_seconds", "Since the API keys were last known to be the catalog's."),
    _gauge("usage_writer_alive", "1: the threads that write usage run."),
    _gauge("usage_journal_bytes", "Usage events that wait until the catalog takes them."),
    _gauge("usage_oldest_unsent_seconds", "For which the oldest of them waits."),
    _counter("usage_events_lost_total", "Usage events that neither disk nor catalog took."),
)

# The gateway that answers counts these, for its answer.
ANSWER_METRICS = _table(
    _gauge("replicas_reporting", "Replicas of this base whose metrics are in this answer.", "base"),
    _gauge("replicas_silent", "Replicas of this base that did not answer in time.", "base"),
    _gauge("replicas_wanted", "Replicas of this base that the spec or the autoscaler wants; 0: it is asleep.", "base"),
    _gauge("gateways_reporting", "Gateways whose metrics are in this answer."),
    _gauge("gateways_silent", "Gateways that did not answer in time."),
)

METRICS: Mapping[str, Metric] = {**REQUEST_METRICS, **ENGINE_METRICS, **GATEWAY_METRICS, **ANSWER_METRICS}

# Rank 0 of a training run reports these; every rank reports its memory. `name` is the adapter's name, `run` the name of
# the run's folder. All are gauges, since the totals of a resumed run continue from its checkpoint.
TRAINING_LABELS = ("name", "run", "rank")
TRAINING_METRICS = _table(
    _gauge("train_step", "Optimizer steps of the run so far.", *TRAINING_LABELS),
    _gauge(
        "train_loss",
        "Loss of the last step: the mean cross-entropy a target token, or the mean over pairs or rows.",
        *TRAINING_LABELS,
    ),
    _gauge("train_eval_loss", "Held-out loss of the adapter when it was last evaluated.", *TRAINING_LABELS),
    _gauge("train_learning_rate", "Learning rate of the last step.", *TRAINING_LABELS),
    _gauge("train_grad_norm", "Global norm of the last step's gradient, before clipping.", *TRAINING_LABELS),
    _gauge("train_tokens_per_second", "Tokens of all workers over the time from step to step.", *TRAINING_LABELS),
    _gauge(
        "train_mfu_ratio",
        "Model FLOPs utilisation: the model's FLOP/s over what the devices can do.",
        *TRAINING_LABELS,
    ),
    _gauge("train_tokens", "Tokens that the run has trained on.", *TRAINING_LABELS),
    _gauge("train_skipped_steps", "Steps of the run whose loss or gradient was not finite.", *TRAINING_LABELS),
    _gauge(
        "train_checkpoint_seconds",
        "From the last checkpoint's being written to its being stored.",
        *TRAINING_LABELS,
    ),
    _gauge("train_memory_bytes", "Most memory that the worker has had, on its GPU where it has one.", *TRAINING_LABELS),
)


def figure_metrics(figures: Mapping[str, str]) -> Mapping[str, Metric]:
    """Make the gauges of an objective's figures, which are given by name with what they are: of the last step, and of
    held-out rows.
    """
    by_gauge = {name.replace("/", "_"): what for name, what in figures.items()}
    return _table(
        *(_gauge(f"train_{name}", f"{what}; last step.", *TRAINING_LABELS) for name, what in by_gauge.items()),
        *(
            _gauge(f"train_eval_{name}", f"{what}; held-out rows, when last evaluated.", *TRAINING_LABELS)
            for name, what in by_gauge.items()
        ),
    )


def get_logger(name: str) -> logging.Logger:
    """A logger below `loray`, for any of the packages."""
    return logging.getLogger(name if name.startswith("loray") else f"loray.{name}")


def configure_logging(level: str) -> None:
    """Set up logging of a process that loray starts (CLI, driver, replica). Other libraries log from WARNING on."""
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("loray").setLevel(level)
