"""Measures the base, the base under the adapter's RoPE, and the adapter, by the same evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import exp, inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_config
from loray.bases.config import FUSED
from loray.bases.registry import BaseModel
from loray.bases.weights import WeightSource
from loray.errors import UnsupportedError
from loray.files import file_sha256
from loray.methods.alora_module import Activation
from loray.methods.attach import attach, load_weights
from loray.planning.memory import num_shards
from loray.spec import (
    EXACT_MATCH,
    LINEAR_MODULES,
    LOG_LIKELIHOOD,
    PERPLEXITY,
    DType,
    Evaluation,
    PerplexitySpec,
    RetrievalSpec,
    RopeParameters,
    Subject,
    TrainSpec,
    retrieval_metric,
)
from loray.telemetry import Progress
from loray.train.evaluation.documents import Documents, cut_windows, stage_name
from loray.train.evaluation.perplexity import KeptFigures, Measured, finite, mean_loss
from loray.train.evaluation.retrieval import Cell, retrieve
from loray.train.hooks import DENSE
from loray.train.mesh import ALONE, Mesh
from loray.train.model import BaseWeights, load_model, model_config, stand_ins, without_weights
from loray_kernels import INPUTS, QuantizedWeight
from loray_kernels.reference import quantize_activations, quantize_rows


class MeasuredModel(NamedTuple):
    """`rope` None: the base's RoPE. `adapter`: a folder in PEFT's format."""

    subject: Subject
    rope: RopeParameters | None = None
    adapter: Path | None = None


def subjects(rope: RopeParameters | None, adapter: Path | None, *, compare: bool) -> tuple[MeasuredModel, ...]:
    """List the base with `rope` and `adapter`; with `compare`, before it, the base and the base with `rope` alone."""
    stages = [MeasuredModel("base")]
    if rope is not None:
        stages.append(MeasuredModel("base_scaled", rope))
    if adapter is not None:
        stages.append(MeasuredModel("adapter", rope, adapter))
    return tuple(stages) if compare else (stages[-1],)


def identity(base: BaseModel, measured: MeasuredModel, *, dtype: DType, device: torch.device) -> dict[str, Any]:
    """Describe, as JSON, all that decides a model's figures beside the tokens. Hashes the adapter's files."""
    files = [] if measured.adapter is None else [measured.adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return {
        "base": base.fingerprint,
        "rope": measured.rope and measured.rope.to_hf(),
        "adapter": [file_sha256(path) for path in files if path.is_file()],
        "dtype": dtype,
        "device": device.type,
        "attention": DENSE,
    }


def load(
    base: BaseModel,
    measured: MeasuredModel,
    *,
    dtype: DType,
    device: torch.device,
    mesh: Mesh = ALONE,
    trained_by: TrainSpec | None = None,
) -> Measured:
    """Load the model with dense attention, frozen, for evaluation, in a collective call.

    trained_by  the recipe whose workers measure, as `mesh`: they share the weights where its strategy does, or where it
                quantized them, since a base is measured and served as it is. None: PEFT loads the adapter, in the
                dtypes of its file
    Raises UnsupportedError, BaseMismatch or IntegrityError where the adapter could not be served on
    `base`, either.
    """
    weights = None if measured.adapter is None else read_adapter(measured.adapter, base.config)
    if trained_by is not None and num_shards(trained_by) > 1 and mesh.world.size > 1:
        from loray.train.strategies.fsdp2 import shard  # takes a second, and what is whole does not need it

        source = BaseWeights(base, dtype)
        model = without_weights(model_config(base, measured.rope), dtype=dtype, attention=DENSE)
        if weights is not None:
            with stand_ins(model, source):
                attach(model, trained_by.adapter.published, seed=trained_by.seed)
            load_weights(model, weights)
        _round_activations(model, base, device)
        sharded: Measured = shard(Measured(model.requires_grad_(False), mesh), mesh.world, device, source)
        return sharded.eval()
    model = load_model(base, dtype=dtype, rope=measured.rope)
    _round_activations(model, base, device)
    if weights is not None:
        from peft import PeftConfig, PeftModel  # takes a second, and bases do not need it

        config = PeftConfig.from_pretrained(measured.adapter)
        if weights.invocation_tokens is not None:
            config.alora_invocation_tokens = None  # of which PEFT's own model alone tells its modules
        model = PeftModel.from_pretrained(model, measured.adapter, config=config, autocast_adapter_dtype=False)
        model = model.get_base_model()
        if weights.invocation_tokens is not None:
            Activation(weights.invocation_tokens).put_into(model)
    return Measured(model.requires_grad_(False), mesh).to(device).eval()


def _round_activations(model: Any, base: BaseModel, device: torch.device) -> None:
    """Round the inputs of linear modules, experts and a tied output head as engines do on such a device."""
    quantization, on_gpu = base.config.quantization, device.type == "cuda"
    if quantization is None or not quantization.is_kept(on_gpu=on_gpu):
        return
    to_int8: _Quantize = quantize_rows if on_gpu else quantize_activations
    kind = quantization.activations(on_gpu=on_gpu)
    of_layers = partial(quantize_rows, dtype=torch.float8_e4m3fn) if kind == "fp8" else to_int8
    weights = WeightSource(base.path, base.config)

    @cache
    def is_kept(name: str) -> bool:
        return name in weights and isinstance(weights.read(name), QuantizedWeight)

    def rounded(x: Tensor, quantize: _Quantize = of_layers) -> Tensor:
        q_TI, scale_T1 = quantize(x.flatten(0, -2))
        return (q_TI.float() * scale_T1).to(x.dtype).view_as(x)

    def of_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded(inputs[0]), *inputs[1:]

    for path, module in model.named_modules() if kind is not None else ():
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in (*LINEAR_MODULES, *FUSED):
            # What shares an input is one matrix in engines, which dequantise all of it where a part is not quantised.
            modules = next((modules for modules in INPUTS if name in modules), (name,))
            if all(is_kept(f"{parent}.{each}.weight") for each in modules):
                module.register_forward_pre_hook(of_inputs)
        elif name == "experts" and is_kept(f"{path}.0.gate_proj.weight"):
            model.set_experts_implementation("grouped_mm")  # which calls `_apply_gate`
            module.register_forward_pre_hook(of_inputs)
            module._apply_gate = lambda x, gate=module._apply_gate: rounded(gate(x))
    qkv = (f"model.layers.0.self_attn.{module}.weight" for module in INPUTS[0])
    if base.config.tie_word_embeddings and quantization.has_integers and all(map(is_kept, qkv)):
        model.base_model.norm.register_forward_hook(lambda module, inputs, x: rounded(x, to_int8))
        head = model.get_output_embeddings()
        if not head.weight.is_meta:  # else it is a shard's, of the embedding
            weight = QuantizedWeight(*quantize_rows(head.weight.detach()))
            head.weight = nn.Parameter(weight.dequantized(slice(None), head.weight.dtype), requires_grad=False)


_Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
_MAX_LOSS = 700.0  # exp of it is still finite; the loss of a uniform guess is the logarithm of the vocabulary's size


def measure(
    base: BaseModel,
    models: Sequence[MeasuredModel],
    *,
    dtype: DType,
    documents: Documents | None = None,
    perplexity: PerplexitySpec | None = None,
    retrieval: Sequence[RetrievalSpec] = (),
    device: torch.device | None = None,
    progress: Progress = lambda stage, share: None,
    kept: KeptFigures | None = None,
    mesh: Mesh = ALONE,
    trained_by: TrainSpec | None = None,
    look: Callable[[Subject, Callable[[], Measured]], None] = lambda subject, model: None,
) -> tuple[Evaluation, ...]:
    """Measure perplexity on `documents` and retrieval of every model. One model is in memory at a time, and none whose
    figures are all in `kept` (None: nothing is kept). The ranks of `mesh` measure together, as `load` shares a model
    among the workers of the recipe `trained_by`; all make the same call and get the same figures. `look` is shown each
    model last, which is loaded where it is called.

    Raises DataError where no document is as long as a context, SpecError where a retrieval prompt does not fit into
    one, EvaluationError where a value is not finite, and UnsupportedError for an adapter that these texts do not
    invoke.
    """
    device = device or torch.device("cpu")
    kept = kept or KeptFigures(mesh=mesh, device=device)
    windows = {}
    if perplexity is not None and documents is not None:
        stride, most = perplexity.stride, perplexity.max_windows
        windows = {n: cut_windows(documents, n, stride=stride, max_windows=most) for n in perplexity.context_lengths}
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    measured: list[Evaluation] = []
    if windows or retrieval:
        for adapter in [each.adapter for each in models if each.adapter is not None]:
            _check_invoked(adapter)
    for measured_model in models:
        model = cache(partial(load, base, measured_model, dtype=dtype, device=device, mesh=mesh, trained_by=trained_by))
        take = partial(kept.figures, identity(base, measured_model, dtype=dtype, device=device))
        subject = measured_model.subject
        if perplexity is not None and documents is not None:
            for context_length, windows_T in windows.items():
                stage = stage_name(subject, PERPLEXITY, context_length)
                loss = mean_loss(model, windows_T, partial(take, progress=partial(progress, stage)))
                measured.append(
                    Evaluation(
                        metric=PERPLEXITY,
                        value=finite(exp(loss) if loss < _MAX_LOSS else inf, stage),
                        dataset=documents.name,
                        subject=subject,
                        context_length=context_length,
                        stride=perplexity.stride,
                        count=len(windows_T),
                        data_sha256=documents.sha256,
                    )
                )
        for spec in retrieval:
            for context_length in spec.context_lengths:
                stage = stage_name(subject, spec.task, context_length)
                cells = retrieve(
                    model, tokenizer, spec, context_length, partial(take, progress=partial(progress, stage))
                )
                measured += [e for cell in cells for e in _evaluations(cell, spec, subject)]
        look(subject, model)
        del model
    return tuple(measured)


def _check_invoked(adapter: Path) -> None:
    if read_config(adapter).get("alora_invocation_tokens") is not None:
        raise UnsupportedError(
            "the adapter is active after its invocation alone (aLoRA), and these texts have none: compare held-out "
            "losses, which training measures, or measure answers with `loray eval tasks`"
        )


def _evaluations(cell: Cell, spec: RetrievalSpec, subject: Subject) -> list[Evaluation]:
    values = {EXACT_MATCH: cell.exact_match, LOG_LIKELIHOOD: cell.log_likelihood}
    return [
        Evaluation(
            metric=retrieval_metric(spec.task, metric),
            value=value,
            dataset=f"{spec.task}, seed {spec.seed}",
            subject=subject,
            context_length=cell.context_length,
            depth=cell.depth,
            count=spec.samples,
        )
        for metric, value in values.items()
    ]
