from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, masking_utils

from moba_train import hf_attention
from moba_train.attention.spec import AttentionSpec
from tiny import TINY_LLAMA

FULL = AttentionSpec("full")
MOBA = AttentionSpec("moba", block_size=16, top_k=2)
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "ernie4_5": {},
    "glm4": {"pad_token_id": 0},
    "granite": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},  # one projection for queries, keys and values
    "smollm3": {"pad_token_id": 0},
    "starcoder2": {"sliding_window": None},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 100},
}


def pair(kind: str = "llama", **changes: object):
    """The same random model with transformers' own eager attention and with ours."""
    hf_attention.register()
    own = ARCHITECTURES.get(kind, {})
    keywords = copy.deepcopy({**TINY_LLAMA, **own, **changes})  # GLM's adds to its rope_parameters
    keywords.pop("model_type")
    models = []
    for implementation in ("eager", hf_attention.NAME):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **keywords)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))
    return models


def loss_and_gradients(model, ids, **keywords):
    logits = model(ids, use_cache=False, **keywords).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("plan", ["full", "moba that covers all"])
def test_dense_equals_transformers(kind: str, plan: str) -> None:
    theirs, ours = pair(kind)
    spec = FULL if plan == "full" else AttentionSpec("moba", block_size=16, top_k=7)
    hf_attention.set_plan(ours, [spec] * 3)
    ids = torch.randint(300, (2, 100))
    loss, gradients = loss_and_gradients(ours, ids)
    expected, expected_gradients = loss_and_gradients(theirs, ids)
    assert abs(loss - expected) < 1e-5
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", ["full", "moba that covers all"])
def test_under_autocast_it_equals_transformers(plan: str) -> None:
    """Where parameters are fp32, RoPE gives query and key in fp32 beside a value in bf16."""
    theirs, ours = pair()
    theirs.set_attn_implementation("sdpa")
    hf_attention.set_plan(ours, [FULL if plan == "full" else AttentionSpec("moba", block_size=16, top_k=7)] * 3)
    ids = torch.randint(300, (2, 100))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(ours, ids)
        expected, expected_gradients = loss_and_gradients(theirs, ids)
    assert abs(loss - expected) < 1e-3
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert (got - want).abs().max() < 0.03 * want.abs().max()


def test_torch_compile_changes_nothing() -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [MOBA, MOBA, FULL])
    ids = torch.randint(300, (2, 50))
    expected, expected_gradients = loss_and_gradients(ours, ids)
    loss, gradients = loss_and_gradients(torch.compile(ours, backend="aot_eager"), ids)
    assert abs(loss - expected) < 1e-5
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_no_parameter_is_added_or_renamed() -> None:
    theirs, ours = pair()
    hf_attention.set_plan(ours, [MOBA] * 3)
    assert list(theirs.state_dict()) == list(ours.state_dict())


def test_the_plan_is_by_layer() -> None:
    ids = torch.randint(300, (1, 100))
    _, ours = pair()
    seen = {}
    for name, plan in {
        "full": [FULL] * 3,
        "moba": [MOBA] * 3,
        "last full": [MOBA, MOBA, FULL],
        "first full": [FULL, MOBA, MOBA],
    }.items():
        hf_attention.set_plan(ours, plan)
        seen[name] = ours(ids, use_cache=False).logits
    tensors = list(seen.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


@pytest.mark.parametrize("spec", [FULL, MOBA], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("given", ["position_ids", "bounds"])
def test_packed_segments_do_not_see_each_other(spec: AttentionSpec, given: str) -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [spec] * 3)
    ids = torch.randint(300, (1, 90))
    lengths = [33, 1, 56]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    keywords = {"position_ids": positions}
    if given == "bounds":
        # Fixed capacity: the end is repeated.
        keywords["cu_seq_lens_q"] = torch.tensor([0, 33, 34, 90, 90, 90], dtype=torch.int32)
        keywords["max_length_q"] = 90
    packed = ours(ids, use_cache=False, **keywords).logits
    alone = [ours(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "longest", "message"),
    [
        (torch.tensor([0, 30, 90]), 60, "cu_seqlens has dtype torch.int64; give torch.int32"),
        (torch.tensor([0, 30, 90], dtype=torch.int32, device="meta"), 60, "cu_seqlens is on meta and query on cpu"),
        (torch.tensor([0, 30, 80], dtype=torch.int32), 60, "cu_seqlens ends at 80 and query has 90 tokens"),
        (torch.tensor([0, 30, 90], dtype=torch.int32), 30, "max_length_q is 30 and the longest segment has 60 tokens"),
        (torch.tensor([0, 30, 90], dtype=torch.int32), None, "cu_seq_lens_q is given and max_length_q is not"),
    ],
    ids=["type", "device", "end", "longest", "no longest"],
)
def test_segment_bounds_that_do_not_fit_are_refused(bounds: torch.Tensor, longest: int | None, message: str) -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [MOBA] * 3)
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(1, 90, dtype=torch.long), use_cache=False, cu_seq_lens_q=bounds, max_length_q=longest)


