"""Repositories of the hub: what is asked for, what is kept, and what is told when it cannot be had.

The hub is a server on this machine, and the command line a process of its own: the hub's client reads its settings
from the environment once.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hf_samples import SAMPLES
from huggingface_hub import constants

from sinder_cli import ModelRequest, UnavailableError, api

COMMIT, OTHER = "a" * 40, "b" * 40
CARD = "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\nlicense: none\n"
Predict = Callable[..., Any]


class Hub(ThreadingHTTPServer):
    """Serves the files of `owner/name` at two commits, `main` being the first; remembers what is asked of it."""

    files: dict[str, bytes]
    asked: list[tuple[str, str, str | None]]  # method, path, authorization
    refusal: tuple[int, str] | None = None  # status and code for all that is asked

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        place, _, rest = self.path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = {"main": COMMIT, COMMIT: COMMIT, "other": OTHER, OTHER: OTHER}.get(revision)
        if self.server.refusal:
            self._refuse(*self.server.refusal)
        elif place != "/owner/name":
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        elif name not in self.server.files:
            self._refuse(404, "EntryNotFound", commit)
        else:
            self._give(self.server.files[name], commit, with_body)

    def _give(self, content: bytes, commit: str, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub")
    model: Any = SAMPLES["DINOv2"].made()
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(sharded: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as running:
        running.files, running.asked = dict(sharded), []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def predict(sinder: Callable[..., Any], hub: Hub, cache: Path) -> Predict:
    """`sinder predict-defects` with this hub and an empty cache."""

    def run(*arguments: str, **variables: str) -> Any:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return sinder("predict-defects", *arguments, "--format", "json", **settings | variables)

    return run


def line(run: Any, code: int) -> str:
    """The error that a run ends with, in one line; before it, the hub's client may tell that it tries again."""
    assert (run.returncode, run.stdout) == (code, ""), run.stderr
    *before, last = run.stderr.splitlines()
    assert last.startswith("sinder: error: ")
    assert all("Retrying" in told or "thrown while requesting" in told for told in before), run.stderr
    return str(last)


def test_only_what_is_needed_is_fetched_once_into_the_cache(predict: Predict, hub: Hub, cache: Path) -> None:
    run = predict("hf/owner/name")
    assert (run.returncode, len(json.loads(run.stdout)["blocks"])) == (0, 3), run.stderr
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert fetched == {name for name in hub.files if name != "pytorch_model.bin"}
    assert not any("pytorch_model" in path for _, path, _ in hub.asked)
    snapshot = cache / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert {path.name for path in snapshot.iterdir()} == fetched
    hub.asked.clear()
    assert predict("hf/owner/name").stdout == run.stdout
    assert [path for method, path, _ in hub.asked if method == "GET"] == []


def test_the_model_card_tells_the_license(predict: Predict, hub: Hub, cache: Path) -> None:
    hub.files["README.md"] = CARD.encode()
    assert predict("hf/owner/name").returncode == 0
    snapshot = cache / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert api.open_model(ModelRequest(f"hf/{snapshot}")).license == "apache-2.0"


def test_a_revision_is_one_commit_for_all_files(predict: Predict, hub: Hub, cache: Path) -> None:
    assert predict("hf/owner/name", "--revision", "other").returncode == 0
    revisions = {path.split("/")[4] for _, path, _ in hub.asked}
    assert revisions == {"other", OTHER}
    assert (cache / "hub" / "models--owner--name" / "snapshots" / OTHER / "config.json").exists()
    assert line(predict("hf/owner/name", "--revision", "none"), 66).endswith(
        "it has no revision 'none'; check --revision"
    )


def test_offline_the_cache_is_enough_and_its_gaps_are_reported(predict: Predict, hub: Hub) -> None:
    told = line(predict("hf/owner/name", HF_HUB_OFFLINE="1"), 69)
    assert "cannot fetch config.json of owner/name: offline mode is on, and it is not in the cache; run once" in told
    online = predict("hf/owner/name")
    hub.asked.clear()
    offline = predict("hf/owner/name", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout, hub.asked) == (0, online.stdout, [])


def test_a_cache_made_elsewhere_will_do_offline(predict: Predict, cache: Path, sharded: dict[str, bytes]) -> None:
    repository = cache / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in sharded.items():
        (repository / "blobs" / f"blob-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert predict("hf/owner/name", HF_HUB_OFFLINE="1").returncode == 0
    next(snapshot.glob("model-00002*")).unlink()
    assert "cannot fetch model-00002" in line(predict("hf/owner/name", HF_HUB_OFFLINE="1"), 69)


def test_the_token_of_the_environment_is_sent(predict: Predict, hub: Hub) -> None:
    assert predict("hf/owner/name", HF_TOKEN="hf_secret").returncode == 0
    assert {token for _, _, token in hub.asked} == {"Bearer hf_secret"}


REFUSALS = {
    "gated": ((403, "GatedRepo"), 69, "it is gated, and this token has no access; ask for it at http://127.0.0.1"),
    "private or absent": (
        (401, "RepoNotFound"),
        66,
        "the hub has no such repository, or it is private; check the name",
    ),
    "unwilling": ((403, ""), 69, "403"),
}


@pytest.mark.parametrize(("refusal", "code", "why"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_of_the_hub_is_told_with_a_remedy(
    refusal: tuple[int, str], code: int, why: str, predict: Predict, hub: Hub
) -> None:
    hub.refusal = refusal
    assert why in line(predict("hf/owner/name"), code)


def test_a_hub_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """In this process, where the client's patience can be cut short."""
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(
        UnavailableError, match=f"{nobody} does not answer .*, and it is not in the cache; check the net"
    ):
        api.open_model(ModelRequest("hf/owner/name"))


def test_a_repository_of_pickles_is_refused_without_fetching_them(predict: Predict, hub: Hub) -> None:
    hub.files = {name: content for name, content in hub.files.items() if not name.startswith("model")}
    told = line(predict("hf/owner/name"), 65)
    assert "it has neither model.safetensors nor model.safetensors.index.json, and pickles are never opened" in told
    assert not any("pytorch_model" in path for _, path, _ in hub.asked)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../../../other.safetensors", "/etc/passwd.safetensors"])
def test_an_index_cannot_have_other_files_fetched(shard: str, predict: Predict, hub: Hub) -> None:
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
    assert f"shard '{shard}' is" in line(predict("hf/owner/name"), 65)
    assert not any(shard.rpartition("/")[2] in path for _, path, _ in hub.asked)


def test_a_repository_without_config_is_no_input(predict: Predict, hub: Hub) -> None:
    del hub.files["config.json"]
    assert "the hub has no config.json for it" in line(predict("hf/owner/name"), 66)


def test_weights_of_a_file_need_the_description_alone(predict: Predict, hub: Hub, saved: Callable[[str], Path]) -> None:
    run = predict("hf/owner/name", "--weights", str(saved("DINOv2") / "model.safetensors"))
    assert run.returncode == 0
    assert {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"} == {"config.json"}
