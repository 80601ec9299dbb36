"""Dense attention of a model that is trained: documents are segments, and there is no mask of T × T positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loray.bases.registry import BaseModel
from loray.train.hooks import DENSE
from loray.train.model import build_model
from tests.train.attention.test_s2_attention import runs
from tests.train.test_model import ARCHITECTURES, batch, logits_and_gradients, positions, recipe, strengthen, tokens

BaseFactory = Callable[..., BaseModel]


@pytest.mark.parametrize(
    ("architecture", "method", "kind"),
    [
        *((architecture, "lora", "packed") for architecture in ARCHITECTURES),
        ("LlamaForCausalLM", "lora", "full"),
        ("LlamaForCausalLM", "dora", "padded"),
        ("LlamaForCausalLM", "vera", "packed"),
        ("LlamaForCausalLM", "longlora", "packed"),
    ],
)
def test_logits_and_gradients_are_those_of_a_mask(
    tiny_base: BaseFactory, architecture: str, method: str, kind: str
) -> None:
    model = strengthen(build_model(tiny_base(architecture), recipe(method, attention={"type": "dense"}))).double()
    assert model.config._attn_implementation == DENSE
    inputs, ids_BT = batch(kind)
    found, gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    model.set_attn_implementation("sdpa")  # with a boolean mask, and in fp64 throughout
    expected, expected_gradients = logits_and_gradients(model, inputs, ids_BT >= 0)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-10, rtol=1e-10, msg=name)


def test_generation_with_a_cache_and_padding_on_the_left(tiny_base: BaseFactory) -> None:
    model = strengthen(build_model(tiny_base(), recipe("lora"))).eval()
    mask_BT = torch.tensor([runs((0, 3), (1, 5)), runs((1, 8))])
    prompt: dict[str, Any] = {"input_ids": tokens(2, 8), "attention_mask": mask_BT, "max_new_tokens": 4}
    found = model.generate(**prompt, use_cache=True, do_sample=False)
    model.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(**prompt, use_cache=True, do_sample=False))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_packed_rows_need_no_tensor_that_is_quadratic_in_their_length(tiny_base: BaseFactory, method: str) -> None:
    model = build_model(tiny_base(), recipe(method))
    ids_BT = torch.tensor([runs((0, 300), (1, 20), (2, 704))])
    inputs = {"input_ids": tokens(1, 1024), "position_ids": positions(ids_BT)}
    largest = {}
    for attention in (DENSE, "sdpa"):
        model.set_attn_implementation(attention)
        with _Largest() as seen:
            model.base_model(**inputs, use_cache=False).last_hidden_state.sum().backward()
        largest[attention] = seen.num_elements
    assert largest["sdpa"] >= 1024**2
    assert largest[DENSE] <= 1024**2 // 4
