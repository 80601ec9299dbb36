"""vLLM's requests of /v1/load_lora_adapter and /v1/unload_lora_adapter, which deployment tools send."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from loray.api.openai.body import Body


class LoadLoraRequest(Body):
    """The adapter is the one that the catalog has under `lora_name`; a `lora_path` of files is refused."""

    lora_name: str = Field(min_length=1)
    lora_path: str | None = Field(default=None, description="the name once more, or nothing")
    load_inplace: bool = Field(default=False, description="accepted: the catalog says which version a name means")
    base_model_name: str | None = Field(default=None, description="accepted")


class UnloadLoraRequest(Body):
    lora_name: str = Field(min_length=1)
    lora_int_id: Any = Field(default=None, description="accepted; adapters have no numbers here")
