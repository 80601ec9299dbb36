"""Answers of Tinker's protocol: protobuf for the results of passes and samples, JSON for all else.

Clients check answers strictly, so no field that they need is left out, and none is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loray.errors import EngineError, LorayError
from loray.schemas.tinker.paths import CheckpointPath
from loray.schemas.tinker.proto import ForwardBackwardOutput, SampleResponse
from loray.schemas.tinker.tensors import write_batch, write_top
from loray.spec.datums import LossOutput
from loray.spec.methods import ATTENTION_MODULES, MLP_MODULES
from loray.spec.rollouts import SampleResult
from loray.spec.tinker import TinkerCheckpoint, TinkerModel

PROTOBUF = "application/x-protobuf"
OLDEST_SDK, NEWEST_SDK = (0, 25, 0), (0, 38, 0)
HEAD_IS_FROZEN = (
    "loray trains attention and MLP; train_unembed is accepted and not done, since the head of a base is frozen here"
)
_STOP, _LENGTH = 0, 1
_NAN = np.float32(np.nan)


def sdk_version_of(text: str) -> tuple[int, ...]:
    """`0.38.0` → (0, 38, 0); what is no number counts as 0."""
    parts = text.split("+")[0].split(".")[:3]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def client_config(*, compressed: bool) -> dict[str, Any]:
    """The flags of a client. `compressed`: this server can read bodies in zstd."""
    return {
        "pjwt_auth_enabled": False,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": compressed,
        "fwdbwd_max_chunk_len": 128,
        "fwdbwd_max_chunk_bytes_count": 2_000_000,
        "sample_use_retrieve_futures": False,
        "sample_join_sampling_session": True,
        "custom_loss_server_side": False,
        "use_pyqwest_transport": False,
    }


def client_dynamic_config() -> dict[str, Any]:
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


def pass_bytes(output: LossOutput) -> bytes:
    """ForwardBackwardOutput of a pass: the logprobs of every position of every datum, and its metrics."""
    message = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = message.loss_fn_outputs.add(num_datums=len(output.logprobs))
    write_batch(record.fields["logprobs"], output.logprobs)
    message.metrics["loss:sum"] = output.loss
    for name, value in output.metrics.items():  # clients combine chunks by what follows the one colon
        message.metrics[name if name.count(":") == 1 else f"{name.replace(':', '_')}:mean"] = value
    raw: bytes = message.SerializeToString()
    return raw


def sample_bytes(result: SampleResult, num_prompt: int, last: int | None, top_prompt: int, top_sampled: int) -> bytes:
    """SampleResponse. `last`: only so many of the prompt's tokens have logprobs; `top_…`: how many of the best tokens
    of each place were asked for.
    """
    message = SampleResponse()
    for sequence in result.sequences:
        added = message.sequences.add(
            stop_reason=_STOP if sequence.stop_reason == "stop" else _LENGTH,
            tokens=np.array(sequence.token_ids, "<i4").tobytes(),
            logprobs=np.array(sequence.logprobs, "<f4").tobytes(),
        )
        if top_sampled:
            write_top(added.topk_sampled_logprobs, sequence.top, top_sampled)
    if result.prompt_logprobs is not None:
        scored = np.array([_NAN, *result.prompt_logprobs], "<f4")
        if last is not None:
            scored[: num_prompt - last] = _NAN
        message.prompt_logprobs = scored.tobytes()
        if top_prompt:
            places: list[Sequence[tuple[int, float]]] = [(), *result.prompt_top]
            if last is not None:
                places[: num_prompt - last] = [()] * (num_prompt - last)
            write_top(message.topk_prompt_logprobs, places, top_prompt)
    message.prompt_cache_hit_tokens = min((s.num_cached_tokens for s in result.sequences), default=0)
    raw: bytes = message.SerializeToString()
    return raw


def failed(error: Exception) -> dict[str, str]:
    """The result of a request that has failed. What the caller can change is the user's."""
    if not isinstance(error, LorayError):
        return {"error": "internal error; the server's log has the details", "category": "server"}
    is_users = error.status < 500 and not isinstance(error, EngineError)
    return {"error": str(error), "category": "user" if is_users else "server"}


def try_again(request_id: str, state: str = "active", reason: str | None = None) -> dict[str, str | None]:
    """The body of a 408: the result is not there yet. `state`: active, paused_capacity or paused_rate_limit."""
    return {"type": "try_again", "request_id": request_id, "queue_state": state, "queue_state_reason": reason}


def model_info(model: TinkerModel, tokenizer_id: str, architecture: str) -> dict[str, Any]:
    return {
        "type": "get_info",
        "model_data": {"arch": architecture, "model_name": model.base_model, "tokenizer_id": tokenizer_id},
        "model_id": model.id,
        "is_lora": True,
        "lora_rank": rank_of(model),
        "model_name": model.base_model,
        "optimizer_config": {"type": "adamw"},
    }


def weights_info(model: TinkerModel) -> dict[str, Any]:
    modules = set(model.adapter.target_modules)
    return {
        "base_model": model.base_model,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": rank_of(model),
        "train_unembed": False,
        "train_mlp": bool(modules & set(MLP_MODULES)),
        "train_attn": bool(modules & set(ATTENTION_MODULES)),
    }


def rank_of(model: TinkerModel) -> int | None:
    rank: int | None = getattr(model.adapter, "rank", None)
    return rank


def checkpoint(row: TinkerCheckpoint) -> dict[str, Any]:
    path = CheckpointPath(row.model_id, row.kind, row.name)
    return {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": row.kind,
        "time": row.created_at.isoformat(),
        "tinker_path": str(path),
        "size_bytes": row.nbytes,
        "public": False,
        "user_metadata": dict(row.metadata),
        "expires_at": None if row.expires_at is None else row.expires_at.isoformat(),
    }


def training_run(model: TinkerModel, checkpoints: Sequence[TinkerCheckpoint]) -> dict[str, Any]:
    """`checkpoints`: the model's, the newest first."""
    newest: Mapping[str, TinkerCheckpoint] = {row.kind: row for row in reversed(checkpoints)}
    return {
        "training_run_id": model.id,
        "base_model": model.base_model,
        "model_owner": model.tenant,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": rank_of(model),
        "last_request_time": model.used_at.isoformat(),
        "last_checkpoint": checkpoint(newest["training"]) if "training" in newest else None,
        "last_sampler_checkpoint": checkpoint(newest["sampler"]) if "sampler" in newest else None,
        "user_metadata": dict(model.metadata),
    }


def cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}
