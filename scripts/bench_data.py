"""Speed of the data path: python scripts/bench_data.py loader | prepare

loader    tokens a second of one rank's loader, with a mix of three sources by weight and length, at 32K; and the time
          and memory of opening the store
prepare   MB/s and peak memory of preparing a store, beside the tokenizer library alone on the same text and cores;
          --kills N kills the preparation N times at random and compares the finished store with the unbroken one's
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moba_train import embedded
from moba_train.config import DataConfig, MixConfig, SourceConfig, SourceFormat
from moba_train.data import build
from moba_train.data.documents import read_documents
from moba_train.data.loader import RowLoader
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store

CONTEXT = 32768
# What a 1B model trains at on one H200 at this context; the loader is to be 20 times as fast.
CONSUMED = 25_000  # tokens/s
BATCH_CHARACTERS = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "prepare", "child"])
    parser.add_argument("--tokens", type=int, default=300_000_000, help="of the loader's made-up store")
    parser.add_argument("--path", default=str(embedded.folder("data") / "books"), help="of the text to prepare")
    parser.add_argument("--format", default="text", choices=[format.value for format in SourceFormat])
    parser.add_argument("--tokenizer", default=str(embedded.folder("data") / "tokenizer" / "tokenizer.json"))
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--shard-megabytes", type=int, default=build.SHARD_BYTES >> 20)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)  # of a child
    arguments = parser.parse_args()
    if arguments.what == "child":
        build.SHARD_BYTES = arguments.shard_megabytes << 20
        prepare_store(data_config(arguments, arguments.store), arguments.tokenizer, progress=False)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        (bench_loader if arguments.what == "loader" else bench_prepare)(arguments, Path(folder))


def bench_loader(arguments: argparse.Namespace, folder: Path) -> None:
    make_store(folder / "store", arguments.tokens)
    before, start = resident_mb(), time.perf_counter()
    store = TokenStore.open(folder / "store")
    print(
        f"store: {store.tokens:,} tokens, {len(store):,} documents; opened in {time.perf_counter() - start:.2f} s, "
        f"{resident_mb() - before:.0f} MB"
    )
    mix = MixConfig(weights={"code": 0.4, "books": 0.4, "web": 0.2}, length_weights={CONTEXT: 2.0}, full_rows=0.5)
    start = time.perf_counter()
    loader = RowLoader(store, CONTEXT, rows_per_step=16, mix=mix)
    print(
        f"mix: {len(loader.mix.rows):,} rows of {CONTEXT:,} in {len(loader.mix.pools)} pools, packed in "
        f"{time.perf_counter() - start:.2f} s; {loader.mix.padding_share:.2%} padding, {loader.mix.full_share:.0%} full"
    )
    loader.next_step(1)
    steps, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 5:
        loader.next_step(1)
        steps += 1
    rate = steps * 16 * CONTEXT / seconds
    print(f"loader: {rate:,.0f} tokens/s on one core, {rate / CONSUMED:.0f} times what one H200 takes")


def make_store(path: Path, total: int) -> None:
    """Documents of log-normal lengths, of three sources; ids drawn at random."""
    draw = np.random.default_rng(0)
    writer = StoreWriter(path, vocab_size=50_000, shard_bytes=256 << 20)
    ids = draw.integers(1, 50_000, 1 << 22, dtype=np.uint16)
    done = 0
    while done < total:
        source = int(draw.integers(3))
        length = int(np.clip(draw.lognormal((10, 11, 7)[source], 1.2), 1, 1 << 21))
        if writer.add([ids[:length]], source):
            writer.close_shard({})
        done += length
    writer.close_shard({})
    writer.finish({"eos_id": 0, "sources": [{"name": name} for name in ("code", "books", "web")]})


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def bench_prepare(arguments: argparse.Namespace, folder: Path) -> None:
    before = time.process_time()
    megabytes, documents, seconds = tokenizer_alone(arguments)
    alone, alone_cpu = megabytes / seconds, time.process_time() - before
    print(
        f"text: {megabytes:,.1f} MB in {documents:,} documents; tokenizer alone {alone:.2f} MB/s, {alone_cpu:.0f} CPU "
        "seconds with reading"
    )
    start = time.perf_counter()
    peak, cpu = run_child(arguments, folder / "whole")
    seconds = time.perf_counter() - start
    rate = megabytes / seconds
    store = only_store(folder / "whole")
    print(
        f"prepare: {rate:.2f} MB/s with its start, {rate / alone:.0%} of the tokenizer alone, {cpu:.0f} CPU seconds; "
        f"peak {peak:,.0f} MB; "
        f"{store.tokens:,} tokens in {len(store.manifest['shards'])} shards"
    )
    if arguments.kills:
        kill_often(arguments, folder, seconds, store)


def kill_often(arguments: argparse.Namespace, folder: Path, seconds: float, whole: TokenStore) -> None:
    """Prepare anew with kills at random times, and again, until there were as many as asked for."""
    draw = random.Random(0)
    kills, rounds = 0, 0
    while kills < arguments.kills:
        path = folder / f"killed{rounds}"
        while kills < arguments.kills and kill_child_after(
            arguments, path, draw.uniform(0, 2 * seconds / arguments.kills)
        ):
            kills += 1
        run_child(arguments, path)
        rounds += 1
        killed = only_store(path)
        killed.verify()
        if killed.manifest != whole.manifest:
            raise SystemExit(f"the store that was interrupted differs: {killed.path}")
    print(f"killed {kills} times in {rounds} preparations: the unbroken one's manifest, every sha256 in it")


def tokenizer_alone(arguments: argparse.Namespace) -> tuple[float, int, float]:
    """MB of text, documents, and the seconds that the tokenizer library spends on them: no reading, no storing.

    In batches of the size that the preparation uses, of pieces as short, so that every core has work.
    """
    tokenizer = load_tokenizer(arguments.tokenizer)
    size, documents, seconds = 0, 0, 0.0
    for batch in batches(arguments):
        start = time.perf_counter()
        tokenizer.backend.encode_batch_fast(
            [piece for text in batch for piece in pieces(text)], add_special_tokens=False
        )
        seconds += time.perf_counter() - start
        documents += len(batch)
        size += sum(len(text.encode()) for text in batch)
    return size / 1e6, documents, seconds


def batches(arguments: argparse.Namespace) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in read_documents(data_config(arguments, "").train[0]):
        batch.append(document["text"])
        if sum(map(len, batch)) >= BATCH_CHARACTERS:
            yield batch
            batch = []
    yield batch


def pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), 1 << 15):
        yield text[start : start + (1 << 15)]


def data_config(arguments: argparse.Namespace, store: str) -> DataConfig:
    source = SourceConfig(name="text", format=SourceFormat(arguments.format), path=arguments.path)
    return DataConfig(name="bench", train=[source], store_dir=store)


def child_command(arguments: argparse.Namespace, store: Path) -> list[str]:
    given = ["--path", arguments.path, "--format", arguments.format, "--tokenizer", arguments.tokenizer]
    given += ["--shard-megabytes", str(arguments.shard_megabytes)]
    return [sys.executable, __file__, "child", *given, "--store", str(store)]


def run_child(arguments: argparse.Namespace, store: Path) -> tuple[float, float]:
    """Prepare in a process of its own; its peak memory in MB and CPU seconds."""
    process = subprocess.Popen(child_command(arguments, store))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the preparation ended with status {status}")
    return usage.ru_maxrss / 1e3, usage.ru_utime + usage.ru_stime


def kill_child_after(arguments: argparse.Namespace, store: Path, seconds: float) -> bool:
    """Prepare for so long, then kill. False where the preparation was done before."""
    process = subprocess.Popen(child_command(arguments, store))
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the preparation ended with status {process.returncode}")
    return process.returncode != 0


def only_store(folder: Path) -> TokenStore:
    (made,) = folder.glob("bench-*")
    return TokenStore.open(made / "train")


if __name__ == "__main__":
    main()
