"""Averages checkpoints with APPFL's FedAvgAggregator; runs in that library's own environment."""

import argparse
import shutil
from pathlib import Path

import torch
from appfl.algorithm.aggregator import FedAvgAggregator  # type: ignore[import-not-found]
from omegaconf import DictConfig  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def average(folders: list[Path], weights: list[int]) -> dict[str, torch.Tensor]:
    aggregator = FedAvgAggregator(aggregator_configs=DictConfig({"client_weights_mode": "sample_size"}))
    states = {}
    for number, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        states[f"site-{number}"] = state_of(folder)
        aggregator.set_client_sample_size(f"site-{number}", weight)
    averaged: dict[str, torch.Tensor] = aggregator.aggregate(states)
    return averaged


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--weights", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.folders:
        return
    state = average(options.folders, [int(weight) for weight in options.weights.split(",")])
    options.out.mkdir()
    save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(options.folders[0] / "config.json", options.out)


if __name__ == "__main__":
    main()
