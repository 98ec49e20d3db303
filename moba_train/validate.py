"""What types cannot check, before any process is started: ranges, and values that do not go together.

Every message names the key, its value and the fix. Stages are checked by ``schedule.build_schedule``; what needs the
model's or the tokenizer's files by ``preflight``.
"""

from __future__ import annotations

import math
import re

from moba_train.config import Config, Device, FusedKernels, LaunchKind, OffloadDevice, Precision, Resume, SourceConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
LONGEST_NAME = 120  # file systems stop at 255 bytes, and a time or a hash is added to some
_INT64 = 2**63  # torch's integers, and the seeds of its generator, end there
_PORTS = 65535
_KEY_CONV_WIDTHS = (3, 5)  # those of the paper
POINTS = ("start", "step")  # of evaluations that belong to no stage's end


def validate(config: Config) -> None:
    """
    Raises:
        ValueError: the first setting that cannot be used.
    """
    _names(config)
    _least(config)
    _shares_and_rates(config)
    _choices(config)
    _memory(config)
    _data(config)
    _sequence_parallel(config)
    _batch(config)


def _names(config: Config) -> None:
    """Names that become folders or keys of a row."""
    names = {"run.name": config.run.name, "run.label": config.run.label, "data.name": config.data.name}
    names |= {f"schedule.stages[{index}].name": stage.name for index, stage in enumerate(config.schedule.stages)}
    for key, name in names.items():
        if name is not None and not (_NAME.fullmatch(name) and len(name) <= LONGEST_NAME):
            raise ValueError(
                f"{key}={name!r}: use letters, digits and . _ - = , + only, start with a letter or digit, and stay "
                f"within {LONGEST_NAME} characters"
            )
    if config.run.name is None and config.run.resume is not Resume.never:
        raise ValueError(f"run.resume={config.run.resume.name} needs run.name, the directory to go on with: set it")
    if config.run.name is None and config.launch.kind is LaunchKind.environment:
        raise ValueError("launch=environment needs run.name, the directory that all ranks share: set it")
    for index, stage in enumerate(config.schedule.stages):
        if stage.name in POINTS:
            raise ValueError(
                f"schedule.stages[{index}].name={stage.name} is the name of an evaluation: choose another name"
            )


