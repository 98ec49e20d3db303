"""metrics.jsonl is whole whatever W&B does; nothing secret is uploaded."""

import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time

import pytest

from moba_train import tracking
from moba_train.config import WandbConfig, WandbMode
from moba_train.redact import REDACTED, redact
from moba_train.tracking import Tracker, format_duration, format_progress

DISABLED = WandbConfig(mode=WandbMode.disabled)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class FakeWandb:
    """Stands for the module: records what it is given, and fails where told to."""

    def __init__(self, fails=(), stalls=False):
        self.fails, self.stalls = set(fails), stalls
        self.inits, self.rows, self.finished, self.torn_down = [], [], [], 0

    class Settings(dict):
        def __init__(self, **settings):
            super().__init__(settings)

    def setup(self, settings):
        pass

    def teardown(self):
        self.torn_down += 1

    def init(self, **arguments):
        self.inits.append(arguments)
        if self.stalls:
            time.sleep(60)
        if arguments["mode"] in self.fails:
            raise RuntimeError("refused\nwith a long story")
        return self

    def log(self, row, step):
        if "log" in self.fails:
            raise RuntimeError("dropped")
        self.rows.append((step, row))

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        module = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return install


def test_rows_are_in_the_file_at_once(tmp_path):
    with Tracker(tmp_path, DISABLED, {}) as tracker:
        tracker.log({"tokens": 8, "train/loss": 1.5, "stage": "moba"}, step=1)
        assert rows(tmp_path) == [{"step": 1, "tokens": 8, "train/loss": 1.5, "stage": "moba"}]
        tracker.log({"tokens": 16, "train/loss": math.nan, "train/gradient_norm": math.inf}, step=2)
    assert rows(tmp_path)[1] == {"step": 2, "tokens": 16, "train/loss": None, "train/gradient_norm": None}
    assert not (tmp_path / "wandb").exists()


def test_resume_cuts_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "x": s}) + "\n" for s in (0, 1, 2, 2, 3)) + '{"step": 2, "x":')
    Tracker(tmp_path, DISABLED, {}, first_step=2).close()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_start_keeps_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    Tracker(tmp_path, DISABLED, {}, first_step=0).close()
    assert rows(tmp_path) == []


def test_wandb_gets_the_same_rows_and_a_redacted_config(tmp_path, fake):
    wandb = fake()
    config = WandbConfig(project="p", group="sweep", tags=["a"])
    with Tracker(tmp_path, config, {"model": {"hub_token": "hf_123456"}, "seed": 3}) as tracker:
        tracker.log({"tokens": 8}, step=1)
    (init,) = wandb.inits
    assert init["mode"] == "offline" and init["project"] == "p" and init["group"] == "sweep"
    assert init["config"] == {"model": {"hub_token": REDACTED}, "seed": 3}
    assert wandb.rows == [(1, {"step": 1, "tokens": 8})]
    assert wandb.finished == [0]


def test_a_failed_run_is_marked_failed(tmp_path, fake):
    wandb = fake()
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, WandbConfig(), {}):
        raise ZeroDivisionError
    assert wandb.finished == [1]


def test_resumed_run_keeps_its_wandb_id(tmp_path, fake):
    wandb = fake()
    for first_step in (0, 5):
        Tracker(tmp_path, WandbConfig(), {}, first_step).close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"


@pytest.mark.parametrize(
    ("mode", "key", "expected"),
    [("auto", None, "offline"), ("auto", "k" * 40, "online"), ("online", None, "online"), ("offline", "k", "offline")],
)
def test_mode(tmp_path, fake, monkeypatch, mode, key, expected):
    wandb = fake()
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    Tracker(tmp_path, WandbConfig(mode=WandbMode[mode]), {}).close()
    assert wandb.inits[0]["mode"] == expected


def test_refused_online_goes_on_offline(tmp_path, fake, caplog):
    wandb = fake(fails={"online"})
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.online), {}) as tracker:
        tracker.log({"tokens": 8}, step=1)
    assert [init["mode"] for init in wandb.inits] == ["online", "offline"]
    assert wandb.torn_down == 1 and len(wandb.rows) == 1
    assert [r.message for r in caplog.records] == ["W&B did not start (RuntimeError: refused); going on offline"]


def test_refused_altogether_goes_on_without(tmp_path, fake, caplog):
    fake(fails={"online", "offline"})
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.online), {}) as tracker:
        tracker.log({"tokens": 8}, step=1)
    assert len(rows(tmp_path)) == 1
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2


@pytest.mark.parametrize("what", ["a file", "an id that is no text"])
def test_a_folder_that_wandb_cannot_use_costs_its_rows_alone(tmp_path, fake, caplog, what):
    fake()
    if what == "a file":
        (tmp_path / "wandb").touch()
    else:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/run_id").write_bytes(b"\xff")
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.offline), {}) as tracker:
        tracker.log({"tokens": 1}, 1)
    assert rows(tmp_path)[0]["step"] == 1 and "going on without it" in caplog.text


