"""The typed, frozen configuration of a run. This file is the reference of all keys.

Every field says its type, bound and default, and the string under it is what ``--help`` prints.
What must hold between sections is checked by ``Config``. Nothing here needs torch, so a mistake is
answered before anything heavy is imported.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

DEFAULT_LOCAL_STEPS = 10


# Keys of a DeepSpeed section that would silently do nothing here (the engine has no optimizer),
# and the key of ours that does what they ask for.
DEAD_DEEPSPEED_KEYS = {
    "optimizer": "train.optimizer, train.lr and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_rounds",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "activation_checkpointing": "backbone.gradient_checkpointing",
}


def _number(value: Any) -> Any:
    """Read "1/2" or "-1/2" as a number; leave everything else to pydantic."""
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ZeroDivisionError, OverflowError):
            raise ValueError(f"{value!r} is no finite number") from None
    return value


Exponent = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no coercion, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """The frozen backbone."""

    name: str = "demo"
    """Hub id or folder of the language model or encoder; demo = a small one made on the spot, which
    data.task=demo takes where none is named."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the backbone; auto = bf16 on GPUs, fp32 on CPUs. Adapters stay in fp32."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation of transformers."""


class DataSection(Section):
    """What is learned."""

    task: Literal["demo", "gsm8k", "alpaca", "glue", "jsonl"] = "demo"
    """Form of the examples; jsonl takes prompt/completion, instruction/input/output or text."""
    name: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] | None = None
    """Which task of GLUE: each client then trains a classification head beside its adapter."""
    train_files: tuple[str, ...] | str | None = None
    """Local .jsonl or .json files instead of the hub; {client} in a name = one file per client."""
    eval_files: tuple[str, ...] | str | None = None
    """Local held-out files; null = the task's own held-out split, or data.eval_fraction."""
    max_tokens: PositiveInt = 512
    """Longest sequence in tokens; what is longer is cut at the end."""
    packing: bool = True
    """Lay several short sequences of a client into one row, as documents that do not see each
    other, where that is cheaper; false = a row each, padded. Classification and dropout pad."""
    max_train_examples: PositiveInt | None = None
    """Use a random subset of this many training examples (drawn once from the seed)."""
    max_eval_examples: PositiveInt | None = None
    """Use a random subset of this many held-out examples (drawn once from the seed)."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of each client's own examples that is held out where there are no held-out files."""


class PartitionSection(Section):
    """Which client holds which example."""

    kind: Literal["iid", "dirichlet", "by_key", "by_file"] = "iid"
    """iid; dirichlet (label skew); by_key (one value of a column each); by_file."""
    concentration: PositiveFloat = 0.5
    """Dirichlet concentration: small = skewed, large = even."""
    key: str | None = None
    """Column for by_key and for dirichlet; dirichlet without one splits by the class of an
    example where it has one, else by length quantile. Values keep their types: 1 is not "1"."""


class LoraSection(Section):
    """The adapters."""

    rank: PositiveInt = 8
    """LoRA rank r."""
    alpha: float | None = Field(default=None, gt=0, le=1e9)
    """LoRA alpha as the method's own formula takes it; null = the method's usual value."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the adapters; masks depend on (seed, round, client, step) only."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Names of the adapted layers, such as [q_proj, v_proj], or all-linear."""
    init: Literal["auto", "independent", "shared"] = "auto"
    """Start of A: one draw per client and a mean over all before the first step, or one draw."""
    scaling: Literal["auto", "lora", "rslora", "sfed"] | tuple[Exponent, Exponent] = "auto"
    """gamma: alpha/r, alpha/sqrt(r), alpha*sqrt(N/r), or [exponent of N, exponent of r]."""
    allow_unstable: bool = False
    """Permit a gamma that grows with N together with lora.init=shared."""


