"""What can only be checked against files: the model's configuration, its tokenizer, the run directory, the store.

Runs in the command-line process, in seconds, before CUDA or a process group is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PretrainedConfig

from moba_train import checkpoint, durable, metrics_file, resolved
from moba_train.attention.backends import BACKENDS, check_name, resolve
from moba_train.config import AttentionKind, Config, Device, LaunchConfig, LaunchKind, Resume
from moba_train.cost import DecoderShape
from moba_train.data.mix import build_mix, check_mix, stage_mix
from moba_train.data.store import TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.hf_attention import sliding_window
from moba_train.loss import refuse_changed_logits
from moba_train.model import key_conv_width, model_configuration, tokenizer_path
from moba_train.parallel import lifetime
from moba_train.rope import LENGTH_BOUND, rope_parameters
from moba_train.runtime import choose_device
from moba_train.schedule import Schedule
from moba_train.validate import check_slices

_ATTENTION_TYPES = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # transformers' words


def check_model(config: Config, schedule: Schedule) -> None:
    """The schedule fits the model, and the model its tokenizer.

    Raises:
        ValueError: naming the key, its value and the fix.
    """
    device = _device(config.launch)
    model = model_configuration(config.model)
    DecoderShape.from_config(model)  # the sizes that the checks below and the cost of every step are made of
    _check_layer_types(config, model)
    _check_direction(config, model)
    _check_backend(config.attention.backend, device, schedule, model)
    refuse_changed_logits(model)
    _check_key_conv(config, model)
    _check_heads(config, model)
    _check_stages(config, schedule, model)
    if (window := sliding_window(model)) is not None:
        raise ValueError(
            f"{config.model.name} has sliding_window={window}, which moba and full do not compute: "
            f"set sliding_window to null in its config.json if it is to read its whole context"
        )
    _check_tokenizer(config, model)


def dense_stages(config: Config, schedule: Schedule) -> Iterator[str]:
    """The stages of kind moba that read every key all the same, and why."""
    layers = model_configuration(config.model).num_hidden_layers
    for stage in schedule.stages:
        if stage.kind is not AttentionKind.moba:
            continue
        if stage.sparsity == 0:
            yield (
                f"stage {stage.name} reads every key: top_k {stage.top_k} x block_size {stage.block_size} covers its "
                f"context of {stage.context_length} tokens"
            )
        elif stage.full_layers == layers:
            yield f"stage {stage.name} reads every key: full_layers {stage.full_layers} is every layer of the model"


def _check_layer_types(config: Config, model: PretrainedConfig) -> None:
    """Rows hold several documents, and attention alone is told where each begins."""
    others = sorted(set(getattr(model, "layer_types", None) or ()) - _ATTENTION_TYPES)
    if others:
        raise ValueError(
            f"{config.model.name} of model_type {model.model_type} has layers of type {', '.join(others)}, which would "
            f"carry their state from one packed document into the next: use a Llama, Mistral or Qwen model whose "
            f"layers are all attention"
        )


def _check_direction(config: Config, model: PretrainedConfig) -> None:
    """Tokens read earlier ones alone; the attention refuses the rest too, but at the first pass."""
    both_ways = getattr(model, "use_bidirectional_attention", None)
    if getattr(model, "is_causal", None) is False or both_ways:
        setting = f"use_bidirectional_attention={both_ways}" if both_ways else "is_causal=False"
        raise ValueError(
            f"{config.model.name} has {setting}: its tokens read later ones, and the moba attention is causal; use a "
            f"causal language model"
        )


def _check_heads(config: Config, model: PretrainedConfig) -> None:
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(
            f"{config.model.name} has num_attention_heads={heads} and num_key_value_heads={kv_heads}: the first must "
            f"be a multiple of the second"
        )
    check_slices(config, heads, kv_heads)


def _check_stages(config: Config, schedule: Schedule, model: PretrainedConfig) -> None:
    """Each stage's RoPE, which changes that of the one before, its layers and its mix."""
    parameters = dict(getattr(model, "rope_parameters", None) or {})
    if "rope_type" not in parameters:
        raise ValueError(
            f"{config.model.name} of model_type {model.model_type} has no single rotary position embedding: use a "
            f"Llama, Mistral or Qwen model"
        )
    _check_sliced_rope(config, parameters, config.model.name)
    layers = model.num_hidden_layers
    for stage in schedule.stages:
        if stage.full_layers > layers:
            raise ValueError(
                f"full_layers={stage.full_layers} in stage {stage.name} with {layers} layers in {config.model.name}: "
                f"set it to at most {layers}"
            )
        try:
            parameters = rope_parameters(parameters, stage.rope)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from None
        _check_sliced_rope(config, parameters, f"stage {stage.name}")
        settings, key = stage_mix(config, stage.index)
        check_mix(settings, [source.name for source in config.data.train], key)


def _check_tokenizer(config: Config, model: PretrainedConfig) -> None:
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer_path(config.model)} has {tokenizer.vocab_size} ids and {config.model.name} "
            f"vocab_size={model.vocab_size}: set model.tokenizer to the model's own"
        )
    own = Path(config.model.path or "").expanduser() / "tokenizer.json"
    given = config.model.path and config.model.tokenizer
    if given and own.is_file() and load_tokenizer(str(own.parent)).sha256 != tokenizer.sha256:
        raise ValueError(
            f"model.tokenizer={config.model.tokenizer} is not the tokenizer that model.path={config.model.path} was "
            f"trained with: set model.tokenizer=null"
        )


