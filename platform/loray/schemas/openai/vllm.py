"""Bodies of vLLM's routes that OpenAI does not have: tokenizing, and loading an adapter."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, model_validator

from loray.errors import RequestError
from loray.schemas.openai import fields
from loray.schemas.openai.fields import Body
from loray.schemas.openai.responses import ResponseBody


class LoadLoraRequest(Body):
    """The adapter is the one that the catalog has under `lora_name`; a `lora_path` of files is refused."""

    lora_name: str = Field(min_length=1)
    lora_path: str | None = Field(default=None, description="the name once more, or nothing")
    load_inplace: bool = Field(default=False, description="accepted: the catalog says which version a name means")
    base_model_name: str | None = Field(default=None, description="accepted")


class UnloadLoraRequest(Body):
    lora_name: str = Field(min_length=1)
    lora_int_id: Any = Field(default=None, description="accepted; adapters have no numbers here")


class TokenizeRequest(Body):
    """POST /tokenize of a text, or of a chat, whose further fields are those of a chat completion."""

    model: fields.ShortText | None = Field(
        default=None, min_length=1, description="the base, unless given; required where several are served"
    )
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = Field(default=None, description="true for a text and false for a chat")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: fields.SmallObject | None = None
    tools: list[Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give prompt or messages, and not both", "prompt")
        return self

    def chat_body(self, model: str) -> dict[str, Any]:
        """The body of the chat completion whose prompt is asked for."""
        names = ("messages", "add_special_tokens", "chat_template_kwargs", "tools")
        flags = {
            name: getattr(self, name)
            for name in ("add_generation_prompt", "continue_final_message")
            if name in self.model_fields_set
        }
        return {"model": model} | {name: getattr(self, name) for name in names} | flags


class TokenizeResponse(ResponseBody):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: fields.ShortText | None = Field(
        default=None, min_length=1, description="the base, unless given; required where several are served"
    )
    tokens: Annotated[tuple[int, ...], PlainValidator(fields.token_ids, json_schema_input_type=list[int])]


class DetokenizeResponse(ResponseBody):
    prompt: str
