"""Tensor parallelism: one model over several ranks. Rank 0 holds the engine and decides; the others follow.

    shard         which part of every matrix is a rank's
    rows          a packed adapter cut into the ranks' parts
    communicator  collectives, and how many bytes they send
    linear        linear modules whose matrix, LoRA and VeRA are spread over the ranks
    decoder       one rank's part of the model
    pool          one allocator's answers, repeated by every rank's pool
    channel       what rank 0 tells the others, and how it reaches them
    wire          messages as bytes
    workers       starting the other ranks and seeing that they live
    driver        rank 0's side
    worker        the others' side

An engine of one rank uses none of it.
"""
