"""Speed of the data path: python scripts/bench_data.py loader | prepare

loader    tokens a second of one rank's loader, with a mix of three sources by weight and length, at 32K and at 1M; what
          a step waits for its batches when a model takes them at the pace of an H200; and the time and memory of
          opening the store
prepare   MB/s and peak memory of preparing a store, beside the tokenizer library alone on the same text and cores, in
          turns, each in a process of its own: what else the machine does falls on both;
          --kills N kills the preparation N times at random and compares the finished store with the unbroken one's
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moba_train import embedded
from moba_train.config import DataConfig, MixConfig, SourceConfig, SourceFormat
from moba_train.data import build
from moba_train.data.documents import read_documents
from moba_train.data.encode import BATCH_CHARACTERS, PIECE_CHARACTERS
from moba_train.data.loader import RowLoader
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store

CONTEXTS = (32768, 1 << 20)
# What a 1B model trains at on one H200 at 32K; the loader is to be 20 times as fast.
CONSUMED = 25_000  # tokens/s
PACE = 20 * CONSUMED  # at which the waits are measured: as one H200 would be slow to show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "prepare", *CHILDREN])
    parser.add_argument("--tokens", type=int, default=300_000_000, help="of the loader's made-up store")
    parser.add_argument("--path", default=str(embedded.folder("data") / "books"), help="of the text to prepare")
    parser.add_argument("--format", default="text", choices=[format.value for format in SourceFormat])
    parser.add_argument("--tokenizer", default=str(embedded.folder("data") / "tokenizer" / "tokenizer.json"))
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--shard-megabytes", type=int, default=build.SHARD_BYTES >> 20)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)  # of a child
    arguments = parser.parse_args()
    if arguments.what in CHILDREN:
        CHILDREN[arguments.what](arguments)
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
    for context in CONTEXTS:
        bench_rows(store, context, rows_per_step=max(1, (1 << 19) // context))


def bench_rows(store: TokenStore, context: int, rows_per_step: int) -> None:
    mix = MixConfig(weights={"code": 0.4, "books": 0.4, "web": 0.2}, length_weights={32768: 2.0}, full_rows=0.5)
    start = time.perf_counter()
    loader = RowLoader(store, context, rows_per_step, mix=mix)
    print(
        f"{context:,} tokens a row: {len(loader.mix.rows):,} rows in {len(loader.mix.pools)} pools, packed in "
        f"{time.perf_counter() - start:.2f} s; {loader.mix.padding_share:.2%} padding, {loader.mix.full_share:.0%} full"
    )
    loader.next_step(1)
    steps, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 5:
        loader.next_step(1)
        steps += 1
    tokens_per_step = rows_per_step * context
    rate = steps * tokens_per_step / seconds
    waits = []
    for _ in range(8):
        time.sleep(tokens_per_step / PACE)
        loader.next_step(1)
        waits.append(loader.waited)
    print(
        f"  {rate:,.0f} tokens/s on one core, {rate / CONSUMED:.0f} times what one H200 takes; at {PACE:,} tokens/s a "
        f"step of {tokens_per_step:,} waits {1000 * statistics.median(waits):.2f} ms, at most {1000 * max(waits):.2f}"
    )


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
    alone = [run_child("alone", arguments, folder)]
    ratios, rates, peaks, cpu_ratios = [], [], [], []
    for number in range(arguments.rounds):
        whole = folder / f"whole{number}"
        prepared = run_child("child", arguments, whole)
        alone.append(run_child("alone", arguments, folder))
        megabytes = alone[0].result[0]
        around = statistics.mean(megabytes / one.result[1] for one in alone[-2:])  # MB/s before and after
        rates.append(megabytes / prepared.result[0])
        ratios.append(rates[-1] / around)
        cpu_ratios.append(statistics.mean(one.cpu_seconds for one in alone[-2:]) / prepared.cpu_seconds)
        peaks.append(prepared.peak_mb)
        print(
            f"round {number + 1}: prepare {rates[-1]:.2f} MB/s, the tokenizer alone {around:.2f} before and after: "
            f"{ratios[-1]:.0%}",
            flush=True,
        )
    store = only_store(whole)
    print(f"text: {megabytes:,.1f} MB; {len(store):,} documents, {store.tokens:,} tokens")
    print(
        f"prepare: {statistics.median(rates):.2f} MB/s, {statistics.median(ratios):.0%} of the tokenizer alone by wall "
        f"time, {statistics.median(cpu_ratios):.0%} by CPU time (medians of {arguments.rounds}); "
        f"peak {max(peaks):,.0f} MB"
    )
    if arguments.kills:
        kill_often(arguments, folder, prepared.seconds, store)


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
        run_child("child", arguments, path)
        rounds += 1
        killed = only_store(path)
        killed.verify()
        if killed.manifest != whole.manifest:
            raise SystemExit(f"the store that was interrupted differs: {killed.path}")
    print(f"killed {kills} times in {rounds} preparations: the unbroken one's manifest, every sha256 in it")


def prepare_child(arguments: argparse.Namespace) -> None:
    """Seconds of the preparation, from the call to the flushed store: all but Python's own start."""
    build.SHARD_BYTES = arguments.shard_megabytes << 20
    data, start = data_config(arguments, arguments.store), time.perf_counter()
    prepare_store(data, arguments.tokenizer, progress=False)
    print(time.perf_counter() - start)


