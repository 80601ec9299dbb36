"""The S-LoRA engine: one paged pool for KV cache and adapters, one heterogeneous batch in each step.

    memory/       which block of the pool holds what; where each adapter is: store, host, pool; the prefix cache; limits
    scheduling/   which requests run in the next step
    pool/         adapters as rows: packed in host memory, placed in the pool, loaded, as files
    model/        a step's batch and the decoder
    sampling/     from logits to tokens
    parallel/     one model over several ranks
    build         an engine from a base model
    engine        the step, and which requests are accepted
    runner        launches steps and reads their results
    async_engine  the engine's threads, for asyncio
    metrics       counters, histograms and the figures that are reported
    request       one request inside the engine

memory, scheduling, metrics and request do not import torch. Nothing is imported here, so that they can be used without
it.
"""
