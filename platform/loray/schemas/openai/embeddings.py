"""OpenAI's embeddings, with vLLM's further fields: bodies of requests and answers."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, model_validator

from loray.errors import RequestError
from loray.schemas.openai import fields
from loray.schemas.openai.fields import Body, Prompt, PromptForms, ShortText
from loray.schemas.openai.responses import ResponseBody

MAX_INPUTS = 2048  # of one request
MAX_INPUT_TOKENS = 300_000  # of all of them


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Annotated[ShortText, Field(min_length=1)]
    input: Annotated[
        tuple[Prompt, ...],
        PlainValidator(partial(fields.prompts, most=MAX_INPUTS), json_schema_input_type=PromptForms),
    ] = Field(description=f"a text, texts, token ids, or lists of token ids; at most {MAX_INPUTS:,}")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian floats of four bytes"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="one of those in `matryoshka` of the serve spec; unless given, all"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="of a longer text the first so many tokens; -1: as many as the model takes"
    )
    add_special_tokens: bool = Field(default=True, description="what the tokenizer puts around a text")
    normalize: bool | None = Field(default=None, description="to length 1; unless given, as the model is meant")
    priority: int = Field(default=0, description="smaller is earlier; below 0 needs a key that may")
    user: ShortText | None = Field(default=None, description="whose share it takes, where X-Tenant-Id does not say it")

    # What it has in common with requests of answers: nothing is generated.
    n: ClassVar[int] = 1
    requested_max_tokens: ClassVar[int] = 0

    @model_validator(mode="after")
    def _keeps_something(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
        return self


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseBody):
    """The embeddings in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