class FederatedSection(Section):
    """The federation."""

    method: Literal["sfed", "fedsa", "fedsa-rslora", "rolora", "ffa", "fedit", "local"] = "sfed"
    """Which factors train, which are averaged, which gamma (sfed.methods)."""
    averaged: Literal["auto"] | tuple[Literal["A", "B"], ...] = "auto"
    """Factors that are averaged after each round, for ablations: [A], [B], [A, B] or []."""
    num_clients: PositiveInt | None = None
    """N; null = one client per process."""
    num_rounds: PositiveInt = 10
    """Rounds of the whole run."""
    share_head: bool = False
    """Average the classification heads too; false = each stays with its client."""
    clients_per_round: PositiveInt | None = None
    """Clients that train in a round, drawn from (seed, round); null = all."""
    clients_per_pass: PositiveInt | Literal["auto"] | None = "auto"  # noqa: S105  (no password)
    """Clients of a process that share one forward and backward pass; auto = as many as fit into
    memory; null = all of them."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Weights of the mean over clients."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """What becomes of the optimizer's moments at the end of a round."""
    max_bad_rounds: NonNegativeInt = 3
    """Rounds in which some client may turn non-finite (and be left out) before the run stops."""
    deadline_seconds: float = Field(default=600.0, gt=0, le=1e7)
    """Longest wait for another process before the run stops and names who is missing."""


class TrainSection(Section):
    """A client's own training."""

    local_steps: PositiveInt | None = None
    """Optimizer steps of a client in a round; null with local_epochs null = 10."""
    local_epochs: PositiveInt | None = None
    """Passes over a client's own data in a round, instead of local_steps."""
    batch_size: PositiveInt = 8
    """Sequences per client and optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per client and pass; null = train.batch_size. Gradients add up token-exactly."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the adapters, kept per client."""
    lr: PositiveFloat = 3e-4
    """Learning rate of A (and of B where loraplus_ratio is 1)."""
    loraplus_ratio: PositiveFloat = 1.0
    """LoRA+: learning rate of B over learning rate of A."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip each client's own gradient to this norm; null = never."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate over the whole run, not over a round."""
    warmup_rounds: NonNegativeFloat = 0.0
    """Linear warm-up over this many rounds."""


class BackboneSection(Section):
    """How the frozen backbone is stored."""

    sharding: Literal["auto", "zero3", "none"] = "auto"
    """zero3 = stored once over all processes; none = a replica each; auto = none where it fits."""
    offload: Literal["none", "cpu"] = "none"
    """Keep the shards in host memory (zero3 only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you trust its author."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys, e.g. {zero_optimization: {stage3_max_live_parameters: 1e8}}."""

    @model_validator(mode="after")
    def _refuse_dead_keys(self) -> BackboneSection:
        for key in self.deepspeed:
            if key in DEAD_DEEPSPEED_KEYS:
                raise ValueError(
                    f"deepspeed.{key} has no effect here, because DeepSpeed only stores the frozen "
                    f"backbone; use {DEAD_DEEPSPEED_KEYS[key]} instead"
                )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(  # noqa: TRY004  (pydantic collects ValueErrors)
                f"deepspeed.zero_optimization is a mapping of keys, not {zero!r}"
            )
        if zero.get("stage", 3) != 3:
            raise ValueError(
                f"deepspeed.zero_optimization.stage is {zero['stage']!r}; a frozen backbone has "
                "nothing to shard below stage 3: use sharding=none for a replica per process"
            )
        if self.offload == "cpu" and self.sharding == "none":
            raise ValueError("offload=cpu needs sharding=zero3 (none keeps a replica per process)")
        return self


class EvaluationSection(Section):
    """Held-out evaluation."""

    every_rounds: PositiveInt = 1
    """Evaluate before the first round, after every this many rounds, and at the end."""
    adapters: tuple[Literal["personal", "global"], ...] = ("personal", "global")
    """personal = each client's adapter on its own data; global = (A, mean B) on all data."""
    generate: bool = False
    """Let the adapters write answers, greedily: exact match for gsm8k, samples for the report."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""
    max_examples: PositiveInt | None = None
    """At most this many held-out examples of each client (drawn once from the seed)."""
    batch_size: PositiveInt = 16
    """Sequences per client and pass."""


class OutputSection(Section):
    """What is written where."""

    dir: str = Field(default="runs", min_length=1)
    """Folder of the run folders."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder; null = TASK-METHOD, e.g. gsm8k-sfed."""
    checkpoint_every_rounds: PositiveInt = 1
    """Write a checkpoint after every this many rounds (and at the end)."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept; 2 or more hold two files of each client."""
    resume: str = "auto"
    """auto = go on from the newest whole checkpoint; never = begin anew; or a checkpoint folder."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the curves go beside metrics.jsonl: [tensorboard, wandb]; each is an extra of sfed."""


