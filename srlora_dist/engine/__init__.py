"""The process, and the engine that it really runs on: DDP, DeepSpeed or FSDP2."""
