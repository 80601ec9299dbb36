"""What the catalog keeps of Tinker's protocol: sessions, trained models, sampling sessions, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from loray.spec.adapters import AdapterRef
from loray.spec.methods import AdapterSpec

CheckpointKind = Literal["training", "sampler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerSession:
    """A client's session. It has ended where its client has finished it or was not heard of for too long.

    key_id     the key that has begun it; None: no key was needed
    priority   of its samples
    seen_at    when its client was last heard of
    end        why it has ended: `success`, `errored` or `interrupted`, as the client says; `idle`; `stopped` by
               somebody of its tenant; None: it goes on
    """

    id: str
    tenant: str
    key_id: str | None
    sdk_version: str
    display_name: str | None
    metadata: Mapping[str, str]
    priority: int
    created_at: datetime
    seen_at: datetime
    end: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerModel:
    """A model that is, or was, trained: one adapter in the trainer of its base.

    base_model      the name by which the client has asked for the base
    name            of the catalog, whose versions its sampler weights become
    initial         path of the checkpoint it begins with, or `NAME@VERSION`; None: new weights by `seed`
    with_optimizer  it begins with the checkpoint's optimizer state as well
    used_at         when it was last asked for anything
    is_live         it has a slot in the trainer
    num_steps, num_tokens, loss  optimizer steps, trained tokens, the sum of the last loss, as far as is known here
    """

    id: str
    session_id: str
    tenant: str
    base: str
    base_model: str
    adapter: AdapterSpec
    seed: int
    name: str
    initial: str | None = None
    with_optimizer: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime
    used_at: datetime
    is_live: bool = True
    num_steps: int = 0
    num_tokens: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerSampler:
    """A sampling session.

    path      of the checkpoint that it samples from; None: the base, or weights that have no path
    adapter   None: the base
    holders   names of actors that have the adapter's bytes
    model_id  of the model whose weights it has without a path, from its request `seq`
    inflight  it has the newest weights that the model gave to any of its in-flight sampling sessions
    is_ready  `adapter` is known; the model's queue may not have come to the request yet
    num_clients  copies of the client that have joined
    """

    id: str
    session_id: str
    tenant: str
    base: str
    base_model: str
    path: str | None = None
    adapter: AdapterRef | None = None
    holders: tuple[str, ...] = ()
    model_id: str | None = None
    seq: int | None = None
    inflight: bool = False
    is_ready: bool = True
    num_clients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerCheckpoint:
    """A checkpoint of a model, by its name unique among those of its kind.

    seq       of the request that has saved it
    folder    of a training checkpoint
    version   `NAME@VERSION` of sampler weights, with their `digest`
    is_ready  it is written; the model's queue may not have come to the request yet
    """

    model_id: str
    tenant: str
    kind: CheckpointKind
    name: str
    seq: int
    folder: str | None = None
    version: str | None = None
    digest: str | None = None
    nbytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime
    expires_at: datetime | None = None
    is_ready: bool = False
