"""What is checked against files before any process is started."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest

from moba_train import key_conv_folder, preflight, resolved
from moba_train.config import AttentionKind, Config, Device, Precision, Resume, RopeConfig
from moba_train.data.tokens import prepare_store
from moba_train.model import load_model
from moba_train.schedule import build_schedule


def check_model(config: Config) -> None:
    preflight.check_model(config, build_schedule(config))


def refuses(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_model(config)
    assert "\n" not in str(caught.value)


def test_the_tiny_run_passes(tiny_config: Config, tmp_path: Path) -> None:
    check_model(tiny_config)
    stores = prepare_store(tiny_config.data, str(tiny_config.model.tokenizer), progress=False)
    preflight.check_store(tiny_config, build_schedule(tiny_config), stores)
    folder = tmp_path / "runs" / "tiny"
    preflight.check_folder(tiny_config, folder)
    assert not folder.exists() and not folder.parent.exists()
    preflight.open_folder(tiny_config, folder).close()
    assert resolved.load(folder / resolved.FILE) == tiny_config
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == [".lock", resolved.FILE]


def test_the_plan_fits_the_model(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].attention.kind = AttentionKind.moba
    tiny_config.schedule.stages[1].attention.full_layers = 3
    check_model(tiny_config)
    tiny_config.schedule.stages[1].attention.full_layers = 4
    refuses(tiny_config, "full_layers=4 in stage full with 3 layers in tiny_llama: set it to at most 3")


def test_unknown_backend(tiny_config: Config) -> None:
    tiny_config.attention.backend = "flash"
    refuses(tiny_config, "attention.backend=flash is unknown: choose from auto, .*varlen")


def test_rope_of_a_stage(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].rope = RopeConfig(rope_type="yarn")
    refuses(tiny_config, "yarn needs rope.factor")
    tiny_config.schedule.stages[1].rope = RopeConfig(rope_type="yarn", factor=4.0)
    refuses(tiny_config, "needs rope.original_max_position_embeddings")


def test_stages_that_read_every_key_are_told(tiny_config: Config) -> None:
    def told() -> list[str]:
        return list(preflight.dense_stages(tiny_config, build_schedule(tiny_config)))

    assert not told()
    stage = tiny_config.schedule.stages[0]
    stage.attention.full_layers = 3
    assert told() == [f"stage {stage.name} reads every key: full_layers 3 is every layer of the model"]
    stage.attention.block_size, stage.attention.top_k = stage.context_length // 2, 2
    (line,) = told()
    assert line.startswith(
        f"stage {stage.name} reads every key: top_k 2 x block_size {stage.context_length // 2} covers"
    )


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_a_file_in_the_way_of_what_a_run_writes(tiny_config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"cannot be written \({tmp_path}/{name} is a file\)"):
        preflight.check_folder(tiny_config, tmp_path)


def test_a_folder_that_an_export_cannot_be_written_to_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    """safetensors takes no such name, and told of it when all was trained."""
    with pytest.raises(ValueError, match=r"cannot be written \(its name is not UTF-8\): set run\.dir to a folder that"):
        preflight.check_folder(tiny_config, tmp_path / os.fsdecode(b"caf\xe9") / "run")


def test_a_model_whose_tokens_read_later_ones_is_refused_by_its_folder(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = preflight.model_configuration(tiny_config.model)
    model.is_causal = False
    monkeypatch.setattr(preflight, "model_configuration", lambda _: model)
    refuses(tiny_config, "has is_causal=False: its tokens read later ones, and the moba attention is causal")


def test_models_that_moba_does_not_compute(tiny_config: Config) -> None:
    tiny_config.model.architecture = {"model_type": "gpt2"}
    refuses(tiny_config, "model_type=gpt2 has no intermediate_size of its own; use a Llama-shaped decoder")
    tiny_config.model.architecture = {"model_type": "opt", "ffn_dim": 64}
    refuses(tiny_config, "model_type=opt has no intermediate_size of its own")
    tiny_config.model.architecture = {"model_type": "gemma3"}  # a text model within
    refuses(tiny_config, "model_type=gemma3 has no num_hidden_layers of its own; use a Llama-shaped decoder")
    tiny_config.model.architecture = {"model_type": "gemma4_text", "num_attention_heads": 4}
    refuses(tiny_config, "gemma4_text: its layers have no head_dim in common|gemma4_text is unknown")
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    tiny_config.model.architecture = {"model_type": "lfm2", "vocab_size": 300, **layers}
    refuses(tiny_config, "lfm2 has layers of type conv, which would carry their state from one packed document")
    tiny_config.model.architecture = {"model_type": "gemma3_text", "vocab_size": 300}
    refuses(tiny_config, "model_type gemma3_text has no single rotary position embedding")
    tiny_config.model.architecture = {"model_type": "mistral", "vocab_size": 300}
    refuses(tiny_config, "sliding_window=4096.*set sliding_window to null")
    tiny_config.model.architecture["sliding_window"] = None
    check_model(tiny_config)
    tiny_config.model.architecture = {"model_type": "gemma", "vocab_size": 300, "use_bidirectional_attention": True}
    refuses(
        tiny_config, "has use_bidirectional_attention=True: its tokens read later ones.*use a causal language model"
    )
    tiny_config.model.architecture = {"model_type": "cohere", "vocab_size": 300}
    refuses(tiny_config, "logit_scale=.*use a Llama, Mistral or Qwen model")
    tiny_config.model.architecture = {"model_type": "llama", "vocab_size": 300, "num_hidden_layers": 0}
    refuses(tiny_config, "num_hidden_layers=0 of model_type=llama: must be at least 1")


def test_the_tokenizer_fits_the_vocabulary(tiny_config: Config, tmp_path: Path) -> None:
    tiny_config.model.architecture["vocab_size"] = 290
    refuses(tiny_config, "has 298 ids and tiny_llama vocab_size=290: set model.tokenizer")
    tiny_config.model.tokenizer = str(tmp_path / "tokenizer.json")
    refuses(tiny_config, "does not exist")
    (tmp_path / "tokenizer.json").write_text("{}")
    refuses(tiny_config, "is not a tokenizers JSON file")
    tiny_config.model.tokenizer = None
    refuses(tiny_config, r"model\.tokenizer is not set")


def test_more_processes_than_gpus(tiny_config: Config) -> None:
    tiny_config.launch.device, tiny_config.launch.processes = Device.cuda, 64
    refuses(tiny_config, r"launch\.processes=64 with \d+ GPUs seen on .* launch\.device=cpu")


@pytest.mark.parametrize(("stage", "context"), [(1, 4096), (0, 8192)])
def test_context_lengths_are_reached(tiny_config: Config, stage: int, context: int) -> None:
    """The longest training document has some 3,000 words, the held-out one 800."""
    stores = prepare_store(tiny_config.data, str(tiny_config.model.tokenizer), progress=False)
    tiny_config.train.tokens_per_step = 8192
    tiny_config.schedule.stages[stage].tokens = 8192
    tiny_config.schedule.stages[stage].context_length = context
    with pytest.raises(ValueError, match=f"context_length={context} of stage .* is reached by no training document"):
        preflight.check_store(tiny_config, build_schedule(tiny_config), stores)
    tiny_config.schedule.stages[stage].context_length = 2048
    with pytest.raises(ValueError, match="context_length=2048 is reached by no held-out document: the longest of tiny"):
        preflight.check_store(tiny_config, build_schedule(tiny_config), stores)


def test_a_run_that_stands(tiny_config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    preflight.open_folder(tiny_config, folder).close()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"run\.resume=never and .* holds a run already: set run\.resume=auto"):
        preflight.check_folder(tiny_config, folder)
    tiny_config.run.resume = Resume.must
    with pytest.raises(ValueError, match=r"run\.resume=must and .* holds no checkpoint"):
        preflight.check_folder(tiny_config, folder)
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    preflight.check_folder(tiny_config, folder)
    tiny_config.data.train[0].path = "documents/elsewhere"
    preflight.check_folder(tiny_config, folder)
    tiny_config.run.seed = 3
    with pytest.raises(ValueError, match=r"started with other settings \(run\.seed: 0 -> 3\)"):
        preflight.check_folder(tiny_config, folder)


@pytest.mark.parametrize("resume", [Resume.never, Resume.auto])
def test_a_run_without_a_step_may_be_begun_anew(tiny_config: Config, tmp_path: Path, resume: Resume) -> None:
    folder = tmp_path / "run"
    preflight.open_folder(tiny_config, folder).close()
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/point": "start"}\n')
    tiny_config.run.seed, tiny_config.run.resume = 3, resume
    preflight.open_folder(tiny_config, folder).close()
    assert resolved.load(folder / resolved.FILE) == tiny_config


def test_a_folder_has_one_writer(tiny_config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = copy.deepcopy(tiny_config)
    other.run.seed = 3
    with preflight.open_folder(tiny_config, folder), pytest.raises(ValueError, match="written by another process"):
        preflight.open_folder(other, folder)
    assert resolved.load(folder / resolved.FILE) == tiny_config
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')  # the first one trains, and ends
    with pytest.raises(ValueError, match=r"run\.resume=never"):
        preflight.open_folder(other, folder)
    assert resolved.load(folder / resolved.FILE) == tiny_config


def test_checkpoints_without_settings_are_no_new_run(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run\.resume=never"):
        preflight.check_folder(tiny_config, tmp_path / "run")


@pytest.mark.parametrize("name", ["/dev/null/x/run", "file/run", "file", f"{'x' * 300}/run"])
def test_folders_that_cannot_be_made(tiny_config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / name
    for function in (preflight.check_folder, preflight.open_folder):
        with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} cannot be written \(.*set run\.dir") as caught:
            function(tiny_config, folder)
        assert "\n" not in str(caught.value)


def test_a_folder_without_permission(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may do all
    with pytest.raises(ValueError, match="no permission in"):
        preflight.check_folder(tiny_config, tmp_path / "run")


def test_a_model_folder_without_weights(tiny_config: Config, tmp_path: Path) -> None:
    tiny_config.model.architecture = {}
    tiny_config.model.path = str(tmp_path)
    refuses(tiny_config, "holds no config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refuses(tiny_config, "holds no weights")


def test_a_backend_that_cannot_run_here_is_found_out_before_the_run(tiny_config: Config) -> None:
    tiny_config.attention.backend = "triton"
    refuses(tiny_config, "attention.backend=triton cannot run here: it needs a CUDA device")


def test_a_mix_that_its_sources_cannot_give_is_found_out_before_the_run(tiny_config: Config) -> None:
    tiny_config.data.mix.weights = {"elsewhere": 1.0}
    refuses(tiny_config, r"data\.mix\.weights names 'elsewhere', no source of the data: choose from train")
    tiny_config.data.mix.weights = {}
    tiny_config.data.mix.min_length = 10**6
    stores = prepare_store(tiny_config.data, str(tiny_config.model.tokenizer), progress=False)
    with pytest.raises(ValueError, match=r"data\.mix"):
        preflight.check_store(tiny_config, build_schedule(tiny_config), stores)


def test_heads_that_do_not_share_out_are_refused(tiny_config: Config) -> None:
    tiny_config.model.architecture["num_key_value_heads"] = 3
    refuses(tiny_config, "num_attention_heads=4 and num_key_value_heads=3: the first must be a multiple")


def test_sequence_parallel_ranks_get_equally_many_heads(tiny_config: Config) -> None:
    for size in (3, 8):
        tiny_config.train.sequence_parallel_size = size
        refuses(tiny_config, f"sequence_parallel_size={size} .*heads=4 and num_key_value_heads=2 .* one of 1, 2, 4$")
    tiny_config.model.architecture |= {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    tiny_config.train.sequence_parallel_size = 4  # neither divides the other
    refuses(tiny_config, "num_key_value_heads=6 .* one of 1, 2, 3, 6, 12$")
    for fits in (1, 2, 3, 6, 12):
        tiny_config.train.sequence_parallel_size = fits
        check_model(tiny_config)


def test_rope_by_the_length_of_the_row_needs_whole_rows(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].rope = RopeConfig(rope_type="dynamic", factor=4.0)
    check_model(tiny_config)
    tiny_config.train.sequence_parallel_size = 2
    refuses(tiny_config, "rope_type=dynamic of stage full .*sequence_parallel_size=2 .* set that to 1")


def test_key_convolutions_need_whole_rows(tiny_config: Config, tmp_path: Path) -> None:
    """Asked for, or the model's own."""
    tiny_config.train.sequence_parallel_size = 2
    tiny_config.attention.key_conv = 3
    refuses(tiny_config, "sequence_parallel_size=2 with attention.key_conv=3.*set train.sequence_parallel_size=1")
    model = load_model(tiny_config.model, Precision.fp32, 5)
    key_conv_folder.save(model, tmp_path)
    tiny_config.model.path, tiny_config.model.architecture = str(tmp_path), {}
    refuses(tiny_config, "attention.key_conv=3 and the model has key convolutions of width 5: set it to 5")
    tiny_config.attention.key_conv = 0
    refuses(tiny_config, "sequence_parallel_size=2 with attention.key_conv=5")


def test_another_tokenizer_than_the_models_own_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    """Ids that fit the vocabulary by chance would train on without a word."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moba_train.data.tokenizer import load_tokenizer, train_tokenizer

    keywords = {key: value for key, value in tiny_config.model.architecture.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **keywords)).save_pretrained(tmp_path / "model")
    train_tokenizer(["quite other words than those of the corpus"] * 9, 270).save(tmp_path / "model")
    tiny_config.model.path, tiny_config.model.architecture = str(tmp_path / "model"), {}
    refuses(tiny_config, "is not the tokenizer that model.path=.* set model.tokenizer=null")
    load_tokenizer(str(tiny_config.model.tokenizer)).save(tmp_path / "model")
    check_model(tiny_config)
