"""One stage of a recipe as one GPU sees it: the only file here that reads the recipe's settings."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.attention.spec import AttentionSpec
from moba_train.config import Config, FusedKernels, Precision, TrainConfig
from moba_train.cost import DecoderShape
from moba_train.schedule import Stage, build_schedule
from moba_train.validate import check_slices, micro_batch_rows

HALF, SINGLE = 2, 4  # bytes of bf16 and fp32


@dataclass(frozen=True)
class Setup:
    """A stage on its GPUs. Every row is taken as one segment that fills the context, which costs most."""

    config: Config
    shape: DecoderShape
    stage: Stage

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def world_size(self) -> int:
        return self.config.launch.world_size

    @property
    def nodes(self) -> int:
        return self.config.launch.nodes

    @property
    def gpus_per_node(self) -> int:
        return -(-self.world_size // self.nodes)

    @property
    def sequence_parallel_size(self) -> int:
        return self.train.sequence_parallel_size

    @property
    def fused(self) -> bool:
        """Liger's kernels are used; ``auto`` takes them where they are installed, which is assumed."""
        return self.train.fused_kernels is not FusedKernels.none

    @property
    def rows(self) -> int:
        """Of a micro-batch, shared by the ranks of a sequence-parallel group."""
        return micro_batch_rows(self.config, self.stage.context_length)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one rank."""
        return self.rows * self.stage.context_length // self.sequence_parallel_size

    @property
    def micro_batches(self) -> int:
        """Of a step, on one rank."""
        groups = self.world_size // self.sequence_parallel_size
        return self.train.tokens_per_step // (groups * self.rows * self.stage.context_length)

    @property
    def specs(self) -> list[AttentionSpec]:
        """Attention of each layer."""
        return self.stage.plan(self.shape.layers)

    @property
    def query_size(self) -> int:
        """Numbers of a token's queries, all heads. Under sequence parallelism a rank has some heads of all tokens,
        which are as many."""
        return self.shape.heads * self.shape.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of a token's keys; where there are fewer heads than ranks to share them, they are repeated."""
        return max(self.shape.kv_heads, self.sequence_parallel_size) * self.shape.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and as many of the output layer, which may be the same."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def output_parameters(self) -> int:
        """Whose gradients the loss gives: those of an output layer that is not the embedding."""
        return 0 if self.shape.tied else self.embedding_parameters

    @property
    def input_parameters(self) -> int:
        """Whose gradients are not there yet while the first layer is computed backwards: its own, the embedding's."""
        outside = self.embedding_parameters + self.output_parameters + self.shape.hidden_size
        return self.embedding_parameters + (self.shape.parameters - outside) // self.shape.layers


def refuse(config: Config, shape: DecoderShape) -> None:
    """
    Raises:
        ValueError: a recipe that cannot run, or whose memory and time are not predicted.
    """
    if config.train.precision is not Precision.bf16:
        raise ValueError(
            f"train.precision={config.train.precision.name} is not planned, GPUs are given bf16: add "
            f"train.precision=bf16 train.zero_stage=1"
        )
    check_slices(config, shape.heads, shape.kv_heads)
    for stage in build_schedule(config).stages:
        if stage.full_layers > shape.layers:
            raise ValueError(
                f"full_layers={stage.full_layers} in stage {stage.name} with {shape.layers} layers in "
                f"{config.model.name}: set it to at most {shape.layers}"
            )
