"""What one request to a model used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal, get_args

UsageGroup = Literal["tenant", "key", "model", "day"]
USAGE_GROUPS: tuple[UsageGroup, ...] = get_args(UsageGroup)


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One request, whatever its end. An event with a `request_id` that is known already is the same event.

    key_id      None: no key was needed
    model       the adapter's qualified name, or the base's
    digest      of the adapter; None: the base
    tier        OpenAI's service tier that its `priority` amounts to: `priority` below 0, `default` at 0, `flex` above
    seconds     from the request's arrival to its end
    outcome     `ok`, `disconnected`, `cancelled`, or the code of the error
    created_at  when it ended
    """

    request_id: str
    tenant: str
    key_id: str | None
    model: str
    digest: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    tier: str
    seconds: float
    outcome: str
    created_at: datetime

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"created_at": self.created_at.isoformat()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> UsageEvent:
        """Raises ValueError."""
        try:
            fields = json.loads(line)
            return cls(**fields | {"created_at": datetime.fromisoformat(fields["created_at"])})
        except (KeyError, TypeError) as e:
            raise ValueError(f"not a usage event: {e}") from e


def service_tier(priority: int) -> str:
    return "default" if priority == 0 else "priority" if priority < 0 else "flex"
