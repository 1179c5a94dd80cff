"""Faults on purpose: kills, cuts, power cuts, hostile senders, simulated days, and an independent look at the outcome.

Each row of docs/reliability.md is a module with `run(*, seed, trials) -> Result`; see `python -m tests.chaos`.
"""
