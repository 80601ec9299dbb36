"""aLoRA (Greenewald et al., 2025): LoRA that is active from the last occurrence of its invocation on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import SpecError
from loray.methods.lora import Lora
from loray.methods.weights import AdapterWeights
from loray.spec import AloraSpec, Default, LoraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import LoraConfig

_LORA = Lora()


class Alora(Lora):
    name: ClassVar[AdapterMethod] = "alora"
    adapts_experts: ClassVar[bool] = False
    spec: ClassVar[type[BaseModel]] = AloraSpec
    defaults: ClassVar[Mapping[str, Default]] = {
        **Lora.defaults,
        "adapter.rank": Default("the paper's: it has fewer tokens to change than LoRA, and takes more rank for them"),
        "adapter.invocation": Default("what the base's chat template puts before an answer, which every chat has"),
        "adapter.invocation_tokens": Default("instead of the text, where its tokens depend on what is around it"),
    }

    def tokenised(self, spec: AloraSpec, open_tokenizer: Callable[[], Any]) -> AloraSpec:
        if spec.invocation is None and spec.invocation_tokens is not None:
            return spec
        tokenizer = open_tokenizer()
        text = _generation_prompt(tokenizer) if spec.invocation is None else spec.invocation
        tokens = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        if spec.invocation_tokens not in (None, tokens):
            raise SpecError(
                f"adapter.invocation {text!r} has the tokens {list(tokens)} on this base, and "
                f"adapter.invocation_tokens are {list(spec.invocation_tokens or ())}: give one of the two"
            )
        given = spec.model_dump(exclude_unset=True) | {"invocation": text, "invocation_tokens": tokens}
        return AloraSpec.parse(given, source="adapter")

    def inject(self, model: Any, spec: LoraSpec) -> None:
        """Put LoRA into the model, and turn it on where it is active: PEFT's own way takes a place of each row, and a
        packed row has several.
        """
        from loray.methods.alora_module import Activation

        assert spec.invoked_by is not None, "the tokens of a recipe are found on its base"
        _LORA.inject(model, spec)
        Activation(spec.invoked_by).put_into(model)

    def peft_config(self, spec: LoraSpec, **options: Any) -> LoraConfig:
        return super().peft_config(spec, alora_invocation_tokens=list(spec.invoked_by or ()), **options)

    def differences(self, spec: LoraSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        yield from super().differences(spec, weights, base)
        if weights.invocation_tokens != spec.invoked_by:
            yield f"its invocation is {list(weights.invocation_tokens or ())} (invocation_tokens)"


def _generation_prompt(tokenizer: Any) -> str:
    """The text that the base's chat template puts before an answer, without the space at its end, which may be a part
    of the answer's first token.
    """
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": "?"}]
        before, after = (
            tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=adds) for adds in (False, True)
        )
        if after.startswith(before) and (text := after[len(before) :].rstrip()):
            return str(text)
    raise SpecError(
        "the base's chat template adds nothing before an answer: give adapter.invocation, a text of prompts"
    )
