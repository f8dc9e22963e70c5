"""`mmfuse chaos`: known faults, made on purpose in runs of a config, with what should happen and what did.

Processes are killed, checkpoints and shards are damaged on disk, and what goes wrong inside of a run (reads that fail
or hang, damaged samples, weights that are no numbers) is brought in by callbacks, see `injected`.
"""
