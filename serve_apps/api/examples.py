"""Example responses for the OpenAPI document."""

from __future__ import annotations

from typing import Any

Responses = dict[int | str, dict[str, Any]]

_DIGEST = "9b4f" * 16
_BASE = "41d0" * 16
_TIME = "2026-11-24T18:00:00Z"
_LOSS = {"metric": "loss", "value": 1.62, "dataset": "held-out", "subject": "adapter", "context_length": 1024}

_PAIR = {"key": 0, "rank": 256, "max_in": 576, "max_out": 576, "sha256": "9ae1" * 16, "canonical": True}
BASE = {"name": "smollm2", "fingerprint": _BASE, "projections": [_PAIR]}
RECIPE = {
    "name": "tone",
    "base": "smollm2",
    "adapter": {"method": "lora", "rank": 16},
    "data": {"train": "s3://bucket/tone.jsonl"},
    "batch": {"rows": 8},
    "optimizer": {"learning_rate": 0.0002},
    "max_steps": 200,
}
ADAPTER = {
    "name": "tone",
    "created_at": _TIME,
    "version": 3,
    "digest": _DIGEST,
    "method": "lora",
    "base": "smollm2",
    "base_fingerprint": _BASE,
    "context_length": 8192,
    "nbytes": 1843200,
    "versions": [4, 3, 2, 1],
    "aliases": {"prod": 3, "canary": 4},
    "weights": {"prod": {"3": 90, "4": 10}},
    "tenant": "default",
    "visibility": "shared",
    "shared_with": ["acme"],
}
TAG = {"key": "team", "value": "support"}
FILE = {"name": "adapter_config.json", "sha256": "3f1c" * 16, "nbytes": 812}
DOWNLOAD = {
    "files": [FILE | {"url": "https://bucket.s3.eu-1.amazonaws.com/blobs/3f/3f1c…?X-Amz-Signature=…"}],
    "expires_at": _TIME,
}
UPLOAD = {"id": "5f1b" * 8, "files": [FILE]}
VERSION = {
    "name": "tone",
    "version": 3,
    "digest": _DIGEST,
    "created_at": _TIME,
    "aliases": ["prod"],
    "method": "lora",
    "base_fingerprint": _BASE,
    "context_length": 8192,
    "nbytes": 1843200,
    "evaluations": [_LOSS],
}
VERSION_DETAIL = VERSION | {
    "manifest": {"format": 1, "method": "lora", "base": "smollm2", "rank": 16, "files": {}, "recipe": RECIPE}
}
ALIAS = {
    "name": "tone",
    "alias": "prod",
    "version": 3,
    "digest": _DIGEST,
    "revision": 17,
    "weights": {"3": 90, "4": 10},
}
CANARY = {
    "alias": "prod",
    "stable": 3,
    "version": 4,
    "percent": 10,
    "bounds": {"max_error_rate": 0.05, "max_ttft_ratio": 2.0, "max_itl_ratio": 2.0, "min_requests": 50},
    "counts": {
        "stable": {"num_requests": 1804, "num_errors": 2, "ttft_s": 0.11, "itl_s": 0.021},
        "canary": {"num_requests": 196, "num_errors": 0, "ttft_s": 0.12, "itl_s": 0.021},
    },
    "created_at": _TIME,
    "ended_at": None,
    "outcome": None,
    "reason": None,
}
PLACEMENT = {
    "name": "tone",
    "items": [
        {
            "replica": "k3x9",
            "node": "worker-1",
            "version": 3,
            "digest": _DIGEST,
            "nbytes": 1843200,
            "tier": "pool",
            "uses": 412,
            "last_used_at": _TIME,
        }
    ],
}
USAGE = {
    "tenant": "acme",
    "key_id": None,
    "model": "acme/tone",
    "day": None,
    "num_requests": 12,
    "num_prompt_tokens": 3400,
    "num_cached_tokens": 1200,
    "num_output_tokens": 960,
    "seconds": 20.5,
}
JOB = {
    "id": "train_5f1b2c3d4e5f6a7b",
    "name": "tone",
    "tenant": "default",
    "status": "succeeded",
    "message": "",
    "version": 3,
    "actor": "api",
    "created_at": _TIME,
    "started_at": _TIME,
    "ended_at": _TIME,
    "recipe": RECIPE,
}
_LIMITS = {"rpm_limit": 600, "tpm_limit": 100000, "max_parallel_requests": 8, "max_budget": None}
KEY = {
    "id": "key-5f1b2c3d4e5f6a7b",
    "key_name": "sk-lr-8QmZ4c0x…",
    "key_alias": "ci",
    "tenant": "acme",
    "scopes": ["infer", "publish"],
    "models": ["tone"],
    "metadata": {"team": "support"},
    "blocked": False,
    "created_by": "local",
    "created_at": _TIME,
    "expires": None,
    "revoked_at": None,
    "last_used_at": _TIME,
} | _LIMITS
NEW_KEY = KEY | {"key": "sk-lr-8QmZ4c0x" + "…" * 35}
TENANT = {"name": "acme", "blocked": False, "created_at": _TIME} | _LIMITS
AUDIT = {
    "id": 42,
    "actor": "ci (key-5f1b2c3d4e5f6a7b)",
    "action": "promote",
    "subject": "acme/tone@prod",
    "tenant": "acme",
    "detail": {"version": 3},
    "created_at": _TIME,
    "address": "10.0.0.7",
    "request_id": "req-5f1b2c3d4e5f6a7b",
}
RECOMMENDATION = {
    "base": "smollm2",
    "device": "a100-80gb",
    "scores": [
        {"method": "VeRA", "score": 12.0, "reason": "resources are scarce and 1,000 tasks are more than 100"},
        {"method": "LoRA", "score": 5.0, "reason": "the baseline: every tool knows it"},
    ],
    "estimates": [
        {
            "method": "lora",
            "settings": "r16 on q, k, v, o",
            "problem": None,
            "trained_parameters": 1843200,
            "adapter_bytes": 3686400,
            "training_bytes": 3900000000,
            "step_s": 0.02,
            "tokens_per_s": 100000.0,
            "checkpointing": False,
            "adapters_per_gib": 291.2,
            "served_pool_bytes": 3687186432,
            "served_devices": 1,
            "throughput": 0.7,
        }
    ],
    "remarks": ["methods combine: VeRA trained and S-LoRA served is one choice, not two"],
}


def ok(
    example: dict[str, Any], status: int = 200, *, location: bool = False, headers: dict[str, Any] | None = None
) -> Responses:
    """A successful response, for `responses=` of a route."""
    headers = dict(headers or {})
    if location:
        headers["Location"] = {"description": "its URL", "schema": {"type": "string"}}
    described: dict[str, Any] = {"content": {"application/json": {"example": example}}}
    return {status: described | ({"headers": headers} if headers else {})}


def page(item: dict[str, Any], cursor: str | None) -> Responses:
    return ok({"items": [item], "next": cursor})
