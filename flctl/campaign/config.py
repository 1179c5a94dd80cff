"""Owns flctl.toml: what it may say, and what is said where it is silent."""

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from flctl.campaign.privacy import check_privacy
from flctl.campaign.profiles import available
from flctl.campaign.workspace import Workspace
from flctl.errors import ConfigurationError
from flctl.facility.fields import Train
from flctl.facility.profile import Site, load_site, missing
from flctl.facility.ssh_config import effective
from flctl.facility.table import between, load_table, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignTable:
    name: str
    id: str
    seed: int = 0
    min_sites: Annotated[int, between(0)] = 0
    """Contributions a merge needs; 0: one of every planned site."""
    frozen: str = ""
    """The folder here of the frozen base, where the campaign's models are adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTable:
    name: Literal["sync"] = "sync"


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationTable:
    rule: str = "fedavg"
    weights: Literal["samples", "tokens", "equal"] = "samples"
    options: dict[str, Any] = field(default_factory=dict)
    """The rule's own options."""
    master: bool = False
    """Keep float32 weights at home beside a model of less precision."""
    aggregate_at: str = ""
    """The site that makes the merge; empty: here."""
    adapters: Literal["mean", "stack", "svd"] = "mean"
    """How LoRA adapters become one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatesTable:
    """What is done with an update that is unlike the others."""

    norm: Literal["off", "warn", "refuse"] = "warn"
    norm_limit: Annotated[float, between(0)] = 6.0
    """Median absolute deviations (but at least tenths of the median) from the median of the norms."""
    cosine: Literal["off", "warn", "refuse"] = "off"
    cosine_limit: Annotated[float, between(-1, 1)] = 0.0
    """The least cosine to the mean of the updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyTable:
    """Differential privacy at the server; off while `clip` is 0."""

    clip: Annotated[float, between(0)] = 0.0
    noise_multiplier: Annotated[float, between(0)] = 0.0
    delta: Annotated[float, between(0, 1)] = 1e-5
    epsilon: Annotated[float, between(0)] = 0.0
    """No merge that would spend more; 0: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetTable:
    max_node_hours: Annotated[float, between(0)] = 0.0
    """What the jobs of all sites may use together; 0: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryTable:
    attempts: Annotated[int, between(1, 100)] = 3
    """Tries of one run that flctl makes by itself, where another try may help: a lost node, a preemption, a time limit
    with a checkpoint to go on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTable:
    cross: bool = False
    """After each merge every site evaluates the new model and the other sites' contributions (models travel)."""
    patience: Annotated[int, between(0)] = 0
    """Versions in a row without a lower mean loss after which a plan ends; 0: none."""
    min_delta: Annotated[float, between(0)] = 0.0
    """By how much the mean loss must fall to count as lower."""
    roll_back: bool = False
    """A plan's last model is evaluated too, and the next one goes on from the best version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchTable:
    kinds: tuple[str, ...] = ("*.safetensors", "*.safetensors.index.json")
    """Patterns of the only file names that may come back from a site."""
    size_factor: float = 1.5
    """The most bytes one run may bring back, as a multiple of its base model's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """flctl.toml as a whole. [train] belongs to the trainer; flctl itself reads its `steps` and `command`."""

    campaign: CampaignTable
    policy: PolicyTable = field(default_factory=PolicyTable)
    aggregation: AggregationTable = field(default_factory=AggregationTable)
    train: Train = field(default_factory=dict)
    evaluation: EvaluationTable = field(default_factory=EvaluationTable)
    fetch: FetchTable = field(default_factory=FetchTable)
    gates: GatesTable = field(default_factory=GatesTable)
    privacy: PrivacyTable = field(default_factory=PrivacyTable)
    budget: BudgetTable = field(default_factory=BudgetTable)
    retry: RetryTable = field(default_factory=RetryTable)

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        steps = self.train.get("steps", 100)
        if type(steps) is not int or steps < 1:
            raise ConfigurationError(f"flctl.toml: train.steps must be a positive whole number, not {steps!r}")
        return steps


def load_configuration(workspace: Workspace) -> Configuration:
    path = workspace.root / "flctl.toml"
    configuration = load_table(path, Configuration)
    check_privacy(configuration, path)
    return configuration


def load_profile(workspace: Workspace, name: str) -> Site:
    """The profile of one of the campaign's sites, with what ~/.ssh/config adds to it."""
    path = workspace.profiles.get(name)
    if path is None:
        close = nearest(name, workspace.profiles)
        if name in available():
            hint = f"flctl site add {name}"
        else:
            hint = f"did you mean {close}?" if close else "flctl site list --available; flctl site add NAME"
        raise ConfigurationError(
            f"this campaign has no site {name!r}; it has: {', '.join(workspace.profiles) or 'none'}", hint=hint
        )
    return effective(load_site(path))


def whole_profile(workspace: Workspace, name: str) -> Site:
    """The same, and ConfigurationError if the user has not yet filled it in."""
    site = load_profile(workspace, name)
    if empty := missing(site):
        raise ConfigurationError(
            f"{workspace.profiles[name]} still lacks: {', '.join(empty)}",
            hint=f"fill them in; flctl site show {name} tells more",
            site=name,
        )
    return site


def new_id() -> str:
    """A campaign's id: 8 random hexadecimal digits; they keep two campaigns of one name apart at a site."""
    return secrets.token_hex(4)
