"""A search space as data: the YAML file, checked whole before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One number that the search makes better."""

    metric: str
    """A metric that the workload reports."""
    mode: Literal["max", "min"]
    """Whether more or less is better."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One dimension of the search, in Optuna's words."""

    name: str
    """Dotted name of a value in the workload's Config."""
    type: Literal["float", "int", "categorical"]
    """What Optuna suggests."""
    low: float | None = None
    """Smallest value, for float and int."""
    high: float | None = None
    """Largest value, itself included."""
    log: bool = False
    """Search on a logarithmic scale."""
    step: float | None = None
    """Distance between neighbours; not together with log."""
    choices: tuple[Any, ...] = ()
    """The values of a categorical."""
    probabilities: tuple[float, ...] = ()
    """Of each choice, 1 in all; for the sampler random. Without them all choices are alike."""
    when: Mapping[str, Any] = field(default_factory=dict)
    """The parameter exists only where these other parameters have one of these values."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Values of the workload's Config for one training."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """By their dotted names, such as train.epochs: 20."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A trained network that every trial starts from, pinned in the study's folder. One of the three, or none."""

    checkpoint: str | None = None
    """Checkpoint, model or run folder."""
    study: str | None = None
    """Folder of another study: its best promoted trial."""
    train: Training = field(default_factory=Training)
    """Train one first, once, with the fixed values and these."""
    scan: bool = True
    """Look first how far it can be pruned, one value at a time and without training, and begin the search with that."""

    @property
    def wanted(self) -> bool:
        """Whether there is one."""
        return self.checkpoint is not None or self.study is not None or bool(self.train.values)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How values are chosen, and when the search ends."""

    sampler: Literal["auto", "tpe", "gp", "cmaes", "nsga2", "qmc", "random", "grid"] = "auto"
    """Which of Optuna's samplers asks; auto says what it chose and why."""
    trials: int = 32
    """Trials in all; raise it and run the same command to go on."""
    seed: int = 0
    """Seed of the sampler and of every trial."""
    wall_time_s: float | None = None
    """Start no trial after this many seconds, all runs of the study added up."""
    slot_hours: float | None = None
    """Start no trial after this many hours of slots in use, all runs of the study added up."""
    target: float | None = None
    """Start no trial once the first objective of any has reached this value, at whatever epoch."""
    storage: str | None = None
    """Where the record is kept: postgresql://USER@HOST/DATABASE; null: $TUNE_STORAGE, or a journal in the folder."""


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Which trials end early."""

    rule: Literal["asha", "median", "none"] = "asha"
    """asha: the best 1/reduction go on at each rung. median: below the median of the others at the same epoch."""
    min_epochs: int = 1
    """No trial ends before this epoch; the first rung of asha."""
    reduction: int = 3
    """asha: each rung is this many times the one before, and one in this many goes on."""
    brackets: int = 1
    """asha: trials are dealt over this many ladders, each with a first rung that many times later."""
    min_trials: int = 5
    """median: trials that must have reached the epoch before anyone is stopped there."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial gets."""

    slots: int | Literal["auto"] = "auto"
    """Trials at the same time; auto: as many as the machine or cluster has room for."""
    workers: int = 1
    """Processes that train one trial together."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker; its PyTorch uses as many threads."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of each worker; fractions share one. auto: one where there are any."""
    strategy: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """How a trial's workers train together. auto: ddp where there are several, unless the Config says otherwise."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed: what the workers share. 1: optimiser state. 2: gradients too. 3: weights too. 0: nothing."""
    max_attempts: int = 3
    """How often a trial is started in all when its process dies."""
    hung_after_s: float | Literal["auto"] = "auto"
    """A trial whose epoch takes longer has failed, and its processes are replaced. auto: ten times its longest epoch so
    far and at least half an hour; six hours for its first."""
    queue: str = "default"
    """On a cluster with several searches: the queue whose share of it this one has a part of."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """Which trials go on to evaluation."""

    rule: Literal["top_k", "pareto"] = "top_k"
    """top_k: the best by the first objective. pareto: all that no other trial beats in every objective."""
    k: int = 3
    """How many, at the most."""
    epochs: int | None = None
    """Train the promoted again for this many epochs; null: evaluate the search's own checkpoint."""
    seeds: int = 1
    """Train the promoted again with this many seeds, where more than one."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the promoted are evaluated, on the test split that nothing else opens."""

    metric: str | None = None
    """The evaluation's headline metric; null: the name of the first objective without a leading `val_`."""
    cpus: float = 1.0
    """CPUs of one evaluation job."""
    gpus: float | Literal["auto"] = "auto"
    """GPUs of one evaluation job. auto: one where there are any."""
    run_as: Literal["tasks", "jobs"] = "tasks"
    """jobs: each evaluation is a Ray job of its own, submitted once, on a cluster with a dashboard."""
    keep_checkpoints: int = 5
    """Checkpoints of this many best trials stay on disk, besides the promoted."""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """TensorBoard, and optional loggers that receive every finished trial."""

    tensorboard: bool = True
    """Write TensorBoard events while trials run."""
    mlflow: str | None = None
    """MLflow tracking URI, such as file:./mlruns."""
    wandb: Literal["offline", "online"] | None = None
    """Weights & Biases mode."""
    project: str | None = None
    """Project or experiment name; null: the study's name."""
    entity: str | None = None
    """Weights & Biases team or user that the project belongs to; null: the account's own."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """A whole search: the file's content, checked."""

    name: str
    workload: str
    objectives: tuple[Objective, ...]
    parameters: tuple[Parameter, ...]
    constraints: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of the workload's Config under dotted names, `data` included."""
    parent: Parent = field(default_factory=Parent)
    search: Search = field(default_factory=Search)
    stopping: Stopping = field(default_factory=Stopping)
    resources: Resources = field(default_factory=Resources)
    promotion: Promotion = field(default_factory=Promotion)
    evaluation: Evaluation = field(default_factory=Evaluation)
    tracking: Tracking = field(default_factory=Tracking)