def alone_child(arguments: argparse.Namespace) -> None:
    """MB of text and the seconds that the tokenizer library spends on them: no reading, no storing.

    In batches of the size that the preparation uses, of pieces as short, so that every core has work.
    """
    tokenizer = load_tokenizer(arguments.tokenizer)
    size, seconds = 0, 0.0
    for batch in batches(arguments):
        start = time.perf_counter()
        tokenizer.backend.encode_batch_fast(
            [piece for text in batch for piece in pieces(text)], add_special_tokens=False
        )
        seconds += time.perf_counter() - start
        size += sum(len(text.encode()) for text in batch)
    print(size / 1e6, seconds)


CHILDREN = {"child": prepare_child, "alone": alone_child}


def batches(arguments: argparse.Namespace) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in read_documents(data_config(arguments, "").train[0]):
        batch.append(document["text"])
        if sum(map(len, batch)) >= BATCH_CHARACTERS:
            yield batch
            batch = []
    yield batch


def pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def data_config(arguments: argparse.Namespace, store: str) -> DataConfig:
    source = SourceConfig(name="text", format=SourceFormat(arguments.format), path=arguments.path)
    return DataConfig(name="bench", train=[source], store_dir=store)


def child_command(what: str, arguments: argparse.Namespace, store: Path) -> list[str]:
    given = ["--path", arguments.path, "--format", arguments.format, "--tokenizer", arguments.tokenizer]
    given += ["--shard-megabytes", str(arguments.shard_megabytes)]
    return [sys.executable, __file__, what, *given, "--store", str(store)]


@dataclass
class Child:
    """What a process printed, and what it took."""

    result: list[float]
    seconds: float
    peak_mb: float
    cpu_seconds: float


def run_child(what: str, arguments: argparse.Namespace, store: Path) -> Child:
    start = time.perf_counter()
    process = subprocess.Popen(child_command(what, arguments, store), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} ended with status {status}")
    seconds = time.perf_counter() - start
    return Child([*map(float, printed.split())], seconds, usage.ru_maxrss / 1e3, usage.ru_utime + usage.ru_stime)


def kill_child_after(arguments: argparse.Namespace, store: Path, seconds: float) -> bool:
    """Prepare for so long, then kill. False where the preparation was done before."""
    process = subprocess.Popen(child_command("child", arguments, store), stdout=subprocess.DEVNULL)
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
