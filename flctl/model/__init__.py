"""Checkpoints as data: where their tensors lie, whether they may be averaged, and the streaming average."""