def _device(launch: LaunchConfig) -> torch.device:
    """Of the ranks; those of other machines find theirs out."""
    if launch.kind is LaunchKind.local:
        return choose_device(launch, local_rank=0, processes=launch.world_size)
    return torch.device("cpu" if launch.device is Device.cpu else "cuda")


def _check_key_conv(config: Config, model: PretrainedConfig) -> None:
    width, size = key_conv_width(model, config.attention.key_conv), config.train.sequence_parallel_size
    if width and size > 1:
        raise ValueError(
            f"train.sequence_parallel_size={size} with attention.key_conv={width}: a rank's first keys would need the "
            f"last ones of the rank before, which they do not get; set train.sequence_parallel_size=1"
        )


def _check_sliced_rope(config: Config, parameters: dict[str, Any], where: str) -> None:
    size = config.train.sequence_parallel_size
    if size > 1 and parameters["rope_type"] in LENGTH_BOUND:
        raise ValueError(
            f"rope_type={parameters['rope_type']} of {where} rotates by the length of the row, and with "
            f"train.sequence_parallel_size={size} a rank sees a slice of it: set that to 1, or take linear, yarn or "
            f"llama3"
        )


def _check_backend(name: str, device: torch.device, schedule: Schedule, model: PretrainedConfig) -> None:
    try:
        check_name(name)
        if name == "auto" or device.type != "cpu":  # a tensor on CUDA would start it; there the worker finds out
            return
        head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        query, key = (torch.empty(1, n, head_dim) for n in (model.num_attention_heads, model.num_key_value_heads))
        for stage in schedule.stages:
            for spec in set(stage.plan(model.num_hidden_layers)):
                if spec.kind in BACKENDS[name].kinds:
                    resolve(name, query, key, spec)
    except ValueError as error:
        raise ValueError(f"attention.{error}") from None


def check_store(config: Config, schedule: Schedule, stores: Path) -> None:
    """Some document reaches every context length: without one there is no trailing loss, and nothing long to learn.

    Raises:
        ValueError: naming the context length and the longest document.
    """
    store = TokenStore.open(stores / "train")
    longest = int(store.lengths.max(initial=0))
    for stage in schedule.stages:
        if longest < stage.context_length:
            raise ValueError(
                f"context_length={stage.context_length} of stage {stage.name} is reached by no training document: the "
                f"longest of {config.data.name} has {longest} tokens. Set it to at most that, or add longer documents"
            )
        settings, key = stage_mix(config, stage.index)
        build_mix(store, stage.context_length, config.run.seed + stage.index, settings, key)
    heldout = TokenStore.open(stores / "heldout")
    longest = int(heldout.lengths.max(initial=0))
    if longest < schedule.longest_context:
        raise ValueError(
            f"context_length={schedule.longest_context} is reached by no held-out document: the longest of "
            f"{config.data.name} has {longest} tokens. Hold out longer documents, or shorten the context"
        )


def check_folder(config: Config, folder: Path) -> None:
    """The run directory is new and can be made, or may be gone on with. Reads only.

    One that holds no step of a run (it failed before) is like a new one.

    Raises:
        ValueError: it holds steps and ``run.resume=never``, there is nothing to resume, the settings differ, or it
            cannot be written.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # the export's writer takes no other, and comes last
        raise _unwritable(folder, "its name is not UTF-8") from None
    try:
        checkpoints = checkpoint.list_checkpoints(folder / "checkpoints")
        begun = bool(checkpoints) or _holds_steps(folder / metrics_file.FILE)
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # a name too long, no permission to look
        raise _unwritable(folder, error.strerror) from None
    if begun and config.run.resume is Resume.never:
        raise ValueError(
            f"run.resume=never and {folder} holds a run already: set run.resume=auto to go on with it, or choose "
            f"another run.name"
        )
    if config.run.resume is Resume.must and not checkpoints:
        raise ValueError(
            f"run.resume=must and {folder} holds no checkpoint: check run.dir and run.name, or set run.resume=auto"
        )
    settings = folder / resolved.FILE
    if begun and settings.is_file() and (changed := resolved.differences(resolved.load(settings), config)):
        raise ValueError(
            f"{folder} was started with other settings ({'; '.join(changed[:3])}): resume with the same, or choose "
            f"another run.name"
        )
    for needed in (nearest, folder / "checkpoints", folder / "model"):  # told before the run, not at its first save
        if needed.exists() and not needed.is_dir():
            raise _unwritable(folder, f"{needed} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"no permission in {nearest}")


def _holds_steps(metrics: Path) -> bool:
    return metrics.is_file() and any(row.get("step") for row in metrics_file.read_rows(metrics))


def open_folder(config: Config, folder: Path) -> IO[str]:
    """Make the run directory, claim it and write its ``resolved.yaml``, the worker's whole input.

    Returns:
        The claim, which lasts as long as it is open.

    Raises:
        ValueError: it cannot be written, another process has it or has meanwhile made it another run's, or a setting
            holds a secret, which is not written to disk.
    """
    if hidden := resolved.secrets(config):
        raise ValueError(
            f"{hidden[0]} holds a secret (by its name, or the value of an environment variable), and secrets are not "
            f"written to {resolved.FILE}: take it out of the settings, or rename the variable"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        claim = lifetime.claim(folder)
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    try:
        check_folder(config, folder)
        durable.write(folder / resolved.FILE, resolved.to_yaml(config))
    except BaseException as error:
        claim.close()
        if isinstance(error, OSError):
            raise _unwritable(folder, error.strerror) from None
        raise
    return claim


def _unwritable(folder: Path, why: str | None) -> ValueError:
    return ValueError(f"run directory {folder} cannot be written ({why}): set run.dir to a folder that can")