class Config(Section):
    """One run."""

    seed: NonNegativeInt = 0
    """All randomness is a function of (seed, round, client)."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    lora: LoraSection = LoraSection()
    federated: FederatedSection = FederatedSection()
    train: TrainSection = TrainSection()
    backbone: BackboneSection = BackboneSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _check_numbers(self) -> Config:
        federated, train = self.federated, self.train
        if train.local_steps is not None and train.local_epochs is not None:
            raise ValueError(
                f"train.local_steps={train.local_steps} and train.local_epochs="
                f"{train.local_epochs} exclude each other; set one of them to null"
            )
        if (train.micro_batch_size or 1) > train.batch_size:
            raise ValueError(
                f"train.micro_batch_size={train.micro_batch_size} is more than "
                f"train.batch_size={train.batch_size}"
            )
        if (federated.clients_per_round or 1) > (federated.num_clients or math.inf):
            raise ValueError(
                f"federated.clients_per_round={federated.clients_per_round} is more than "
                f"federated.num_clients={federated.num_clients}"
            )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Config:
        if (self.data.task == "glue") != (self.data.name is not None):
            raise ValueError(
                f"data.task={self.data.task} with data.name={self.data.name}: data.task=glue needs "
                "data.name, such as sst2, and no other task has one"
            )
        if self.federated.share_head and self.data.task != "glue":
            raise ValueError("federated.share_head=true needs data.task=glue: others have no head")
        if self.evaluation.generate and self.data.task == "glue":
            raise ValueError(
                "evaluation.generate=true: a classifier (data.task=glue) writes no text"
            )
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Config:
        kind, files = self.partition.kind, self.files("train")
        per_client = [name for name in files if "{client}" in name]
        if kind == "by_key" and self.partition.key is None:
            raise ValueError("partition.kind=by_key needs partition.key, the name of a column")
        if kind == "by_file" and not (per_client or len(files) > 1):
            raise ValueError(
                "partition.kind=by_file needs data.train_files with {client} in the name, "
                "such as data/{client}.jsonl, or a list with one file per client"
            )
        patterns = [n for n in (*files, *self.files("eval")) if "{client}" in n]
        if kind != "by_file" and patterns:
            raise ValueError(
                f"{{client}} in {patterns[0]!r} (data.train_files, data.eval_files) needs "
                "partition.kind=by_file"
            )
        if self.data.task == "jsonl" and not files:
            raise ValueError("data.task=jsonl needs data.train_files")
        if self.data.task == "demo" and files:
            raise ValueError("data.task=demo makes its own data; set data.task=jsonl for files")
        return self

    def files(self, split: Literal["train", "eval"]) -> tuple[str, ...]:
        """The local files of a split as a tuple, whatever form they were given in."""
        files = self.data.train_files if split == "train" else self.data.eval_files
        if files is None:
            return ()
        return (files,) if isinstance(files, str) else files

    @property
    def run_name(self) -> str:
        """Name of the run folder below ``output.dir``."""
        return self.output.name or f"{self.data.name or self.data.task}-{self.federated.method}"


# Keys without a default for whoever writes a configuration, and what to do about them. The schema
# has values for them, so that a part of a configuration can be made and checked by itself.
REQUIRED = {
    "model.name": "set model.name, or data.task=demo",
    "data.task": "set data.task",
}

# What `python -m sfed.train` without arguments runs, and what keys with data.task=demo stand on:
# eight clients, each with its own kind of problem and its own way of writing the answer. The same
# eight on any number of processes. configs/demo.yaml holds the same for a person to copy.
DEMO: dict[str, Any] = {
    "model": {"name": "demo"},
    "data": {"task": "demo", "max_tokens": 128},
    "partition": {"kind": "by_key", "key": "kind"},
    "lora": {"rank": 8},
    "federated": {"method": "sfed", "num_clients": 8, "num_rounds": 5},
    "train": {"local_steps": 10, "batch_size": 8, "lr": 3e-3},
    "evaluation": {"every_rounds": 1, "max_examples": 32},
    "output": {"name": "demo"},
}
