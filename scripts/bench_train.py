"""Training speed and memory on a GPU or several, MoBA against dense attention: python scripts/bench_train.py [CASE ...]

Whole optimizer steps through ``train_step.optimize`` and DeepSpeed, of models with random weights on random tokens, one
row one segment. Dense is the kind ``full``: torch's attention with cuDNN. Where a dense step would take minutes,
attention of a quarter of one layer's heads is timed and multiplied, the rest of the step taken from MoBA's; marked (*).
Utilisation counts the model's operations alone, MoBA's with the keys that it reads, over the data sheet's peak. Every
case has processes of its own, so that none finds what another left in memory; memory is rank 0's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as ``parallel.variables`` sets it for a run

import torch
import torch.distributed as dist
import yaml
from bench_train_cases import CASES, FULL, KEPT, Case, moba
from bench_train_processes import apart
from bench_train_profile import breakdown
from omegaconf import OmegaConf

from moba_train import hf_attention
from moba_train.assemble import assemble, with_switches
from moba_train.attention import AttentionSpec, full_attention, moba_attention
from moba_train.batch import model_inputs
from moba_train.config import Config, ModelConfig, TrainConfig
from moba_train.data.loader import Batch
from moba_train.embedded import folder
from moba_train.loss import IGNORE
from moba_train.metrics import PositionLoss, Throughput, peak_flops
from moba_train.model import load_model
from moba_train.observe import OwnTime
from moba_train.offload import HostMemory
from moba_train.parallel.engine import set_accumulation
from moba_train.parallel.sequence import sequence_group, share_rows
from moba_train.run import Run
from moba_train.runtime import Runtime, seed_everything
from moba_train.skipped import SkippedSteps
from moba_train.train_step import optimize
from moba_train.validate import micro_batch_rows

LONGEST_PROFILE = 10  # seconds of a step
HEADS_SHARE = 4  # of a layer's heads, one in as many is timed; their work is independent and fills the GPU by far


class RandomRows:
    """The loader of a step: this rank's rows of random tokens, each one segment."""

    def __init__(self, case: Case, vocabulary: int, runtime: Runtime) -> None:
        self._vocabulary, self.context = vocabulary, case.context
        self._rows = case.rows // runtime.data_parallel_size
        self._generator = torch.Generator().manual_seed(runtime.data_parallel_rank)

    def next_step(self, micro_batch_rows: int) -> list[Batch]:
        return [self._batch(micro_batch_rows) for _ in range(self._rows // micro_batch_rows)]

    def _batch(self, rows: int) -> Batch:
        length = self.context
        ids = torch.randint(self._vocabulary, (rows, length), generator=self._generator)
        labels = ids.clone()
        labels[:, 0] = IGNORE
        bounds = torch.arange(rows + 1, dtype=torch.int32) * length
        return Batch(ids, labels, torch.arange(length).repeat(rows, 1), bounds, length)


def architecture(name: str) -> dict[str, Any]:
    if name == "tiny":
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}
        return {**architecture("smollm2_135m"), **heads, **sizes}
    return yaml.safe_load((folder("configs") / f"model/{name}.yaml").read_text())["architecture"]


def configuration(case: Case, device: torch.device) -> Config:
    config = Config(model=ModelConfig(name=case.model, architecture=dict(architecture(case.model))))
    config.model.architecture["max_position_embeddings"] = case.context
    on_gpu = device.type == "cuda"
    defaults = {"precision": "bf16", "zero_stage": 1} if on_gpu else {}
    settings = OmegaConf.merge(OmegaConf.structured(TrainConfig), defaults, case.switches)
    config.train = OmegaConf.to_object(settings)  # type: ignore[assignment]
    config.train.tokens_per_step = case.rows * case.context
    return config


def build(case: Case, runtime: Runtime) -> Run:
    """A run as far as ``train_step.optimize`` reads it: without data, log and checkpoints."""
    config = configuration(case, runtime.device)
    seed_everything(0)
    with runtime.device:  # random weights are made where they will be: much faster
        model = load_model(config.model, config.train.precision)
    if case.gradients_only:
        engine: Any = with_switches(model, config, runtime)
    else:
        engine = assemble(model, config, runtime)
        if runtime.sequence_parallel_size > 1:
            share_rows(model, sequence_group(runtime, timedelta(minutes=config.launch.timeout_minutes)))
        own_rows = case.rows // runtime.data_parallel_size
        set_accumulation(engine, own_rows // micro_batch_rows(config, case.context))
    absent = dict.fromkeys(("folder", "store", "heldout", "heldout_batches", "tracker", "interruption", "own_rope"))
    run = Run(
        config=config,
        runtime=runtime,
        schedule=SimpleNamespace(tokens_per_step=config.train.tokens_per_step),
        model=model,
        engine=engine,
        throughput=Throughput(peak_flops(runtime.device, torch.bfloat16) * runtime.world_size, window=1),
        own_time=OwnTime(runtime.device),
        watchdog=SimpleNamespace(beat=lambda doing: None),
        skipped=SkippedSteps(config.train.nonfinite_limit),
        **absent,
    )
    run.loader = RandomRows(case, model.config.vocab_size, runtime)
    run.bins = PositionLoss(case.context, 2048, runtime.device)
    return run


def gradients(run: Run) -> dict[str, float]:
    """Forward and backward pass of one batch, without an engine."""
    batch = run.loader.next_step(1)[0]
    loss, _ = run.engine(**model_inputs(batch, run.runtime), scale=1 / (run.loader.context - 1))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in run.engine.parameters()])
    run.engine.zero_grad()
    return {"train/loss": loss.item(), "train/gradient_norm": float(norm)}


