"""The hub out of reach is told at once; a slow one is not taken for that."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moba_train import hub
from moba_train.config import ModelConfig, SourceConfig, SourceFormat
from moba_train.data.formats import read_hub
from moba_train.data.tokenizer import load_tokenizer
from moba_train.model import model_configuration

NOWHERE = "nobody/nothing-of-this-name"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """In the hub's place: an address that nothing listens at, until a test does."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        hub._connects.cache_clear()
        yield bound
    hub._connects.cache_clear()


def test_a_name_is_refused_at_once_where_nothing_answers(server: socket.socket) -> None:
    began = time.monotonic()
    assert hub.out_of_reach(NOWHERE)
    with pytest.raises(ValueError, match=f"tokenizer '{NOWHERE}' cannot be loaded .*couldn't connect"):
        load_tokenizer(NOWHERE)
    with pytest.raises(ValueError, match=f"model.path={NOWHERE} cannot be loaded .*couldn't connect"):
        model_configuration(ModelConfig(path=NOWHERE))
    with pytest.raises(ValueError, match=f"hub dataset '{NOWHERE}' .*cannot be opened: .* cannot be reached"):
        next(read_hub(SourceConfig(name="s", path=NOWHERE, format=SourceFormat.hub), 0))
    assert time.monotonic() - began < 15  # 23 s for each file that is asked for, otherwise


def test_a_slow_hub_is_in_reach(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    server.listen()  # connections are made, and nothing is answered
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    assert not hub.out_of_reach(NOWHERE)


def test_a_name_server_that_says_nothing(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: time.sleep(5))
    began = time.monotonic()
    assert hub.out_of_reach(NOWHERE)
    assert time.monotonic() - began < 3


def test_offline_mode_is_left_to_the_library(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so itself, and loads what was downloaded before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.out_of_reach(NOWHERE)


def test_what_is_on_disk_needs_no_hub(server: socket.socket, tmp_path: Path) -> None:
    assert not hub.out_of_reach(str(tmp_path))
