"""Every knob of a run: typed dataclasses with units, defaults and checks that need no torch.

Hydra composes YAML into these classes (``OmegaConf.structured``); ``validate`` then checks what types alone
cannot. What needs files or the model's own configuration (layers, vocabulary, heads) is checked by ``preflight.py``,
still before any process is started. Enum members are lower case because OmegaConf matches them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from moba_train.config.launch import Device, LaunchConfig, LaunchKind, SlurmConfig  # noqa: F401
from moba_train.config.train import (  # noqa: F401
    FusedKernels,
    OffloadConfig,
    OffloadDevice,
    OptimizerConfig,
    Precision,
    TrainConfig,
)


class AttentionKind(Enum):
    """What a layer attends to: every earlier token, or the blocks its gate chooses."""

    full = "full"
    moba = "moba"


class SourceFormat(Enum):
    """How the documents of a source are stored. ``hub`` is a dataset on the Hugging Face hub, ``mds`` MosaicML
    streaming's shards, ``repository`` a folder with a code repository in each of its folders or archives (.tar.gz,
    .zip, …), one document each."""

    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"
    mds = "mds"
    repository = "repository"


class FileOrder(Enum):
    """Of the files of a repository: by their paths, or each after those it imports (imports.py)."""

    path = "path"
    imports = "imports"


class Resume(Enum):
    """``never``: the run directory must be new. ``auto``: go on from the newest checkpoint, or start if none.
    ``must``: go on, and fail if there is nothing to go on from."""

    never = "never"
    auto = "auto"
    must = "must"


class WandbMode(Enum):
    """``auto`` is online where WANDB_API_KEY is set and offline elsewhere."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class RunConfig:
    """Where a run lives. ``dir/name`` is its directory; a given name is stable, so that ``resume`` can find it."""

    name: str | None = None  # None: the recipe's name and the time of the start
    dir: str = "runs"
    seed: int = 0  # model initialisation, dropout, row order
    resume: Resume = Resume.never
    label: str = "run"  # the recipe's name: titles, legends and default run names


@dataclass
class ModelConfig:
    """A Hugging Face causal LM: a folder or hub name to load, or a configuration to start from at random."""

    name: str = "model"
    path: str | None = None  # folder or hub name; None builds `architecture` with random weights
    gguf_file: str | None = None  # a GGUF file inside `path`
    # HF config keywords, `model_type` among them. Beside a path: the sizes that `plan` takes without its files.
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # tokenizer.json, or a folder or hub name; None: `path`'s own


@dataclass
class AttentionConfig:
    """The attention plan every stage starts from; a stage may override each field."""

    kind: AttentionKind = AttentionKind.moba
    block_size: int = 512  # tokens
    top_k: int = 3  # blocks a query reads, its own included
    full_layers: int = 0  # the last N layers use full attention
    backend: str = "auto"
    # Tokens of the causal convolution on every layer's keys, 3 or 5; 0: none but the model's own. It helps the gate
    # find the right blocks (FlashMoBA, arXiv 2511.11571), adds parameters that start at 0, and makes an export that
    # loads with this package only.
    key_conv: int = 0


@dataclass
class SourceConfig:
    """One source of documents. ``path`` is a file, folder or glob; for ``hub`` the dataset's name, with @revision to
    pin it, or hf://datasets/OWNER/NAME/FILES, a glob of its JSONL or Parquet files."""

    name: str = "source"
    format: SourceFormat = SourceFormat.text
    path: str = ""
    subset: str | None = None  # a hub dataset's configuration name
    split: str = "train"  # a hub dataset's split
    text_field: str = "text"
    encoding: str = "utf-8"  # of text files
    group_field: str | None = None  # records that follow each other with the same value here become one document
    files_field: str | None = None  # a list of the files of a repository: text_field and path_field are each one's
    path_field: str = "path"  # of the records of a group, or of such files: what stands in their headers
    file_header: str = "==> {path} <==\n"  # above each of them, and each file of a repository
    file_suffixes: list[str] = field(default_factory=list)  # of a repository's files that are read; empty: all text
    file_order: FileOrder = FileOrder.path  # of a repository's files, and of the records of a group
    token_field: str | None = None  # in place of text_field: token ids, stored as they are, no end-of-text token added
    tokenizer: str | None = None  # that made them; refused where the model's gives other ids
    span_field: str | None = None  # of mds: [start, end) of each document among a record's tokens
    max_tokens: int | None = None  # the rest of the source is not read


