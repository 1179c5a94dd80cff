"""Averages checkpoints with Flower's FedAvg strategy; runs in that library's own environment.

Its arrays are float32 (numpy has no bf16), and all of them are in memory at once, as the strategy wants them. Whatever
is not needed any longer is freed at once, for the peak is near the memory of a small machine."""

import argparse
import shutil
from pathlib import Path

import torch
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays  # type: ignore[import-not-found]
from flwr.server.strategy import FedAvg  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save_file


def names_in(folder: Path) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            names += source.keys()
    return sorted(names)


def result_of(folder: Path, weight: int) -> FitRes:
    """What a client would have sent: its arrays in the order of their names."""
    arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118  safe_open is no mapping
                arrays[name] = source.get_tensor(name).float().numpy()
    parameters = ndarrays_to_parameters([arrays.pop(name) for name in sorted(arrays)])
    return FitRes(status=Status(Code.OK, ""), parameters=parameters, num_examples=weight, metrics={})


def average(folders: list[Path], weights: list[int]) -> Parameters:
    results = [(None, result_of(folder, weight)) for folder, weight in zip(folders, weights, strict=True)]
    parameters, _ = FedAvg().aggregate_fit(1, results, [])
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--weights", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.folders:
        return
    parameters = average(options.folders, [int(weight) for weight in options.weights.split(",")])
    arrays = parameters_to_ndarrays(parameters)
    del parameters
    arrays.reverse()
    state = {name: torch.from_numpy(arrays.pop()).bfloat16() for name in names_in(options.folders[0])}
    options.out.mkdir()
    save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(options.folders[0] / "config.json", options.out)


if __name__ == "__main__":
    main()
