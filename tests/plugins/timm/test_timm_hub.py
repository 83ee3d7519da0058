"""The command line finds timm's pretrained files on the hub, in its cache, or says in one line why not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm_samples import made, random_tensors

from sinder_cli import ModelRequest, UnavailableError

NAME = "test_vit.r160_in1k"
REPOSITORY = f"timm/{NAME}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Sinder = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(made("test_vit", num_classes=1000))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `hf_hub_download` asks for: files of one commit, with their hash."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.rsplit("/", 1)[1]
        if "/resolve/" in self.path:
            self.asked.append(self.path.split("/resolve/")[1])
        data = self.files.get(name)
        self.send_response(200 if data is not None else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            data = b""
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Callable[[dict[str, bytes]], tuple[str, list[str]]]]:
    """Serve these files as every repository's; gives the address, and what has been asked for."""
    servers: list[ThreadingHTTPServer] = []

    def serve(files: dict[str, bytes]) -> tuple[str, list[str]]:
        asked: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"files": files, "asked": asked}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_safetensors_are_fetched_from_the_hub_once(
    sinder: Sinder, hub: Any, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    address, asked = hub({"model.safetensors": save(tensors)})
    places = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    first = sinder("predict-defects", f"timm/{NAME}", "--stage", "cumulative", **places)
    assert (first.returncode, len(json.loads(first.stdout)["blocks"])) == (0, 6), first.stderr
    assert "matched 78 tensors, 2 outside it ignored" in first.stderr
    assert set(asked) == {"main/model.safetensors"}
    again = sinder("predict-defects", f"timm/{NAME}", "--stage", "cumulative", **places | {"HF_HUB_OFFLINE": "1"})
    assert (again.returncode, again.stdout) == (0, first.stdout)


def test_a_pickled_file_is_fetched_where_there_are_no_safetensors(
    sinder: Sinder, hub: Any, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "weights.bin")
    address, asked = hub({"pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    places = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    run = sinder("predict-defects", f"timm/{NAME}", "--stage", "cumulative", **places)
    assert run.returncode == 0, run.stderr
    assert set(asked) == {"main/model.safetensors", "main/pytorch_model.bin"}


def test_a_repository_without_either_is_refused_naming_both(sinder: Sinder, hub: Any, tmp_path: Path) -> None:
    address, _ = hub({})
    run = sinder("predict-defects", f"timm/{NAME}", HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert run.returncode == 69
    assert "it has neither model.safetensors nor pytorch_model.bin; name a file with --weights" in run.stderr


def test_a_cache_made_by_hand_serves_without_a_network(
    sinder: Sinder, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / f"models--timm--{NAME}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    save_file(tensors, repository / "snapshots" / COMMIT / "model.safetensors")
    run = sinder("predict-defects", f"timm/{NAME}", "--stage", "mlp", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr


def test_without_a_network_one_line_says_what_to_fetch(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("predict-defects", f"timm/{NAME}", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (run.returncode, run.stdout) == (69, "")
    assert run.stderr.splitlines() == [
        f"sinder: error: cannot fetch {REPOSITORY}: offline mode is on, and it is not in the cache; "
        "fetch model.safetensors elsewhere and name it with --weights"
    ]


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from sinder_plugins.timm import hub as place

    asked: list[str] = []

    def unreachable(filename: str, **_: object) -> str:
        asked.append(filename)
        raise LocalEntryNotFoundError("not in the cache") from ConnectionError("Connection refused")

    monkeypatch.setattr(place, "hf_hub_download", unreachable)
    with pytest.raises(UnavailableError, match=r"does not answer \(Connection refused\); fetch model.safetensors"):
        place.hub_file("timm/nobody-has-this", "pytorch_model.bin")
    assert asked == ["model.safetensors"]  # whoever does not answer is not asked twice


@pytest.mark.parametrize("name", ["small_plain", "beit3_giant_patch14_224.untrained"])
def test_a_name_without_weights_asks_for_a_file(hooks: Any, name: str) -> None:
    with pytest.raises(UnavailableError, match=rf"no weights for timm/{name}: .*name a file with --weights"):
        hooks.sinder_weights(request=ModelRequest(f"timm/{name}"))


@pytest.mark.parametrize(("revision", "wanted"), [(None, "pinned"), ("v2", "v2")])
def test_the_users_revision_goes_before_the_pinned_one(
    monkeypatch: pytest.MonkeyPatch, revision: str | None, wanted: str
) -> None:
    from sinder_plugins.timm import hub as place

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(place, "hf_hub_download", lambda **at: asked.append(at) or "/cache/file")
    assert place.hub_file("timm/some@pinned", "model.safetensors", revision) == Path("/cache/file")
    assert asked == [{"repo_id": "timm/some", "filename": "model.safetensors", "revision": wanted}]


def test_a_file_at_an_address_is_downloaded_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinder_plugins.timm import hub as place

    cfg = timm.get_pretrained_cfg(NAME)
    cfg.hf_hub_id, cfg.url = None, "https://example.org/weights.pth"
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: cfg)
    monkeypatch.setattr(place, "download", lambda url, _: Path("/cache") / url.rsplit("/", 1)[1])
    assert place.pretrained_file(NAME, ModelRequest(f"timm/{NAME}")) == Path("/cache/weights.pth")


@pytest.mark.parametrize(
    ("filename", "safe"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("model.safetensors", "model.safetensors"),
        ("weights.pt", "weights.safetensors"),
    ],
)
def test_safetensors_are_looked_for_first(filename: str, safe: str) -> None:
    from sinder_plugins.timm.hub import safe_name

    assert safe_name(filename) == safe


def test_without_timm_one_line_says_what_to_install(sinder: Sinder, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('no timm here')")
    run = sinder("predict-defects", "timm/test_vit", PYTHONPATH=str(tmp_path))
    assert run.returncode == 69
    assert run.stderr.splitlines() == [
        "sinder: error: cannot use timm/test_vit: timm cannot be imported (ImportError: no timm here); "
        "install sinder-cli[timm]"
    ]
