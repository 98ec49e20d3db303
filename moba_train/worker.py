"""What a launched rank runs: a resolved configuration in, ``result.json`` out. No Hydra here.

    python -m moba_train.worker --config RUN/resolved.yaml

Exit codes: 0 done; 2 the configuration, the data or a checkpoint cannot be used; 3 the loss or the gradient was not
finite; 130 interrupted; 1 anything else, a full disk among it.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from pathlib import Path
from typing import Any

from moba_train import durable, resolved
from moba_train.metrics_file import read_rows
from moba_train.parallel import lifetime
from moba_train.runtime import finish, start
from moba_train.train import Run, build, train

RESULT = "result.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="resolved.yaml in the run directory")
    parser.add_argument("--local_rank", type=int, help="accepted from the deepspeed launcher; LOCAL_RANK counts")
    arguments = parser.parse_args()
    lifetime.follow_launcher()
    folder = arguments.config.resolve().parent
    run: Run | None = None
    claimed = None
    code = 1
    try:
        config = resolved.load(arguments.config)
        runtime = start(config.launch)
        claimed = lifetime.claim(folder) if runtime.is_main else None
        run = build(config, folder, runtime)
        train(run)
        code = 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 3
    except OSError as error:  # a full disk under metrics.jsonl or the export
        if error.errno not in _DISK:
            raise
        print(
            f"error: {error.filename or folder} cannot be written ({error.strerror}): make room, or mend the disk, and "
            f"go on with run.resume=auto",
            file=sys.stderr,
            flush=True,
        )
    except KeyboardInterrupt:
        code = 130
    finally:
        if run is not None and run.tracker is not None:
            run.tracker.close(failed=code != 0)
    if code == 0 and run is not None and runtime.is_main:
        write_result(run)
    finish()
    if claimed is not None:
        claimed.close()
    return code


def write_result(run: Run) -> None:
    """The sweepers' objective and the report's table: the held-out losses at each point."""
    keys = ("eval/point", "step", "tokens", "eval/loss", "eval/trailing_loss")
    points = [
        {key.removeprefix("eval/"): row[key] for key in keys if key in row}
        for row in read_rows(run.folder / "metrics.jsonl")
        if "eval/point" in row
    ]
    result: dict[str, Any] = {
        "status": "completed",
        "loss": points[-1]["loss"],
        "trailing_loss": points[-1]["trailing_loss"],
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.throughput.tokens / run.throughput.seconds if run.throughput.seconds else None,
        "points": points,
    }
    durable.write(run.folder / RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
