"""What one replica reports of its demand, and how Ray Serve transports it: numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

_ADAPTER, _PAIR = "adapter:", "pair:"
_AFTER = len(_ADAPTER)
_DIGITS = 13  # of a rank, in base 16: as many as a float has
_NUM_RANKS = 1 << 4 * _DIGITS


@dataclass(frozen=True, slots=True)
class Observation:
    """One replica's report. Sums are over the last min(age_s, window) seconds.

    tokens      asked for
    capacity    tokens per second while saturated; None until the replica was saturated for a second
    occupied_s  integral of requests under way over time, in batches of max_num_seqs
    kv_byte_s   integral of the KV cache's bytes over time
    backlog     tokens of the requests that wait for their turn, prompts and expected outputs. Without those that wait
                for their adapters to be loaded, which a replica that is added would have to load as well
    old_backlog of the backlog, what came before the window: `tokens` has it as well
    burst       of `tokens`, what came within the time that a replica takes to start
    prompt_tokens, prompt_squares  sums of the prompts' tokens, and of their squares
    adapters    routing key → bytes in the pool, of the adapters in demand whose `adapter_rank` is below `sample`; with
                a `sample` of 1, of all adapters in demand
    pairs       key → bytes, of all VeRA pairs that adapters in demand share
    """

    age_s: float
    tokens: float
    capacity: float | None
    occupied_s: float
    kv_byte_s: float
    pool_bytes: float
    backlog: float
    adapters: Mapping[str, float]
    old_backlog: float = 0.0
    burst: float = 0.0
    prompt_tokens: float = 0.0
    prompt_squares: float = 0.0
    sample: float = 1.0
    pairs: Mapping[str, float] = field(default_factory=dict)

    def to_stats(self) -> dict[str, float]:
        """The report as Ray Serve transports it: numbers by name."""
        return {
            "age_s": self.age_s,
            "tokens": self.tokens,
            "capacity": self.capacity or 0.0,
            "occupied_s": self.occupied_s,
            "kv_byte_s": self.kv_byte_s,
            "pool_bytes": self.pool_bytes,
            "backlog": self.backlog,
            "old_backlog": self.old_backlog,
            "burst": self.burst,
            "prompt_tokens": self.prompt_tokens,
            "prompt_squares": self.prompt_squares,
            "sample": self.sample,
            **{_ADAPTER + key: nbytes for key, nbytes in self.adapters.items()},
            **{_PAIR + key: nbytes for key, nbytes in self.pairs.items()},
        }

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> Observation:
        """Inverse of `to_stats`. KeyError if a number is missing."""
        return cls(
            age_s=stats["age_s"],
            tokens=stats["tokens"],
            capacity=stats["capacity"] or None,
            occupied_s=stats["occupied_s"],
            kv_byte_s=stats["kv_byte_s"],
            pool_bytes=stats["pool_bytes"],
            backlog=stats["backlog"],
            old_backlog=stats["old_backlog"],
            burst=stats["burst"],
            prompt_tokens=stats["prompt_tokens"],
            prompt_squares=stats["prompt_squares"],
            adapters={k[_AFTER:]: v for k, v in stats.items() if k.startswith(_ADAPTER)},
            sample=stats["sample"],
            pairs={k.removeprefix(_PAIR): v for k, v in stats.items() if k.startswith(_PAIR)},
        )


def adapter_rank(key: str) -> float:
    """Maps a digest, or its routing key, to a number in [0, 1): uniformly, and equally on every replica."""
    return int(key[:_DIGITS], 16) / _NUM_RANKS


def key_of_rank(rank: float) -> str:
    """The text before which exactly the keys come whose `adapter_rank` is below `rank`."""
    return f"{ceil(rank * _NUM_RANKS):0{_DIGITS}x}" if rank < 1 else "g"