def test_failing_rows_warn_once(tmp_path, fake, caplog):
    fake(fails={"log"})
    with Tracker(tmp_path, WandbConfig(), {}) as tracker:
        for step in range(1, 4):
            tracker.log({"tokens": step}, step)
    assert len(rows(tmp_path)) == 3
    (record,) = caplog.records
    assert record.message == "W&B did not take a row (RuntimeError: dropped); metrics.jsonl has every row"


def test_a_stalled_start_delays_nothing(tmp_path, fake, monkeypatch, caplog):
    fake(stalls=True)
    monkeypatch.setattr(tracking, "INIT_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    start = time.monotonic()
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.online), {}) as tracker:
        tracker.log({"tokens": 8}, step=1)
        assert time.monotonic() - start < 0.1
    assert time.monotonic() - start < 1
    assert "wandb sync" in caplog.text and len(rows(tmp_path)) == 1


def test_real_wandb_offline_keeps_argv_and_secrets_out(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(sys, "argv", ["train", "--password=ARGV-SECRET"])
    monkeypatch.setenv("SOME_API_KEY", "ENVIRONMENT-SECRET")
    with Tracker(tmp_path, WandbConfig(mode=WandbMode.offline), {"url": "x?k=ENVIRONMENT-SECRET"}) as tracker:
        tracker.log({"tokens": 8, "train/loss": 1.25}, step=1)
    wandb.teardown()  # its service writes on for a moment; a process waits for it at its end
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for secret in (b"ARGV-SECRET", b"ENVIRONMENT-SECRET", socket.gethostname().encode() + b'"'):
        assert [path for path in written if secret in path.read_bytes()] == []
    assert any(b"train/loss" in path.read_bytes() for path in written)


def test_real_wandb_with_a_server_that_never_answers(tmp_path, monkeypatch, caplog):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        connections = []
        threading.Thread(target=lambda: _accept(server, connections), daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "local-" + "a" * 40)
        monkeypatch.setattr(tracking, "INIT_SECONDS", 2)
        start = time.monotonic()
        tracker = Tracker(tmp_path, WandbConfig(), {})
        tracker.log({"tokens": 8}, step=1)
        assert time.monotonic() - start < 1
        tracker.close()
    assert "going on offline" in caplog.text
    assert len(rows(tmp_path)) == 1
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def _accept(server, connections):
    while True:
        try:
            connections.append(server.accept())
        except OSError:
            return


def test_another_librarys_log_on_a_full_disk_says_nothing():
    """W&B keeps one in the run directory: a page of tracebacks hid the one line that told of the disk."""
    code = (
        "import logging; from moba_train.runtime import configure_logging; configure_logging(0)\n"
        "logger = logging.getLogger('wandb'); logger.addHandler(logging.FileHandler('/dev/full')); logger.error('x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "No space" not in done.stderr, done.stderr


def test_redaction_is_by_word_and_by_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "1")
    config = {
        "api_key": "a",
        "hf.token": "b",
        "PASSWORD": "c",
        "client_secret": "d",
        "tokenizer": "t.json",
        "token_field": "input_ids",
        "tokens_per_step": 1,
        "pad_token_id": 0,
        "keys": "k",
        "path": ["https://user:hf_abcdefgh@host/1"],
        "empty_token": "",
        "none_key": None,
        "mode": WandbMode.auto,
    }
    assert redact(config) == {
        **config,
        "api_key": REDACTED,
        "hf.token": REDACTED,
        "PASSWORD": REDACTED,
        "client_secret": REDACTED,
        "path": [f"https://user:{REDACTED}@host/1"],
        "mode": "auto",
    }


def test_progress_line():
    row = {
        "step": 120,
        "tokens": 1_966_080,
        "stage": "moba",
        "train/loss": 3.4123,
        "train/trailing_loss": 3.2,
        "perf/tokens_per_second": 12345.6,
        "perf/memory_gb": 1.93,
    }
    assert format_progress(row, 4_000_000, 101.0) == (
        "step 120 · 1.97M/4M tokens (49%) · loss 3.412 · trailing 3.200 · 12.3k tok/s · 1.9 GB · moba · ETA 1m 41s"
    )
    assert format_progress({"step": 0, "tokens": 0, "eval/loss": 5.0}, 10, None) == (
        "step 0 · 0/10 tokens (0%) · held-out loss 5.000"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7800, "2h 10m"), (4 * 86400 + 3 * 3600, "4d 03h")],
)
def test_durations(seconds, shown):
    assert format_duration(seconds) == shown
