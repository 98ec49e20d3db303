"""Small made things that several tests share."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from moba_train.config import (
    AttentionKind,
    Config,
    Device,
    ModelConfig,
    RopeConfig,
    SourceConfig,
    StageAttentionConfig,
    StageConfig,
    WandbMode,
)
from tiny import TINY_LLAMA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--live", action="store_true", help="print each test's seconds, and why it failed, as it ends")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--live") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Live())


class Live:
    """Nothing that was seen is lost with a run that is cut off, by a hang or by its time."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.running: dict[str, None] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            at = f"{time.monotonic() - self.start:5.0f} s"
            told = "; ".join(str(value) for _, value in report.user_properties)
            print(f"\n{at}  {report.outcome} in {report.duration:.1f} s: {report.nodeid} {told}", end=" ", flush=True)
        if report.failed:
            print(f"\n{report.longreprtext[-4000:]}", flush=True)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)

    def pytest_sessionfinish(self) -> None:
        for nodeid in self.running:
            print(f"\ndid not end: {nodeid}", flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests on a GPU first, so that no process ends with one while the others wait."""
    items.sort(key=lambda item: "test_kernels_gpu" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder with train/ and heldout/ text files, and the tokenizer.json trained on them."""
    from moba_train.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "whale", "and", "sea", "sailed", "under", "a", "white", "moon", "to", "harbour", "again"]
    generator = torch.Generator().manual_seed(1)

    def text(count: int) -> str:
        drawn = torch.randint(len(words), (count,), generator=generator)
        return " ".join(words[i] for i in drawn.tolist())

    texts = {"train/a": text(3000), "train/b": text(1500), "train/c": text(70), "heldout/d": text(800)}
    for name, content in texts.items():
        file = folder / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    train_tokenizer(texts.values(), 300).backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tiny_config(tiny_corpus: Path, tmp_path: Path) -> Config:
    """Two stages, MoBA at 128 tokens and full at 256 with another RoPE, six steps in all."""
    return _tiny_config(tiny_corpus, tmp_path)


@pytest.fixture(scope="module")
def tiny_config_module(tiny_corpus: Path, tmp_path_factory) -> Config:
    """The same for the tests of a module that share a run; not to be changed."""
    return _tiny_config(tiny_corpus, tmp_path_factory.mktemp("config"))


def _tiny_config(corpus: Path, folder: Path) -> Config:
    config = Config()
    config.run.name, config.run.dir = "tiny", str(folder / "runs")
    config.model = ModelConfig(
        name="tiny_llama", architecture=dict(TINY_LLAMA), tokenizer=str(corpus / "tokenizer.json")
    )
    config.attention.block_size, config.attention.top_k = 16, 2
    config.data.name = "tiny"
    config.data.train = [SourceConfig(name="train", path=str(corpus / "train"))]
    config.data.heldout = [SourceConfig(name="heldout", path=str(corpus / "heldout"))]
    config.data.store_dir = str(corpus / "store")
    config.schedule.stages = [
        StageConfig("moba", tokens=2048, context_length=128),
        StageConfig(
            "full",
            tokens=1024,
            context_length=256,
            attention=StageAttentionConfig(kind=AttentionKind.full),
            rope=RopeConfig(rope_theta=20000.0),
        ),
    ]
    config.train.tokens_per_step = 512
    config.train.loss_tile_tokens = 100
    config.position_loss.bin_size, config.position_loss.log_every = 32, 3
    config.evaluate.rows = 2
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 3
    config.wandb.mode = WandbMode.disabled
    config.launch.device = Device.cpu
    config.launch.threads = 1
    return config


@pytest.fixture
def tiny_overrides(tiny_corpus: Path, tmp_path: Path) -> list[str]:
    """A run of four steps for the command line."""
    architecture = "{model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2}"
    return [
        "model=books_tiny",
        *("model.name=tiny", f"model.tokenizer={tiny_corpus}/tokenizer.json", f"model.architecture={architecture}"),
        *("model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=2"),
        f"data.train=[{{name: train, path: {tiny_corpus}/train}}]",
        f"data.heldout=[{{name: heldout, path: {tiny_corpus}/heldout}}]",
        *(f"data.store_dir={tmp_path}/store", f"run.dir={tmp_path}/runs", "schedule.tokens=null"),
        "schedule.stages=[{name: short, tokens: 2048, context_length: 128, attention: {block_size: 32}}]",
        *("train.tokens_per_step=512", "launch.device=cpu", "launch.threads=1", "wandb.mode=disabled"),
    ]
