"""Owns the division of a dataset into the private parts of clients, for experiments on one dataset."""
