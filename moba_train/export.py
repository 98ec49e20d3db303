"""Write the trained model as a Hugging Face folder that plain transformers loads without this package.

A model with key convolutions becomes one that only this package loads (``key_conv_folder``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from moba_train import key_conv_folder
from moba_train.data.tokenizer import load_tokenizer
from moba_train.runtime import Runtime, log


def export(model: PreTrainedModel, tokenizer: str, folder: Path, runtime: Runtime) -> None:
    """Write weights (safetensors), configuration with the RoPE in effect, and tokenizer, whole or not at all.

    MoBA adds no parameter, so the folder is that of a dense model of the same architecture, but for key convolutions.
    All ranks call it: under ZeRO-3 the parameters are gathered from all of them.

    Raises:
        ValueError: the weights could not be written.
    """
    import deepspeed

    partial = folder.with_name(f".{folder.name}.partial")
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _save(model, partial)
            except SafetensorError as error:  # its way to tell of a full disk
                shutil.rmtree(partial, ignore_errors=True)
                raise ValueError(
                    f"model {folder} could not be written ({error}): make room, and go on with run.resume=auto"
                ) from None
            load_tokenizer(tokenizer).save(partial, model.config.max_position_embeddings)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
    dist.barrier()


def _save(model: PreTrainedModel, folder: Path) -> None:
    # As they came: transformers 5.17 writes no settings that contradict themselves, as some published models' do.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        _save_weights(model, folder)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    if not getattr(model.config, "key_conv", 0):
        model.save_pretrained(folder)
        return
    log.warning(
        "the model has key convolutions (attention.key_conv=%d): its export loads with this package (model.path=…) and "
        "not with plain transformers",
        model.config.key_conv,
    )
    key_conv_folder.save(model, folder)
