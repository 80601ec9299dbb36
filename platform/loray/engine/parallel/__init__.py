"""Tensor parallelism: one model over several ranks. Rank 0 has the engine and decides; the other ranks follow.

    shard         which part of every matrix a rank has
    rows          a packed adapter cut into the ranks' parts
    communicator  collectives
    linear        linear modules whose matrix, LoRA and VeRA are spread over the ranks
    decoder       one rank's part of the model
    pool          rank 0's allocator decides, and every rank's pool follows
    channel       commands from rank 0 to the other ranks
    wire          steps as bytes
    transport     where ranks find each other, and all other values as bytes
    workers       starts the other ranks and checks that they live
    driver        rank 0's side
    worker        the other ranks' side

An engine of one rank uses none of it.
"""
