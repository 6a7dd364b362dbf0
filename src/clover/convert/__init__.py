"""Checkpoints between CLOVER, LAVIS and transformers, tensor by tensor."""
