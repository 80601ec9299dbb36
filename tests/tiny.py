"""Tiny random checkpoints with a byte tokenizer: real Hugging Face folders of every architecture, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.draws import Normal

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def write_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """A random model of `architecture` with its tokenizer in `folder`. `config` overrides fields of the HF config.

    Every parameter is random, norms and biases too, so that one that is not read shows; and equal on every machine.
    """
    import transformers

    name = architecture.removesuffix("ForCausalLM")
    fields = SIZES | {"sliding_window": None, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256} | config
    hf_config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, architecture)(hf_config)
    draw = Normal(seed)
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            noise = draw(*parameter.shape)
            is_norm = path.endswith("norm.weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else std * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """256 bytes, then <|endoftext|> 256, <|im_start|> 257 and <|im_end|> 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=SIZES["max_position_embeddings"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
