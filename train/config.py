"""What a training run is: frozen values from a TOML file or a preset, kept in every checkpoint."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from train.balancing import BalancingConfig
from train.data.config import LARGEST_SEED, DataConfig
from train.optimizer import OptimizerConfig
from train.settings import assign, build, plain
from zaya_jax.config import PRESETS, Rope, ZayaConfig
from zaya_jax.errors import ConfigError

Phase = Literal["pretrain", "midtrain", "sft"]
PRESET_FOLDER = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train, where no earlier weights say it."""

    preset: str = "nano"
    """A named architecture, or one of those with some sizes changed by the fields below."""
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    attention: Literal["cca", "gqa"] | None = None
    router: Literal["mlp", "linear"] | None = None
    residual_scaling: bool | None = None
    """As the preset has them, or plain ones to compare it with, see `ZayaConfig`."""
    init: Literal["normal", "fan_in"] = "normal"
    """Of new matrices: Normal(0, 0.02), as the authors' at their width, or with 1/sqrt(fan_in) in
    the layers, which narrow models need (their routers' scores would be equal)."""
    kernels: Literal["xla", "pallas"] | None = None
    """What computes the ops; by default what suits the machine."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer's forward pass keeps for its gradient: all, the results of products, or only its
    input."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices that are used."""

    data: int = 1
    expert: int = 1
    context: int = 1
    full_sharding: bool = False
    """Spread the parameters too, not only the optimizer's state; they are gathered layer by
    layer."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    milestone: int | None = None
    """Checkpoints of steps that divide by this are kept for ever."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity and bits per byte on data that is not trained on."""

    data: DataConfig | None = None
    """Held-out sources; None for no evaluation."""
    every: int = 100
    """Steps between evaluations; the last step is always followed by one."""
    examples: int | None = 1000
    """At most so many, drawn with the seed of these data; None for all."""


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """What happens to steps whose loss or gradient is no number, or whose loss jumps up."""

    spike_factor: float = 3.0
    """A step is skipped where its loss is so many times the running mean, and half a nat above; 0
    accepts any."""
    skips: int = 5
    """After more skipped steps in a row, the last checkpoint is restored; its data go on behind
    the skipped ones."""
    restores: int = 3
    """Where more would follow each other without a checkpoint between, the run ends with an
    error."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One phase of training."""

    phase: Phase
    """pretrain begins with new weights or goes on with some; midtrain and sft need some to start
    from; sft trains on chats."""
    data: DataConfig
    """Sources, their mixture, and how long examples are dealt with."""
    model: ModelConfig = ModelConfig()
    start_from: str | None = None
    """Weights to start from: a run (its newest checkpoint), one of its checkpoints, any folder that
    `zaya generate` loads, or a hub id. The optimizer starts anew."""
    tokenizer: str | None = None
    """Folder of a tokenizer; by default that of `start_from`, else nano's."""
    context: int = 4096
    """Tokens in a row."""
    rope_base: float | None = None
    """Theta of the rotary embedding of full-attention layers; by default that of the weights. The
    authors go from 1e4 (4K) to 1e6 (32K) to 5e6 (131K)."""
    rows: int = 8
    """Rows in a step, on all devices together."""
    accumulate: int = 1
    """A step's rows are taken in so many parts, whose gradients are summed."""
    steps: int = 1000
    seed: int = 0
    """Of new weights; `data.seed` is that of the order of data."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations; master weights and the optimizer's state are float32."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's normaliser."""
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    balancing: BalancingConfig = dataclasses.field(default_factory=BalancingConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    faults: FaultConfig = FaultConfig()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """What metrics are reported to beside metrics.jsonl."""
    log_every: int = 10
    """Steps between lines of metrics."""
    peak_tflops: float | None = None
    """Of one device, against which the utilisation is given: 1307 for bfloat16 on an MI300X."""

    def __post_init__(self) -> None:
        for name in ("context", "rows", "accumulate", "steps", "log_every"):
            _require(getattr(self, name) > 0, name, "must be positive", getattr(self, name))
        for name in ("data", "expert", "context"):
            size = getattr(self.mesh, name)
            _require(size > 0, f"mesh.{name}", "must be positive", size)
        shards = self.mesh.data * self.mesh.expert * self.accumulate
        _require(
            self.rows % shards == 0,
            "rows",
            f"must divide by mesh.data x mesh.expert x accumulate = {shards}",
            self.rows,
        )
        _require(
            self.context % self.mesh.context == 0,
            "context",
            f"must divide by mesh.context = {self.mesh.context}",
            self.context,
        )
        for name in ("every", "keep"):
            value = getattr(self.checkpoint, name)
            _require(value > 0, f"checkpoint.{name}", "must be positive", value)
        milestone = self.checkpoint.milestone
        _require(
            milestone is None or (milestone > 0 and milestone % self.checkpoint.every == 0),
            "checkpoint.milestone",
            f"must be a multiple of checkpoint.every = {self.checkpoint.every}",
            milestone,
        )
        every, examples = self.evaluation.every, self.evaluation.examples
        _require(every > 0, "evaluation.every", "must be positive", every)
        positive = examples is None or examples > 0
        _require(positive, "evaluation.examples", "must be positive", examples)
        for name in ("spike_factor", "skips", "restores"):
            value = getattr(self.faults, name)
            _require(value >= 0, f"faults.{name}", "must not be negative", value)
        spike = self.faults.spike_factor
        _require(spike == 0 or spike > 1, "faults.spike_factor", "must be 0 or above 1", spike)
        _require(self.z_loss >= 0, "z_loss", "must not be negative", self.z_loss)
        _require(
            self.phase == "pretrain" or self.start_from is not None,
            "start_from",
            f"must name the weights that {self.phase} starts from",
            None,
        )
        _require(
            0 <= self.seed <= LARGEST_SEED, "seed", f"must lie in 0 .. {LARGEST_SEED}", self.seed
        )
        peak = self.peak_tflops
        _require(peak is None or peak > 0, "peak_tflops", "must be positive", peak)
        chats = all(source.format != "text" for source in self.data.sources)
        _require(
            self.phase != "sft" or chats, "data.sources", "of sft must be chats", "another format"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context


def load_config(phase: Phase, name: str | None, assignments: Sequence[str] = ()) -> TrainConfig:
    """A phase's configuration from a TOML file or the name of a preset, with some values replaced.

    Raises:
      ConfigError: no such file or preset, not TOML, another phase, or a key or value that cannot
        be.
    """
    values = {} if name is None else _read(name)
    if (found := values.get("phase", phase)) != phase:
        raise ConfigError(f"{name} configures {found}, not {phase}")
    values["phase"] = phase
    for assignment in assignments:
        assign(values, assignment)
    return build(TrainConfig, values)


def presets() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(file.stem for file in PRESET_FOLDER.glob("*.toml"))


def to_json(config: TrainConfig) -> dict[str, Any]:
    """What `from_json` reads back."""
    return plain(config)


def from_json(values: Any) -> TrainConfig:
    """Raises ConfigError as `load_config` does."""
    return build(TrainConfig, values)


def new_model(config: TrainConfig) -> ZayaConfig:
    """The architecture of new weights. Raises ConfigError where `model` is none."""
    model = config.model
    sizes = ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts", "head_dim")
    parts = ("attention", "router", "residual_scaling")
    given = {name: getattr(model, name) for name in (*sizes, "vocab_size", *parts)}
    changed = {name: value for name, value in given.items() if value is not None}
    if model.preset not in PRESETS:
        raise ConfigError(f"model.preset {model.preset!r}: one of {', '.join(PRESETS)}")
    base = PRESETS[model.preset]
    if "num_hidden_layers" in changed and base.get("layer_types"):
        raise ConfigError(f"model.num_hidden_layers: the layers of {model.preset} differ")
    return ZayaConfig(**{**base, **changed})


def for_run(config: TrainConfig, architecture: ZayaConfig) -> ZayaConfig:
    """The architecture as this run computes it: its context, rotary base, kernels and remat."""
    rope = architecture.rope
    if config.rope_base is not None:
        rope = Rope(config.rope_base, rope.partial_rotary_factor)
    return dataclasses.replace(
        architecture,
        rope=rope,
        max_position_embeddings=max(config.context, architecture.max_position_embeddings),
        kernels=config.model.kernels,
        remat=config.model.remat,
    )


def _read(name: str) -> dict[str, Any]:
    file = Path(name)
    if not file.suffix and not file.is_file():  # a run's folder may have a preset's name
        file = PRESET_FOLDER / f"{name}.toml"
        if not file.exists():
            raise ConfigError(f"no file and no preset {name!r}: presets are {', '.join(presets())}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


def _require(condition: bool, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"{name} {rule}, got {value!r}")