def steps(run: Run, case: Case, attention: AttentionSpec, until: float) -> dict[str, Any]:
    """Time steps with one attention in every layer."""
    layers = run.model.config.num_hidden_layers
    hf_attention.set_plan(run.model, [attention] * layers)
    run.stage = SimpleNamespace(context_length=case.context, plan=lambda count: [attention] * count)
    device = run.runtime.device
    step = gradients if case.gradients_only else optimize
    times, rates, row = [], [], {}
    for index in range(case.warm + case.steps):
        if times and too_late(times[-1], until, device):
            break
        if index == case.warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run.throughput.restart()
        synchronize(device)
        began = time.perf_counter()
        row = step(run)
        synchronize(device)
        times.append(time.perf_counter() - began)
        rates.append(run.throughput.as_row())
        run.step += 1
        run.own_time.take()
    timed = times[case.warm :] or times
    seconds = statistics.median(timed)
    found = {
        "attention": asdict(attention),
        "step_seconds": seconds,
        "all_step_seconds": times,
        "tokens_per_second": case.rows * case.context / seconds,
        "model_flop_utilization": rates[-1].get("perf/model_flop_utilization", 0) * times[-1] / seconds,
        "hardware_flop_utilization": rates[-1].get("perf/hardware_flop_utilization", 0) * times[-1] / seconds,
        "loss": row["train/loss"],
        "gradient_norm": row["train/gradient_norm"],
        "host_gb": host_gb(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
            "used_bytes": total - free,
            "between_steps_bytes": torch.cuda.memory_allocated(device),
        }
    if case.profile and seconds < LONGEST_PROFILE and not too_late(2 * seconds, until, device):
        found["breakdown_seconds"] = breakdown(lambda: step(run), device)
    return found


def too_late(seconds: float, until: float, device: torch.device) -> bool:
    """Whether so many more would not end in time, by any rank's clock: all of them stop, or none."""
    late = torch.tensor(float(time.monotonic() + seconds > until), device=device)
    dist.all_reduce(late, dist.ReduceOp.MAX)
    return bool(late)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_gb() -> float:
    """Resident memory of this process, pinned memory included, in 1e9 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


def layer_seconds(case: Case, attention: AttentionSpec, device: torch.device) -> dict[str, float]:
    """Forward and backward of one layer's attention at the case's length: of HEADS_SHARE of its heads, multiplied."""
    shape = architecture(case.model)
    share = math.gcd(HEADS_SHARE, shape["num_key_value_heads"])
    heads, kv_heads = (shape[name] // share for name in ("num_attention_heads", "num_key_value_heads"))
    head_dim = shape["head_dim"]
    q, k, v, d_out = (
        torch.randn(case.context, n, head_dim, device=device, dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def call() -> torch.Tensor:
        if attention == FULL:
            return full_attention(q, k, v)
        return moba_attention(q, k, v, block_size=attention.block_size, top_k=attention.top_k)

    marks = []
    for _ in range(2):
        synchronize(device)
        marks.append(time.perf_counter())
        out = call()
        synchronize(device)
        marks.append(time.perf_counter())
        torch.autograd.grad(out, inputs, d_out)
        synchronize(device)
        marks.append(time.perf_counter())
        del out
        if marks[-1] - marks[0] > 20:
            break
    return {"forward": share * (marks[-2] - marks[-3]), "backward": share * (marks[-1] - marks[-2])}


def fill_host(case: Case, device: torch.device) -> None:
    """Make torch's allocator hold the pinned memory of offloaded hidden states, which a first step would wait for."""
    shape = architecture(case.model)
    size = shape["num_hidden_layers"] * case.rows * case.context * shape["hidden_size"] * 2
    memory = HostMemory(device)
    del memory.take(size)[:]


def measure(case: Case, until: float, runtime: Runtime) -> list[dict[str, Any]]:
    """A row for each attention of a case."""
    runtime = replace(runtime, sequence_parallel_size=case.switches.get("sequence_parallel_size", 1))
    sizes = {"context_length": case.context, "rows": case.rows, "gpus": runtime.world_size}
    common = {"case": case.name, "model": case.model, **sizes}
    try:
        run = build(case, runtime)
        if case.warm == 0 and run.config.train.offload.hidden_states:
            fill_host(case, runtime.device)
        built = torch.cuda.memory_allocated() if runtime.device.type == "cuda" else 0
        rows = []
        for attention in case.attentions:
            row = steps(run, case, attention, until)
            switches = OmegaConf.to_container(OmegaConf.structured(run.config.train), enum_to_str=True)
            rows.append({**common, "train": switches, "built_bytes": built, **row})
            if runtime.is_main:
                show(rows[-1])
        if not case.gradients_only:
            run.engine.destroy()
    except torch.OutOfMemoryError as error:
        rows = [{**common, "switches": case.switches, "error": " ".join(str(error).split())[:300]}]
        show(rows[-1])
    run = None
    release()
    if case.dense_layer and "step_seconds" in rows[-1]:
        rows.append(dense_estimate(case, rows[-1], runtime.device))
        show(rows[-1])
    return rows


def dense_estimate(case: Case, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A dense step from MoBA's step and one layer's attention of each kind."""
    layers = architecture(case.model)["num_hidden_layers"]
    passes = 1 if case.switches.get("keep_attention") else 2  # forward passes of attention in a step
    layer = {spec.kind: layer_seconds(case, spec, device) for spec in (case.attentions[0], FULL)}
    seconds = row["step_seconds"]
    for kind, sign in (("moba", -1), ("full", 1)):
        seconds += sign * layers * case.rows * (passes * layer[kind]["forward"] + layer[kind]["backward"])
    shared = {key: row[key] for key in ("case", "model", "context_length", "rows", "gpus", "train")}
    tokens_per_second = case.rows * case.context / seconds
    return {
        **shared,
        "attention": asdict(FULL),
        "estimated_from_layer_seconds": layer,
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
    }


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def covering_top_k(runtime: Runtime) -> dict[str, float]:
    """The loss with a top_k that covers the row, MoBA against dense: the same function."""
    case = Case("check", "tiny", 2048, (FULL,), switches=KEPT)
    run = build(replace(case, steps=1, warm=0), runtime)
    batch = run.loader.next_step(1)[0]
    found = {}
    for name, attention in (("full", FULL), ("moba", moba(256, 8))):
        hf_attention.set_plan(run.model, [attention] * run.model.config.num_hidden_layers)
        loss, _ = run.engine(**model_inputs(batch, runtime), scale=1 / case.context)
        found[name] = float(loss)
    run.engine.destroy()
    release()
    if abs(found["moba"] - found["full"]) > 1e-3 * found["full"]:
        raise SystemExit(f"error: MoBA with a covering top_k has loss {found['moba']}, dense {found['full']}")
    return found


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['case']:>38}  {row['error']}", flush=True)
        return
    spec = row["attention"]
    kind = f"{spec['block_size']} x {spec['top_k']}" if spec["kind"] == "moba" else "dense"
    star = "*" if "estimated_from_layer_seconds" in row else " "
    line = f"{row['case']:>38} {kind:>9} {row['step_seconds']:9.3f}{star} s {row['tokens_per_second']:9.0f} tokens/s"
    if not star.strip():
        line += (
            f"  {100 * row['model_flop_utilization']:5.1f} % of peak"
            f" (hardware {100 * row['hardware_flop_utilization']:5.1f} %)  loss {row['loss']:.4f}"
            f"  {row.get('allocated_bytes', 0) / 1e9:6.1f} GB, host {row['host_gb']:5.1f} GB"
        )
    print(line, flush=True)
    for name, seconds in (row.get("breakdown_seconds") or {}).items():
        print(f"{'':>50}{name:>28} {1e3 * seconds:9.1f} ms", flush=True)


def belongs(case: Case, name: str) -> bool:
    """``switch`` names all cases of that group."""
    return case.name == name or case.name.startswith(f"{name} ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after this many")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of train, everywhere"
    )
    arguments = parser.parse_args()
    wanted = arguments.cases or ["32k", "128k", "512k", "1m"]
    if unknown := [name for name in wanted if not any(belongs(case, name) for case in CASES)]:
        raise SystemExit(f"error: unknown case {unknown[0]}: choose from {', '.join(c.name for c in CASES)}")
    changes = OmegaConf.to_container(OmegaConf.from_dotlist(arguments.set))
    until = time.monotonic() + arguments.seconds
    report: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "rows": []}
    report |= apart(machine) or {}
    if "covering_top_k" not in report:
        raise SystemExit("error: the check of a covering top_k failed, see above")
    print("{device}, torch {torch}; a covering top_k equals dense: {covering_top_k}".format(**report), flush=True)
    for case in CASES:
        if not any(belongs(case, name) for name in wanted):
            continue
        if time.monotonic() > until:
            print(f"{case.name:>38}  not begun: {arguments.seconds} s are over", flush=True)
            continue
        case = replace(case, switches={**copy.deepcopy(case.switches), **changes})
        if torch.cuda.is_available() and torch.cuda.device_count() < case.gpus:
            print(f"{case.name:>38}  not begun: it needs {case.gpus} GPUs", flush=True)
            continue
        rows = apart(measure, case, until, gpus=case.gpus)
        report["rows"] += [{"case": case.name, "error": "its process ended, see above"}] if rows is None else rows
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1))


def machine(runtime: Runtime) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "covering_top_k": covering_top_k(runtime)}


if __name__ == "__main__":
    main()