def test_a_custom_scaling_is_honoured() -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.05
    hf_attention.set_plan(ours, [FULL] * 3)
    ids = torch.randint(300, (1, 40))
    torch.testing.assert_close(ours(ids, use_cache=False).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_mask_of_ones_is_fine_and_padding_is_refused() -> None:
    theirs, ours = pair()
    hf_attention.set_plan(ours, [FULL] * 3)
    ids = torch.randint(300, (2, 20))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        ours(ids, attention_mask=mask, use_cache=False).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5
    )
    mask[1, 15:] = 0
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        ours(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="cannot be honoured"):
        ours(ids, attention_mask=torch.zeros(2, 1, 20, 20), use_cache=False)


def test_decoding_from_a_cache_is_refused() -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [FULL] * 3)
    ids = torch.randint(300, (1, 20))
    cache = ours(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"1 queries against 21 keys.*use_cache=False"):
        ours(ids[:, :1], past_key_values=cache)


def test_sliding_windows_and_dropout_are_refused() -> None:
    _, ours = pair("mistral", sliding_window=32)
    hf_attention.set_plan(ours, [FULL] * 3)
    with pytest.raises(ValueError, match="sliding_window=32"):
        ours(torch.randint(300, (1, 20)), use_cache=False)
    _, ours = pair(attention_dropout=0.1)
    hf_attention.set_plan(ours.train(), [FULL] * 3)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        ours(torch.randint(300, (1, 20)), use_cache=False)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask", "sinks", "block_indices"])
def test_what_changes_scores_is_refused(name: str) -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [FULL] * 3)
    with pytest.raises(ValueError, match=rf"{name}=30\.0 is not part of the moba attention"):
        ours(torch.randint(300, (1, 20)), use_cache=False, **{name: 30.0})
    with pytest.raises(ValueError, match=rf"^a tensor as {name} is not part"):
        ours(torch.randint(300, (1, 20)), use_cache=False, **{name: torch.ones(4, 4)})


@pytest.mark.parametrize("name", ["llama is_causal", "gemma", "bert"])
def test_models_that_read_later_tokens_are_refused(name: str) -> None:
    """They ran, causally, to other results than their own."""
    if name == "bert":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 16}
        ours = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=300, **sizes), attn_implementation="moba")
    elif name == "gemma":
        _, ours = pair("gemma", pad_token_id=0, use_bidirectional_attention=True)
    else:
        _, ours = pair(is_causal=False)
    hf_attention.set_plan(ours.eval(), [FULL] * 3)
    with pytest.raises(ValueError, match=rf"(?i){name.split()[0]}.* lets tokens read later ones .* is causal: use a"):
        ours(torch.randint(300, (1, 20)))


def test_a_mask_that_adds_to_the_causal_one_is_refused() -> None:
    causal, packed = masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(torch.zeros(1, 9))
    image = masking_utils.or_masks(causal, lambda batch, head, query, key: key < 3)
    hf_attention.refuse_masks(1, 9, 9, config=AutoConfig.for_model("llama"), mask_function=causal)
    hf_attention.refuse_masks(
        1, 9, 9, config=AutoConfig.for_model("llama"), mask_function=masking_utils.and_masks(causal, packed)
    )
    with pytest.raises(ValueError, match="llama lets tokens read later ones"):
        hf_attention.refuse_masks(1, 9, 9, config=AutoConfig.for_model("llama"), mask_function=image)


def test_chunks_shorter_than_the_sequence_are_refused() -> None:
    _, ours = pair("llama4_text", attention_chunk_size=16)
    hf_attention.set_plan(ours, [FULL] * 3)
    with pytest.raises(ValueError, match="chunks of 16 tokens"):
        ours(torch.randint(300, (1, 20)), use_cache=False)


def test_plans_that_do_not_fit_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ValueError, match="no attention plan"):
        ours(torch.randint(300, (1, 20)), use_cache=False)
    with pytest.raises(ValueError, match="2 entries for 3 layers"):
        hf_attention.set_plan(ours, [FULL] * 2)
    with pytest.raises(ValueError, match=r"backend=fast is unknown: choose from auto, .*reference"):
        hf_attention.set_plan(ours, [FULL] * 3, backend="fast")


def test_a_plan_for_a_model_that_does_not_follow_it_is_refused():
    """transformers' own attention would go on, dense, without a word."""
    _, ours = pair()
    ours.set_attn_implementation("sdpa")
    message = r"attends through 'sdpa', which follows no plan: .* model\.set_attn_implementation\('moba'\) first"
    with pytest.raises(ValueError, match=message):
        hf_attention.set_plan(ours, [MOBA] * 3)
    ours.set_attn_implementation("moba")
    hf_attention.set_plan(ours, [MOBA] * 3)


def test_a_dense_checkpoint_loads_and_saves_unchanged(tmp_path) -> None:
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path / "dense")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attn_implementation=hf_attention.NAME)
    hf_attention.set_plan(ours, [MOBA] * 3)
    ours.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_named_backend_computes_its_kinds_and_leaves_the_others_to_auto() -> None:
    _, ours = pair()
    hf_attention.set_plan(ours, [MOBA, MOBA, FULL], backend="triton")
    assert [layer.self_attn.attention_backend for layer in ours.model.layers] == ["triton", "triton", "auto"]
    with pytest.raises(ValueError, match="backend=triton cannot run here: it needs a CUDA device"):
        ours(torch.randint(300, (1, 20)), use_cache=False)
