"""Everything that crosses a boundary: recipes, manifests, references, sampling parameters, serve specs.

All models are frozen, and an unknown field is an error. Sizes are bytes, lengths are tokens, times are seconds.
"""

from loray.spec.adapters import (
    AdapterBytes,
    AdapterManifest,
    AdapterRef,
    Evaluation,
    Projection,
    RopeParameters,
)
from loray.spec.common import (
    Alias,
    DType,
    Frozen,
    JobId,
    Method,
    Name,
    NumBytes,
    Sha256,
    parse_size,
)
from loray.spec.serving import (
    AutoscalingSpec,
    SamplingParams,
    ServeSpec,
)
from loray.spec.training import (
    ATTENTION_MODULES,
    LINEAR_MODULES,
    AdapterSpec,
    BatchSpec,
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LinearModule,
    LongContext,
    LongLoraSpec,
    LoraSpec,
    OptimizerSpec,
    PublishSpec,
    RopeScaling,
    TrainSpec,
    VeraSpec,
)

__all__ = [
    "ATTENTION_MODULES",
    "LINEAR_MODULES",
    "AdapterBytes",
    "AdapterManifest",
    "AdapterRef",
    "AdapterSpec",
    "Alias",
    "AutoscalingSpec",
    "BatchSpec",
    "CheckpointSpec",
    "DType",
    "DataSpec",
    "Evaluation",
    "EvaluationSpec",
    "Frozen",
    "JobId",
    "LinearModule",
    "LongContext",
    "LongLoraSpec",
    "LoraSpec",
    "Method",
    "Name",
    "NumBytes",
    "OptimizerSpec",
    "Projection",
    "PublishSpec",
    "RopeParameters",
    "RopeScaling",
    "SamplingParams",
    "ServeSpec",
    "Sha256",
    "TrainSpec",
    "VeraSpec",
    "parse_size",
]
