"""The libraries that flctl is compared with: how each is installed and called, in the way its own users do."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One average to be made. `scratch` is a folder for a rival's own configuration."""

    contributions: tuple[Path, ...]
    weights: tuple[int, ...]
    output: Path
    scratch: Path

    @property
    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """`packages` are installed with their dependencies, `alone` after them without; the first named is the rival.
    `command` and `imports` get the environment's folder of programs."""

    name: str
    distribution: str
    packages: tuple[str, ...]
    command: Callable[[Path, Job], list[str]]
    imports: Callable[[Path], list[str]]
    alone: tuple[str, ...] = ()
    note: str = ""


def _mergekit(programs: Path, job: Job) -> list[str]:
    """JSON is YAML too. Missing tokenizers would only make it warn."""
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(job.contributions, job.weights, strict=True)
    ]
    config = {"merge_method": "linear", "models": models, "parameters": {"normalize": True}, "dtype": "bfloat16"}
    file = job.scratch / "mergekit.yaml"
    file.write_text(json.dumps(config, indent=1))
    return [str(programs / "mergekit-yaml"), str(file), str(job.output), "--no-copy-tokenizer"]


def _mergekit_imports(programs: Path) -> list[str]:
    return [str(programs / "python"), "-c", "import mergekit.scripts.run_yaml"]


def _script(name: str) -> Callable[[Path, Job], list[str]]:
    def command(programs: Path, job: Job) -> list[str]:
        weights = ",".join(map(str, job.weights))
        folders = [str(folder) for folder in job.contributions]
        return [*_start(programs, name), "--weights", weights, "--out", str(job.output), *folders]

    return command


def _script_imports(name: str) -> Callable[[Path], list[str]]:
    """The script imports at its top and does nothing without a model folder."""
    return lambda programs: _start(programs, name)


def _start(programs: Path, name: str) -> list[str]:
    return [str(programs / "python"), str(HERE / f"{name}.py")]


RIVALS = (
    Rival(
        name="mergekit",
        distribution="mergekit",
        packages=("mergekit==0.1.5",),
        command=_mergekit,
        imports=_mergekit_imports,
        note="the linear method of mergekit-yaml, dtype bfloat16",
    ),
    Rival(
        name="APPFL",
        distribution="appfl",
        packages=("numpy", "safetensors", "omegaconf", "opacus==1.6.0", "packaging", "pyyaml"),
        alone=("appfl==1.12.0",),
        command=_script("with_appfl"),
        imports=_script_imports("with_appfl"),
        note="FedAvgAggregator, client_weights_mode sample_size; installed with --no-deps and only what the aggregator "
        "imports, since its dependencies (ray, wandb, piq and torchvision) have nothing to do with it",
    ),
    Rival(
        name="Flower",
        distribution="flwr",
        packages=("flwr==1.41.0", "safetensors"),
        command=_script("with_flower"),
        imports=_script_imports("with_flower"),
        note="FedAvg.aggregate_fit on float32 arrays, since numpy has no bf16; written as bf16 again",
    ),
)
