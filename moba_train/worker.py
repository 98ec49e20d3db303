"""What a launched rank runs: a resolved configuration in, ``result.json`` out. No Hydra here.

    python -m moba_train.worker --config RUN/resolved.yaml

Exit codes: 0 done; 2 the configuration, the data or a checkpoint cannot be used; 3 the loss or the gradient was not
finite; 4 the GPU's memory does not suffice; 5 no progress within launch.timeout_minutes; 130 interrupted; 143, 138 or
140 saved and ended on SIGTERM, SIGUSR1 or SIGUSR2; 1 anything else, a full disk among it.
"""

from __future__ import annotations

import signal

# A shell has its background jobs ignore SIGINT, for the Ctrl-C of what runs in front: then it stays ignored.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what follows takes seconds to import: Ctrl-C is no traceback there

import argparse
import errno
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moba_train import metrics_file, resolved, result_file
from moba_train.config import Config, OffloadDevice
from moba_train.parallel import lifetime
from moba_train.parallel.interruption import Interrupted, ctrl_c
from moba_train.parallel.supervise import INTERRUPTED
from moba_train.run import Run, build
from moba_train.runtime import finish, start
from moba_train.train import train

_GIVE_WAY_SECONDS = {"rank 0": 2.0, "others": 15.0}  # rank 0 first tells W&B, and that takes some seconds
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def main() -> int:
    """The exit code of this rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="resolved.yaml in the run directory")
    parser.add_argument("--local_rank", type=int, help="accepted from the deepspeed launcher; LOCAL_RANK counts")
    arguments = parser.parse_args()
    folder = arguments.config.resolve().parent
    if sys.stdout is not None:  # as with >&-; a console without the character · ends no run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the launcher ends this rank so, and nohup is not to keep it
    run: Run | None = None
    config, claimed = None, None
    code = 1
    try:
        with ctrl_c():
            config = resolved.load(arguments.config)
            runtime = start(config.launch, config.train.sequence_parallel_size)
            claimed = lifetime.inherit_or_claim(folder) if runtime.is_main else None
            run = build(config, folder, runtime)
            train(run)
            if runtime.is_main:
                write_result(run)
        code = 0
    except Interrupted as interrupted:
        if _rank() == 0:
            print(interrupted, file=sys.stderr, flush=True)
        code = interrupted.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        explained = _explain(error, config, folder)
        if explained is None:  # also a collective that broke off because another rank has ended
            _give_way()
            raise
        code, message = explained
        _tell(message)
    finally:
        if run is not None and run.tracker is not None:
            with suppress(OSError):  # of a row that the disk has refused before, which has been told
                run.tracker.close(failed=code != 0)
    if code in INTERRUPTED:  # the first to end may have the others ended, and rank 0 has just told W&B
        dist.barrier()
    finish()
    if claimed is not None:
        claimed.close()
    return code


def _explain(error: Exception, config: Config | None, folder: Path) -> tuple[int, str] | None:
    """The exit code and the line for an error that the user can mend; None for another."""
    if isinstance(error, ValueError):
        return 2, str(error)
    if isinstance(error, FloatingPointError):
        return 3, str(error)
    if isinstance(error, torch.OutOfMemoryError) and config is not None:
        return 4, _out_of_memory(error, config)
    if isinstance(error, OSError) and error.errno in (*_DISK, *_IN_THE_WAY):  # under metrics.jsonl or the export
        fix = "make room, or mend the disk" if error.errno in _DISK else "move away what is there"
        where = error.filename2 or error.filename or folder
        return 1, f"{where} cannot be written ({error.strerror}): {fix}, and go on with run.resume=auto"
    return None


def _out_of_memory(error: torch.OutOfMemoryError, config: Config) -> str:
    settings = config.train
    what = ". ".join(str(error).split(". ")[:2])  # torch goes on with the allocator's state
    fixes = []
    if settings.micro_batch_tokens is not None:  # None is one row already
        fixes.append(f"lower train.micro_batch_tokens={settings.micro_batch_tokens}")
    if not settings.activation_checkpointing:
        fixes.append("set train.activation_checkpointing=true")
    if settings.keep_attention:
        fixes.append("set train.keep_attention=false")
    if not settings.mlp_tile_tokens:
        fixes.append("set train.mlp_tile_tokens=16384")
    if settings.activation_checkpointing and not settings.offload.hidden_states:
        fixes.append("set train.offload.hidden_states=true")
    if settings.offload.optimizer is OffloadDevice.none and not settings.offload.moments:
        fixes.append("set train.offload.moments=true")
    if settings.zero_stage < 3:
        fixes.append(f"raise train.zero_stage={settings.zero_stage} with several processes")
    if settings.sequence_parallel_size < config.launch.world_size:
        fixes.append(f"raise train.sequence_parallel_size={settings.sequence_parallel_size}")
    return f"{what}: {', or '.join(fixes) or 'shorten the context_length of the stages'}"


def _tell(message: str) -> None:
    """Print an error that ends the run: rank 0 at once, another only where rank 0 has not failed too."""
    if _rank() > 0:
        _give_way()
    several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")  # machines
    where = f" on {socket.gethostname()}" if several else ""
    place = f"rank {_rank()}{where}: " if _rank() or several else ""
    print(f"error: {place}{message}", file=sys.stderr, flush=True)


def _give_way() -> None:
    """Where another rank has the cause to tell, the launcher ends this one meanwhile, and it is told once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(_GIVE_WAY_SECONDS["others" if _rank() else "rank 0"])


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def write_result(run: Run) -> None:
    """The sweepers' objective and the report's table: the held-out losses at each point."""
    keys = ("eval/point", "step", "tokens", "eval/loss", "eval/trailing_loss")
    points = [
        {key.removeprefix("eval/"): row[key] for key in keys if key in row}
        for row in metrics_file.read_rows(run.folder / metrics_file.FILE)
        if "eval/point" in row
    ]
    result: dict[str, Any] = {
        "status": "completed",
        # None where someone has removed the rows of a run that had only this left to do.
        "loss": points[-1]["loss"] if points else None,
        "trailing_loss": points[-1]["trailing_loss"] if points else None,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.throughput.tokens / run.throughput.seconds if run.throughput.seconds else None,
        "points": points,
    }
    result_file.write(run.folder, result)


if __name__ == "__main__":
    if code := main():
        # What is to be told is told. At the interpreter's end torch's threads of a process group whose other ranks have
        # failed as well sometimes abort this process (torch 2.13), with an exit code of their own.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
