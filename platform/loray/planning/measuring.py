"""The memory of a worker while it measures what a run has trained, before that is published: base and adapter, by
passes without gradients.
"""

from __future__ import annotations

from loray.planning.devices import Device
from loray.planning.memory import gathered_weights
from loray.planning.run import SHARDS_WEIGHTS, Run
from loray.spec import DTYPE_BYTES, TrainSpec

MEASURED_AT_ONCE = 4096  # tokens of short windows that share a pass
_FP32 = DTYPE_BYTES["float32"]


def num_shards(spec: TrainSpec | Run) -> int:
    """Workers over which the weights of a measured model are spread. A base that training quantises is measured as it
    is served, in four times the memory, which one worker need not have.
    """
    strategy = spec.strategy if isinstance(spec, Run) else spec.parallel.strategy
    return spec.num_workers if strategy in SHARDS_WEIGHTS or spec.quantization is not None else 1


def measuring_bytes(run: Run, device: Device) -> int:
    """The peak of a worker in its longest pass; 0 where the recipe measures nothing.

    Of a layer there are at once its input in two dtypes, queries, keys, values and output of attention, and gate, up
    and their product; then the hidden states twice, and a chunk of logits.
    """
    if run.measured_length is None:
        return 0
    e, model, shards = run.element_bytes, run.model, num_shards(run)
    weights = -(-e * (run.base.total + run.trained.total) // shards)
    if shards > 1:
        weights += gathered_weights(run)
    tokens = -(-max(MEASURED_AT_ONCE, run.measured_length) // run.sequence)
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = (2 * e + _FP32) * model.hidden_size + e * max(heads, 3 * model.intermediate_size)
    logits = 2 * _FP32 * min(device.loss_chunk, tokens * model.vocab_size)
    passing = tokens * layer + logits
    return weights + passing + int(device.fragmentation * passing) + device.framework_bytes
