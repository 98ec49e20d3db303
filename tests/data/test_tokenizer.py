"""Tokenizers: training, the ways to load one, and encoding that does not read special tokens out of text."""

from __future__ import annotations

import lzma
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moba_train import embedded
from moba_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

DATA = embedded.folder("data")
TEXT = "The whale, the whale! It's 1851.\n\n\tNaïve — “quoted”  text\r\nwith <|endoftext|> in it. 鯨 🐋 \x00"


def books(name: str) -> str:
    return lzma.decompress((DATA / "books" / name).read_bytes()).decode()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer([books("train/carroll-alice.txt.xz")], 400)


def test_round_trip(small: Tokenizer) -> None:
    ids = small.encode_batch([TEXT, "", "a"])
    assert [array.dtype for array in ids] == [np.uint32] * 3
    assert small.decode(ids[0]) == TEXT
    assert len(ids[1]) == 0
    assert small.eos_id == 0 and small.eos_id not in ids[0]
    assert small.vocab_size == 400


def test_training_is_repeatable(small: Tokenizer) -> None:
    assert train_tokenizer([books("train/carroll-alice.txt.xz")], 400).sha256 == small.sha256
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* at least 257"):
        train_tokenizer(["a"], 256)


def test_every_way_to_load(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "folder")
    plain = tmp_path / "folder" / "tokenizer.json"
    packed = tmp_path / "tokenizer.json.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    for path in (tmp_path / "folder", plain, packed):
        loaded = load_tokenizer(str(path))
        assert (loaded.sha256, loaded.eos_id, loaded.vocab_size) == (small.sha256, 0, 400), path


def test_a_bare_file_is_saved_with_its_end_alone(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path, context_length=256)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.special_tokens_map == {"eos_token": "<|endoftext|>"}
    assert saved("the whale").input_ids == small.encode_batch(["the whale"])[0].tolist()


def test_a_folder_is_saved_as_it_was(tmp_path: Path) -> None:
    backend = train_tokenizer([TEXT], 280).backend
    backend.add_special_tokens(["<s>", "<|im_end|>", "<pad>", "<tool>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 280)])
    backend.enable_truncation(64)
    original = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=["<tool>"],
        padding_side="left",
        model_max_length=64,
        chat_template="{% for message in messages %}<s>{{ message.content }}<|im_end|>{% endfor %}",
    )
    original.save_pretrained(tmp_path / "original")
    loaded = load_tokenizer(str(tmp_path / "original"))
    assert loaded.backend.id_to_token(loaded.eos_id) == "<|im_end|>"
    for context_length, longest in ((32, 64), (128, 128)):
        loaded.save(tmp_path / "saved", context_length)
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert saved.model_max_length == longest
        assert saved.special_tokens_map == original.special_tokens_map
        assert saved.chat_template == original.chat_template
        assert saved.padding_side == "left"
        assert saved("<tool> the whale").input_ids == original("<tool> the whale").input_ids
        files = [(tmp_path / name / "tokenizer.json").read_text() for name in ("original", "saved")]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    ("path", "entries"), [("tokenizer/tokenizer.json", 4096), ("smollm2/tokenizer.json.xz", 49152)]
)
def test_embedded_tokenizers(path: str, entries: int) -> None:
    tokenizer = load_tokenizer(str(DATA / path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (entries, 0)
    assert tokenizer.backend.id_to_token(0) == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode_batch([TEXT])[0]) == TEXT
    cuts = tokenizer.cuts()
    assert cuts is not None
    # Where no space stands between letters: numbers, Chinese, lists of names, odd runs of line ends.
    text = "".join(f"{n},{n * n}\n鯨は、海の{'。' * (n % 3)}\n\n{TEXT}\nname_{n}\n_x\r\n{n} \n" for n in range(40))
    places = [0, *(cut.start() for cut in cuts.finditer(text)), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(places)]
    assert sum(part.endswith("\n") for part in parts) >= 80
    assert np.array_equal(np.concatenate(tokenizer.encode_batch(parts)), tokenizer.encode_batch([text])[0])


def test_start_marking_models_are_not_cut() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    assert Tokenizer(backend, 0, "made here").cuts() is None


def test_tokens_across_line_ends_leave_the_cuts_between_words() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(" ?[^ ]+"), "isolated")
    backend.train_from_iterator(
        ["\nthen", "word", "a"] * 9, trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    )
    cuts = Tokenizer(backend, 0, "made here").cuts()
    assert [cut.start() for cut in cuts.finditer("a word\nthen a")] == [1, 11]


@pytest.mark.parametrize("path", ["nowhere.json", "./nowhere", "/nowhere", "nowhere", "data/fetched/nowhere"])
def test_what_is_no_hub_name_is_refused_without_asking_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("moba_train.data.tokenizer._from_transformers")
    with pytest.raises(ValueError, match=rf"tokenizer '{path}' does not exist; name .* owner/name on the hub"):
        load_tokenizer(path)


def test_a_folder_must_name_its_end_of_text(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([TEXT], 280).backend).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"endless' names no eos_token; set it in its tokenizer_config\.json"):
        load_tokenizer(str(tmp_path / "endless"))


def test_a_text_without_ids_is_told_in_one_line() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "known": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"tokenizer 'made here' cannot encode a text \(.*UNK.*\): take another"):
        Tokenizer(backend, 0, "made here").encode_batch(["known", "unknown"])


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match="is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json.xz").write_bytes(b"not xz")
    with pytest.raises(ValueError, match="is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "tokenizer.json.xz"))
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(ValueError, match=r"has none of <\|endoftext\|>"):
        load_tokenizer(str(tmp_path / "endless.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded as a folder or hub name"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "empty/tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"cannot be loaded as a folder or hub name \(\w+Error: .*\): name a tokenizer.json"
    ):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_library_that_gives_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise AssertionError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match=r"cannot be loaded as a folder or hub name \(AssertionError\): name"):
        load_tokenizer(str(tmp_path))
