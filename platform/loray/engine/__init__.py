"""The S-LoRA engine: one paged pool for KV cache and adapters, one heterogeneous batch in each step.

    memory/      which block of the pool holds what; the prefix cache; limits
    residency/   where each adapter is: store, host, pool
    scheduling/  which requests run in the next step
    stats/       counters, histograms and the figures that are reported
    pool/        adapters as rows: packed in host memory, placed in the pool, loaded, as files
    model/       a step's batch and the decoder
    sampling/    from logits to tokens
    parallel/    one model over several ranks
    build        an engine from a base model
    engine       the step
    runner       launches steps and reads their results
    stream       the engine's thread, for asyncio
    admission    which requests are accepted
    report       the figures at one moment
    request      one request inside the engine

memory, residency, scheduling, stats and request do not import torch. Nothing is imported here, so that
they can be used without it.
"""
