"""Sampling inside of the cluster: a prompt's tokens in, tokens and their log-probabilities out.

A trainer samples under an ephemeral adapter: one that is in no catalog and no store, whose name begins with `~`, which
no name of the catalog does. Its version is the step of the run whose weights it has, its digest is the only key of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from loray.spec.access import DEFAULT_TENANT
from loray.spec.adapters import AdapterRef
from loray.spec.fields import AnyDType
from loray.spec.generation import SamplingParams

ROLLOUT_PRIORITY = 100  # behind the requests of people, before batches

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCall:
    """A call of a gateway for `num_samples` answers to one prompt.

    base      name of a served base
    adapter   None: the base alone
    params    `logprobs` None means 0: sampled tokens always have theirs; sample i has the seed `seed` + i; with
              `max_tokens` 0 the prompt is only scored
    tenant    that is charged, and key_id the key on whose limits the tokens are counted; None: nobody's
    salt      as `cache_salt` of a request: prefixes are shared with calls of the same salt alone
    holders   names of Ray actors that `give` the adapter's files by its digest
    """

    base: str
    adapter: AdapterRef | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    num_samples: int = 1
    tenant: str = DEFAULT_TENANT
    key_id: str | None = None
    priority: int = ROLLOUT_PRIORITY
    salt: str = ""
    holders: tuple[str, ...] = ()


class SampledBase(NamedTuple):
    """A served base: the most tokens of a prompt and its answer, and the dtype of its engine."""

    context_length: int
    dtype: AnyDType


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One answer. EOS, and the token that completes a stop string, are tokens of it.

    logprobs  natural logarithms of the tokens' probabilities, before temperature and penalties
    num_cached_tokens  of the prompt, that were not computed for this answer
    top       the best tokens at each place with their log-probabilities, as many as `params.logprobs`; () for 0
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"]
    num_cached_tokens: int = 0
    top: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleResult:
    """The answers to a call, and of the prompt's tokens from the second on, where `params.prompt_logprobs` asks for
    them, the log-probabilities and the best tokens.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top: tuple[TopLogprobs, ...] = ()
