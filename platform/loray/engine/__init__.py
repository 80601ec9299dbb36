"""The S-LoRA engine: one paged pool for KV cache and adapters, one heterogeneous batch a step.

Policy (request, blocks, rows, residency, scheduler) is plain Python; pool, batch, layers, model, logits, logprobs,
sampler, engine and stream use torch. Nothing is imported here, so that policy stays free of it.
"""
