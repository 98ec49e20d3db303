"""Memory and time of every stage of a recipe, and of the whole schedule."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.config import Config
from moba_train.cost import DecoderShape, StepCost, step_cost
from moba_train.plan.hardware import Hardware
from moba_train.plan.memory import GB, Memory, predict_memory
from moba_train.plan.setup import Setup
from moba_train.plan.step_time import StepTime, predict_time
from moba_train.schedule import build_schedule


@dataclass(frozen=True)
class StageEstimate:
    setup: Setup
    memory: Memory
    time: StepTime
    cost: StepCost  # of a step, all GPUs together

    @property
    def tokens_per_second(self) -> float:
        return self.setup.train.tokens_per_step / self.time.total

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.setup.stage.steps * self.time.total


@dataclass(frozen=True)
class Estimate:
    """Of a recipe on ``world_size`` GPUs."""

    stages: tuple[StageEstimate, ...]
    hardware: Hardware

    @property
    def world_size(self) -> int:
        return self.stages[0].setup.world_size

    @property
    def needed(self) -> float:
        """Bytes a GPU must have: the largest stage's."""
        return max(stage.memory.needed for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_host

    @property
    def fits_gpu(self) -> bool:
        return self.needed <= self.hardware.memory_gb * GB

    @property
    def host_is_known(self) -> bool:
        """Whether nothing is offloaded, or the host's memory is given: else ``fits`` speaks of the GPU alone."""
        return not self.host or self.hardware.host_memory_gb is not None

    @property
    def fits_host(self) -> bool:
        """What is offloaded; so too where the host's memory is not known."""
        return self.hardware.host_memory_gb is None or self.host <= self.hardware.host_memory_gb * GB

    @property
    def host(self) -> float:
        """Bytes of host memory a node must have for what is offloaded."""
        return max(stage.memory.host * stage.setup.gpus_per_node for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.world_size / 3600


def estimate(config: Config, shape: DecoderShape, hardware: Hardware) -> Estimate:
    """Predict a recipe that ``validate`` and ``refuse`` have passed."""
    stages = []
    for stage in build_schedule(config).stages:
        setup = Setup(config, shape, stage)
        rows = config.train.tokens_per_step // stage.context_length
        cost = step_cost(
            shape,
            setup.specs,
            [stage.context_length] * rows,
            activation_checkpointing=config.train.activation_checkpointing,
        )
        stages.append(StageEstimate(setup, predict_memory(setup), predict_time(setup, hardware), cost))
    return Estimate(tuple(stages), hardware)
