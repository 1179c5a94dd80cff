"""flctl: scripted cross-facility federated learning over SSH, rsync and batch queues."""

__version__ = "0.1.0"
