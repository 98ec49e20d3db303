"""Where a run's numbers go: metrics.jsonl, the same rows to Weights & Biases, and a progress line.

metrics.jsonl is the record; W&B is a guest. It runs in a thread of its own, behind a queue, so that a server that
refuses, stalls or is not there costs the run neither its start nor a step: at worst W&B goes without some rows.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import threading
from pathlib import Path
from typing import Any

from moba_train import durable, metrics_file
from moba_train.config import WandbConfig, WandbMode
from moba_train.redact import redact

logger = logging.getLogger(__name__)

INIT_SECONDS = 10  # W&B's own default is 90
FINISH_SECONDS = 30  # for the last uploads; the default waits for ever


class Tracker:
    """Writes each row to ``<run_dir>/metrics.jsonl`` and to W&B. Made by rank 0 alone.

    Args:
        run_dir: exists and can be written; W&B keeps its files and the run's id in ``<run_dir>/wandb``
        config: W&B's mode and labels
        resolved: the run's whole configuration, uploaded after ``redact``
        first_step: steps already done. Later rows in metrics.jsonl are cut off, since those steps are done again; 0
            is a new start and keeps none
    """

    def __init__(self, run_dir: Path, config: WandbConfig, resolved: dict[str, Any], first_step: int = 0) -> None:
        path = Path(run_dir) / metrics_file.FILE
        _cut(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._wandb: _WandbThread | None = None
        if config.mode is not WandbMode.disabled:
            self._wandb = _WandbThread(Path(run_dir), config, redact(resolved))

    def log(self, row: dict[str, Any], step: int) -> None:
        """Add one row. ``step`` joins it; a number that is not finite becomes null in the file, as JSON has none.

        Raises:
            OSError: metrics.jsonl cannot be written; W&B's failures only warn
        """
        row = {"step": step, **row}
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.put(row, step)

    def close(self, failed: bool = False) -> None:
        """Finish both; W&B is given ``FINISH_SECONDS`` for what it has yet to send."""
        self._file.close()
        if self._wandb:
            self._wandb.close(exit_code=int(failed))
            self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class _WandbThread:
    """One W&B run, fed through a queue. Only this thread calls W&B."""

    def __init__(self, run_dir: Path, config: WandbConfig, resolved: dict[str, Any]) -> None:
        # Its crash reports go to a third party and hold up the exit where the server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._run_dir = run_dir
        self._config = config
        self._resolved = resolved
        self._rows: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._warned = False
        self._exit_code = 0
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def put(self, row: dict[str, Any], step: int) -> None:
        self._rows.put((row, step))

    def close(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._rows.put(None)
        self._thread.join(INIT_SECONDS + FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("W&B has not finished; `wandb sync` sends what is in %s later", self._run_dir / "wandb")

    def _serve(self) -> None:
        run = self._start()
        while (entry := self._rows.get()) is not None:
            if run is not None:
                self._guard("did not take a row", run.log, entry[0], step=entry[1])
        if run is not None:
            self._guard("did not finish", run.finish, exit_code=self._exit_code)

    def _guard(self, what: str, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:  # whatever W&B does, the run goes on
            if not self._warned:
                logger.warning("W&B %s (%s); metrics.jsonl has every row", what, _one_line(error))
            self._warned = True

    def _start(self) -> Any:
        mode = self._config.mode
        online = mode is WandbMode.online or (mode is WandbMode.auto and bool(os.environ.get("WANDB_API_KEY")))
        try:
            return self._init("online" if online else "offline")
        except Exception as error:
            after = "going on offline" if online else "going on without it"
            logger.warning("W&B did not start (%s); %s", _one_line(error), after)
        if not online:
            return None
        try:
            import wandb

            wandb.teardown()  # its service still holds the run's id
            return self._init("offline")
        except Exception as error:
            logger.warning("W&B did not start offline either (%s); going on without it", _one_line(error))
            return None

    def _init(self, mode: str) -> Any:
        import wandb

        # The login, which takes no settings of its own, prints unless the process is silent.
        wandb.setup(wandb.Settings(silent=True))
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            login_timeout=INIT_SECONDS,
            silent=True,
            console="off",
            # Machine information holds the raw command line, host name, paths and git remote.
            x_disable_machine_info=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        return wandb.init(
            mode="online" if mode == "online" else "offline",
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=self._config.tags,
            name=self._run_dir.name,
            id=_stable_id(self._run_dir),
            resume="allow",
            dir=str(self._run_dir),
            config=self._resolved,
            settings=settings,
        )


def format_progress(row: dict[str, Any], total_tokens: int, eta: float | None) -> str:
    """A row as one line for the console; what the row does not have is left out.

    Args:
        row: a row with ``step`` and ``tokens``
        total_tokens: of the whole run
        eta: seconds left, None while unknown
    """
    done = f"{format_amount(row['tokens'])}/{format_amount(total_tokens)} tokens ({row['tokens'] / total_tokens:.0%})"
    parts = [f"step {row['step']}", done]
    for key, shown in (
        ("train/loss", "loss {:.3f}"),
        ("train/trailing_loss", "trailing {:.3f}"),
        ("eval/loss", "held-out loss {:.3f}"),
        ("eval/trailing_loss", "held-out trailing {:.3f}"),
    ):
        if row.get(key) is not None:
            parts.append(shown.format(row[key]))
    if "perf/tokens_per_second" in row:
        parts.append(f"{format_amount(row['perf/tokens_per_second'])} tok/s")
    if "perf/memory_gb" in row:
        parts.append(f"{row['perf/memory_gb']:.1f} GB")
    if "stage" in row:
        parts.append(str(row["stage"]))
    if eta is not None:
        parts.append(f"ETA {format_duration(eta)}")
    return " · ".join(parts)


def format_duration(seconds: float) -> str:
    """``42s``, ``3m 05s``, ``2h 10m`` or ``4d 03h``."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def format_amount(number: float) -> str:
    """``950``, ``12.3k``, ``1.97M``, ``524M``, ``1.2B``."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}" if number / scale < 100 else f"{number / scale:.0f}{unit}"
    return f"{number:.0f}"


def _cut(path: Path, first_step: int) -> None:
    """Keep the rows up to ``first_step``. The file is replaced whole."""
    if not path.exists():
        return
    kept = [row for row in metrics_file.read_rows(path) if 0 < first_step >= row["step"]]
    durable.write(path, "".join(json.dumps(row) + "\n" for row in kept))


def _stable_id(run_dir: Path) -> str:
    """The W&B run of this directory, the same when the run is resumed."""
    path = run_dir / "wandb" / "run_id"
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    path.parent.mkdir(exist_ok=True)
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