def _least(config: Config) -> None:
    """Sizes and counts."""
    least = {
        "attention.block_size": (config.attention.block_size, 1),
        "attention.top_k": (config.attention.top_k, 1),
        "attention.full_layers": (config.attention.full_layers, 0),
        "run.seed": (config.run.seed, 0),
        "train.tokens_per_step": (config.train.tokens_per_step, 1),
        "train.sequence_parallel_size": (config.train.sequence_parallel_size, 1),
        "train.loss_tile_tokens": (config.train.loss_tile_tokens, 1),
        "train.mlp_tile_tokens": (config.train.mlp_tile_tokens, 0),
        "train.nonfinite_limit": (config.train.nonfinite_limit, 1),
        "train.log_every": (config.train.log_every, 1),
        "train.gradient_clipping": (config.train.gradient_clipping, 0),
        "position_loss.bin_size": (config.position_loss.bin_size, 1),
        "position_loss.log_every": (config.position_loss.log_every, 1),
        "evaluate.rows": (config.evaluate.rows, 1),
        "evaluate.every_steps": (config.evaluate.every_steps, 0),
        "checkpoint.every_steps": (config.checkpoint.every_steps, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "launch.nodes": (config.launch.nodes, 1),
        "launch.threads": (config.launch.threads, 0),
        "launch.port": (config.launch.port, 0),
        "launch.slurm.save_seconds": (config.launch.slurm.save_seconds, 0),
        "data.threads": (config.data.threads, 0),
        "data.min_document_tokens": (config.data.min_document_tokens, 1),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
    }
    optional = {
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "launch.processes": config.launch.processes,
        "launch.gpus": config.launch.gpus,
        "launch.gpus_per_node": config.launch.gpus_per_node,
    }
    least |= {key: (value, 1) for key, value in optional.items() if value is not None}
    for key, (value, minimum) in least.items():
        if not minimum <= value < math.inf:  # NaN is refused too
            raise ValueError(f"{key}={value}: must be at least {minimum}")
        if value >= _INT64:
            raise ValueError(f"{key}={value}: must be below {_INT64}")


def _shares_and_rates(config: Config) -> None:
    rate = config.schedule.learning_rate
    shares = {
        "data.heldout_fraction": config.data.heldout_fraction,
        "schedule.learning_rate.warmup_share": rate.warmup_share,
        "schedule.learning_rate.decay_share": rate.decay_share,
        "schedule.learning_rate.final_ratio": rate.final_ratio,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{key}={share}: must be from 0 to 1")
    for key, beta in (("beta1", config.optimizer.beta1), ("beta2", config.optimizer.beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"optimizer.{key}={beta}: must be from 0 to below 1")
    for key, number in (
        ("schedule.learning_rate.peak", rate.peak),
        ("optimizer.eps", config.optimizer.eps),
        ("launch.timeout_minutes", config.launch.timeout_minutes),
    ):
        if not 0 < number < math.inf:
            raise ValueError(f"{key}={number}: must be above 0")
    for index, stage in enumerate(config.schedule.stages):
        for end in ("start", "end"):
            value = getattr(stage.learning_rate, end)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"schedule.stages[{index}].learning_rate.{end}={value}: must be at least 0")
    if rate.warmup_share + rate.decay_share > 1:
        raise ValueError(
            f"schedule.learning_rate.warmup_share={rate.warmup_share} and decay_share={rate.decay_share} are more "
            f"than the whole run: make their sum at most 1"
        )


def _choices(config: Config) -> None:
    """What is one of a few, or bounded from above."""
    if config.launch.port > _PORTS:
        raise ValueError(f"launch.port={config.launch.port}: must be at most {_PORTS}, or 0 for any free one")
    if config.attention.key_conv not in (0, *_KEY_CONV_WIDTHS):
        raise ValueError(f"attention.key_conv={config.attention.key_conv}: choose 3 or 5 tokens, or 0 for none")
    traced = config.train.profile_steps
    if traced and not (len(traced) == 2 and 1 <= traced[0] <= traced[1]):
        raise ValueError(f"train.profile_steps={traced}: give the first and the last step to trace, such as [10,12]")
    if config.train.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"train.zero_stage={config.train.zero_stage}: choose 0, 1, 2 or 3")
    if config.train.precision is Precision.bf16 and config.train.zero_stage == 0:
        raise ValueError(
            "train.precision=bf16 with train.zero_stage=0 keeps no sharded fp32 state: set train.zero_stage=1"
        )


def _memory(config: Config) -> None:
    """Switches that save memory, and what each rests on."""
    train, offload = config.train, config.train.offload
    devices = {"optimizer": offload.optimizer, "parameters": offload.parameters}
    for name, device in devices.items():
        least = 3 if name == "parameters" or device is OffloadDevice.nvme else 1
        if device is not OffloadDevice.none and train.zero_stage < least:
            raise ValueError(
                f"train.offload.{name}={device.name} with train.zero_stage={train.zero_stage}: set train.zero_stage="
                f"{least}"
            )
        if device is OffloadDevice.nvme and offload.nvme_path is None:
            raise ValueError(f"train.offload.{name}=nvme needs train.offload.nvme_path, a folder on that disk: set it")
    if offload.nvme_path is not None and OffloadDevice.nvme not in devices.values():
        raise ValueError(
            f"train.offload.nvme_path={offload.nvme_path} is not used: set train.offload.optimizer=nvme, or take it out"
        )
    if offload.moments and offload.optimizer is not OffloadDevice.none:
        raise ValueError(
            f"train.offload.moments=true with train.offload.optimizer={offload.optimizer.name}, which moves them too: "
            f"set one of the two"
        )
    for name, wanted in (("keep_attention", train.keep_attention), ("offload.hidden_states", offload.hidden_states)):
        if wanted and not train.activation_checkpointing:
            raise ValueError(f"train.{name}=true needs train.activation_checkpointing=true: set it")
    if not train.keep_choices and not train.activation_checkpointing:
        raise ValueError("train.keep_choices=false needs train.activation_checkpointing=true: set it, or leave it out")
    if train.gradient_dtype is Precision.bf16 and train.precision is Precision.fp32:
        raise ValueError("train.gradient_dtype=bf16 with train.precision=fp32: set train.precision=bf16")
    if train.fused_kernels is FusedKernels.liger and config.launch.device is Device.cpu:
        raise ValueError("train.fused_kernels=liger with launch.device=cpu: Liger's kernels need a GPU; set auto")


def _data(config: Config) -> None:
    if not config.data.train:
        raise ValueError("data.train is empty: give at least one source, or take one of the data= configs")
    for group in ("train", "heldout"):
        sources: list[SourceConfig] = getattr(config.data, group)
        for index, source in enumerate(sources):
            if not source.path:
                raise ValueError(f"data.{group}[{index}].path is empty: give a file, folder, glob or hub dataset name")
            if source.name in [earlier.name for earlier in sources[:index]]:  # weights and metrics go by names
                raise ValueError(
                    f"data.{group}[{index}].name={source.name} is an earlier source's: choose another name"
                )
    if not config.data.heldout and config.data.heldout_fraction == 0:
        raise ValueError(
            "data.heldout is empty and data.heldout_fraction=0: give held-out sources or a fraction of the documents, "
            "for example data.heldout_fraction=0.01"
        )


def _sequence_parallel(config: Config) -> None:
    """Groups must share out the ranks, and slices every row."""
    size = config.train.sequence_parallel_size
    if config.launch.world_size % size:
        raise ValueError(
            f"train.sequence_parallel_size={size} does not divide the ranks of {config.launch.counted}: make them a "
            f"multiple of {size}"
        )
    for index, stage in enumerate(config.schedule.stages):
        if stage.context_length % size:
            raise ValueError(
                f"schedule.stages[{index}].context_length={stage.context_length} does not make "
                f"train.sequence_parallel_size={size} equal slices: make it a multiple of {size}"
            )


def _batch(config: Config) -> None:
    """Rows must share out evenly over micro-batches and ranks, in every stage."""
    groups = config.launch.world_size // config.train.sequence_parallel_size
    for index, stage in enumerate(config.schedule.stages):
        context = stage.context_length
        if context < 2:
            continue  # build_schedule refuses it with its own message
        rows = config.train.tokens_per_step // context
        micro = micro_batch_rows(config, context)
        if rows % (groups * micro):
            raise ValueError(
                f"schedule.stages[{index}]: {rows} rows of {context} tokens a step (train.tokens_per_step="
                f"{config.train.tokens_per_step}) do not share out over {_ranks(config)} x {micro} rows a "
                f"micro-batch: make tokens_per_step a multiple of {context * groups * micro}"
            )


def _ranks(config: Config) -> str:
    size, ranks = config.train.sequence_parallel_size, config.launch.counted
    return ranks if size == 1 else f"({ranks}) / train.sequence_parallel_size={size}"


def check_slices(config: Config, heads: int, kv_heads: int) -> None:
    """Sequence parallelism exchanges slices of rows for whole heads, so each rank needs as many heads as the others.

    Raises:
        ValueError: it does not get them.
    """
    size = config.train.sequence_parallel_size
    works = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if size not in works:
        raise ValueError(
            f"train.sequence_parallel_size={size} does not share out num_attention_heads={heads} and "
            f"num_key_value_heads={kv_heads} of {config.model.name}: set it to one of {', '.join(map(str, works))}"
        )


def micro_batch_rows(config: Config, context_length: int) -> int:
    """Rows that a rank, or a sequence-parallel group, reads in one pass at this context length."""
    tokens = config.train.micro_batch_tokens
    return 1 if tokens is None else max(1, tokens // context_length)
