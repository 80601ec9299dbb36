"""Tensor parallelism: one model over several ranks. Rank 0 has the engine and decides; the other ranks follow.

    shard         which part of every matrix and of an adapter a rank has
    communicator  collectives, and steps as bytes
    transport     where ranks find each other, and all other values as bytes
    decoder       one rank's part of the model: linear modules whose matrix, LoRA and VeRA are spread over the ranks
    pool          rank 0's allocator decides, and every rank's pool follows; commands from rank 0 to the other ranks
    driver        rank 0's side
    worker        the other ranks' side, and how they are started

An engine of one rank uses none of it.
"""
