"""Official weights are downloaded once, whole or not at all; checked against a server on this machine."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from sinder_plugins import dinov2
from sinder_plugins.dinov2.config import Config
from torch import Tensor

from sinder_cli import ModelRequest, UnavailableError
from sinder_cli.backbone.opening import open_backbone

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers every request in the way the test sets, and remembers the paths asked for."""

    answer: Answer
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/dinov2"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        self.server.answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def whole(content: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def announced_but_cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 300)


def chunked_but_cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ff\r\n" + b"x" * 100)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Announce a body and reset the connection, which the client meets as an OSError in the middle of it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 300)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()


def not_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"220 mail ready\r\n")


def missing(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(404)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        monkeypatch.setattr(dinov2, "BASE_URL", running.url)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


def test_the_file_arrives_in_the_torch_hub_cache(hooks: Any, server: Server, cache: Path) -> None:
    server.answer = whole(b"weights")
    path = hooks.sinder_weights(request=ModelRequest("dinov2_vitb14_reg"))
    assert server.asked == ["/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"]
    assert path == cache / "dinov2_vitb14_reg4_pretrain.pth"
    assert path.read_bytes() == b"weights"
    recorded = (cache / f"{path.name}.sha256").read_text()
    assert recorded == f"{hashlib.sha256(b'weights').hexdigest()}  {path.name}\n"


def test_the_same_file_is_not_downloaded_twice(hooks: Any, server: Server) -> None:
    server.answer = whole(b"weights")
    paths = {hooks.sinder_weights(request=ModelRequest("dinov2_vits14")) for _ in range(2)}
    assert len(paths) == len(server.asked) == 1


def test_downloaded_weights_are_opened(
    hooks: Any,
    server: Server,
    drawn: Callable[[Config], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = Config(width=64, depth=2, hidden=128, grid=2)
    monkeypatch.setitem(dinov2.OFFICIAL, "dinov2_vits14", tiny)
    torch.save(drawn(tiny), tmp_path / "served.pth")
    server.answer = whole((tmp_path / "served.pth").read_bytes())
    backbone = open_backbone(hooks, ModelRequest("dinov2_vits14"))
    assert (backbone.name, backbone.depth, backbone.width) == ("dinov2_vits14", 2, 64)


def test_an_answer_of_the_server_is_quoted(hooks: Any, server: Server) -> None:
    server.answer = missing
    with pytest.raises(UnavailableError, match="HTTP Error 404"):
        hooks.sinder_weights(request=ModelRequest("dinov2_vits14"))


def test_a_broken_connection_is_not_taken_for_a_full_disk(hooks: Any, server: Server) -> None:
    server.answer = reset
    with pytest.raises(UnavailableError, match="the connection broke"):
        hooks.sinder_weights(request=ModelRequest("dinov2_vits14"))


@pytest.mark.parametrize("answer", [announced_but_cut, chunked_but_cut, reset, not_http, missing])
def test_a_download_that_breaks_leaves_nothing_behind(hooks: Any, server: Server, cache: Path, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(
        UnavailableError, match=r"cannot download http://127\.0\.0\.1:\d+/dinov2/dinov2_vits14/"
    ) as refusal:
        hooks.sinder_weights(request=ModelRequest("dinov2_vits14"))
    assert refusal.value.exit_code == 69
    assert refusal.value.why
    assert list(cache.iterdir()) == []


def test_without_a_network_one_line_names_url_and_place(
    hooks: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(dinov2, "BASE_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(UnavailableError) as refusal:
        hooks.sinder_weights(request=ModelRequest("dinov2_vits14"))
    line = str(refusal.value)
    assert "\n" not in line
    assert f"http://127.0.0.1:{port}/dinov2_vits14/dinov2_vits14_pretrain.pth" in line
    assert str(cache / "dinov2_vits14_pretrain.pth") in line
    assert "refused" in line
    assert list(cache.iterdir()) == []