@dataclass
class MixConfig:
    """Which rows a stage draws. All unset: every document once an epoch, in the sources' natural proportions."""

    weights: dict[str, float] = field(default_factory=dict)  # source name: its share of tokens; unnamed: not drawn
    # {N: w}: a token of a document of N tokens or more (of the largest such N) is drawn w times as often as others of
    # its source; where no source has a weight, as all others.
    length_weights: dict[int, float] = field(default_factory=dict)
    min_length: int = 1  # tokens; shorter documents are not drawn
    full_rows: float | None = None  # share of rows that are one full-length segment; 1: no packed rows
    most_padding: float = 0.01  # pad tokens over all; where whole documents leave more, some are cut to fill rows


@dataclass
class DataConfig:
    """Documents to train on and to hold out, and the token store they become."""

    name: str = "data"
    train: list[SourceConfig] = field(default_factory=list)
    heldout: list[SourceConfig] = field(default_factory=list)  # whole documents never trained on
    heldout_fraction: float = 0.0  # of the train documents, taken where `heldout` is empty
    store_dir: str = "data/store"  # one sub-folder a (sources, tokenizer) pair
    rebuild: bool = False  # make the store anew where the documents, or this code, changed since; else that is refused
    append_eos: bool = True  # the tokenizer's end-of-text token after every document
    threads: int = 0  # tokenising threads; 0: one a core
    min_document_tokens: int = 1  # shorter documents are dropped and counted
    drop_duplicates: bool = True  # a text that came before, in any source, or is held out: dropped and counted
    exclude: list[SourceConfig] = field(default_factory=list)  # evaluation texts: documents that overlap are dropped
    exclude_words: int = 13  # consecutive words shared with one of them
    mix: MixConfig = field(default_factory=MixConfig)  # of every stage without its own


@dataclass
class RopeConfig:
    """Rotary embedding of a stage, in transformers' own words. Unset fields keep the model's value."""

    rope_type: str | None = None  # default | linear | dynamic | yarn | llama3 …
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # any further key of rope_parameters


@dataclass
class StageAttentionConfig:
    """A stage's attention plan; unset fields come from ``attention``."""

    kind: AttentionKind | None = None
    block_size: int | None = None
    top_k: int | None = None
    full_layers: int | None = None


@dataclass
class StageLearningRateConfig:
    """A stage's own learning-rate phase, in place of the run's: linear from ``start`` to ``end``, in units of the peak.

    Neither set: the run's phases; one set: the other is 1."""

    start: float | None = None
    end: float | None = None

    @property
    def line(self) -> tuple[float, float] | None:
        """(start, end), or None where the run's phases hold."""
        if self.start is None and self.end is None:
            return None
        return (1.0 if self.start is None else self.start, 1.0 if self.end is None else self.end)


@dataclass
class StageConfig:
    """A span of training at one context length and attention plan. Its size is ``tokens`` or ``share``, not both."""

    name: str = "stage"
    tokens: int | None = None
    share: float | None = None  # of schedule.tokens
    context_length: int = 2048
    attention: StageAttentionConfig = field(default_factory=StageAttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    learning_rate: StageLearningRateConfig = field(default_factory=StageLearningRateConfig)
    mix: MixConfig | None = None  # in place of data.mix


class DecayShape(Enum):
    """How the learning rate falls in its last phase."""

    linear = "linear"
    cosine = "cosine"


@dataclass
class LearningRateConfig:
    """Warm-up, stable, decay over the whole run; each share is of the run's tokens."""

    peak: float = 3e-4
    warmup_share: float = 0.05
    decay_share: float = 0.3
    final_ratio: float = 0.1  # learning rate at the end, over the peak
    shape: DecayShape = DecayShape.linear


@dataclass
class ScheduleConfig:
    """What happens as tokens are seen."""

    tokens: int | None = None  # the run's length; needed, and only then allowed, where a stage gives a share
    stages: list[StageConfig] = field(default_factory=list)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)


@dataclass
class PositionLossConfig:
    """Loss by position of the target in its segment."""

    bin_size: int = 2048  # tokens; the trailing loss is the last bin of a full context
    log_every: int = 10  # steps between full curves in the log; the trailing loss is logged at every one


@dataclass
class EvaluateConfig:
    """The fixed held-out set, read at the longest context of the schedule."""

    rows: int = 8  # rows of one full context each
    every_steps: int = 0  # 0: only at the start, at each stage's end and at the end
    at_start: bool = True


@dataclass
class CheckpointConfig:
    """Saves under ``<run>/checkpoints``. The newest ``keep`` are kept."""

    every_steps: int = 100  # 0: only at the end
    keep: int = 2
    export: bool = True  # write the final model as a Hugging Face folder, <run>/model


@dataclass
class WandbConfig:
    """Weights & Biases. Unset fields are its own defaults."""

    mode: WandbMode = WandbMode.auto
    project: str = "moba_train"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """A whole run, group by group, as on the command line."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    position_loss: PositionLossConfig = field(default_factory=PositionLossConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
