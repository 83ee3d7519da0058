"""Images in order, decoded by a thread or by processes, and what becomes of those that cannot be read."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from sinder_cli.errors import BadInputError, TryAgainError
from sinder_cli.events import Noted
from sinder_cli.images.loading import Changes, load_in_order, readable, require_some
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import default_workers
from sinder_cli.images.sources import DrawnImages, ImageFiles

PLAIN = Preprocessing(8, (0, 0, 0), (1, 1, 1))
LARGE = Preprocessing(518, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))  # 800 kB an image: far more than a pipe holds
SLOW = 999
ORDER = [7, 5, 0, 11, 3, 3, 9, 1, 2]
SERVERS: set[int] = set()  # processes of other tests


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Twelve files of different colours, the sixth of them broken."""
    paths = tuple(tmp_path / f"{index}.png" for index in range(12))
    for index, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(path)
    paths[5].write_bytes(b"broken")
    return ImageFiles(paths)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)
    SERVERS.clear()
    SERVERS.update(process.pid for process in before)
    yield
    left = psutil.Process().children(recursive=True)
    assert [process for process in left if process.pid not in SERVERS] == []


class Drawn:
    """Pictures drawn when they are asked for, some of which are a bug."""

    in_memory = False

    def __len__(self) -> int:
        return 1000

    def name(self, index: int) -> str:
        return f"drawn {index}"

    def load(self, index: int, side: int | None = None) -> Image.Image:  # noqa: ARG002
        if index == 13:
            raise ZeroDivisionError("a bug")
        if index == SLOW:
            time.sleep(4)
        noise = np.random.default_rng(index).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    def fingerprint(self) -> str:
        return "drawn"


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_images_come_back_in_the_order_asked_for(files: ImageFiles, workers: int) -> None:
    loaded = list(load_in_order(files, PLAIN, ORDER, workers))
    assert [image.index for image in loaded] == ORDER
    for image in loaded:
        assert image.name == str(files.paths[image.index])
        if image.index == 5:
            assert image.pixels is None
            assert "cannot identify" in image.problem
        else:
            assert image.pixels is not None
            assert image.pixels[0, 0, 0].item() == pytest.approx(20 * image.index / 255)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_pixels_are_the_same_however_many_processes_there_are(workers: int) -> None:
    order = [index for index in range(40) if index != 13]
    for one, other in zip(
        load_in_order(Drawn(), LARGE, order), load_in_order(Drawn(), LARGE, order, workers), strict=True
    ):
        assert one.index == other.index
        assert torch.equal(one.pixels, other.pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 11, 12, 13])
def test_a_short_order_is_given_back_whole(count: int) -> None:
    loaded = load_in_order(Drawn(), PLAIN, range(count), workers=2)
    assert [image.index for image in loaded] == list(range(count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_endless_order_is_read_only_a_little_ahead(workers: int) -> None:
    asked = []

    def endless() -> Iterator[int]:
        while True:
            asked.append(0)
            yield 0

    loaded = load_in_order(Drawn(), PLAIN, endless(), workers)
    for read in range(1, 20):
        next(loaded)
        assert len(asked) <= read + 5 * max(workers, 1)
    loaded.close()  # type: ignore[attr-defined]


def test_images_in_memory_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    drawn = DrawnImages((Image.new("RGB", (8, 8)),), "drawn")
    assert len(list(load_in_order(drawn, PLAIN, [0, 0], workers=2))) == 2


def processes() -> list[psutil.Process]:
    """The processes that decode; other tests keep servers of their own running."""
    return [process for process in psutil.Process().children() if process.pid not in SERVERS]


def sockets_of(process: int) -> set[str]:
    """The sockets that a process holds, by their numbers."""
    links = [link for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()]
    return {name for link in links if (name := str(link.readlink())).startswith("socket:")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_holds_no_pipe_but_its_own() -> None:
    loaded = load_in_order(Drawn(), LARGE, itertools.repeat(0), workers=3)
    next(loaded)
    ours, *theirs = map(sockets_of, (os.getpid(), *(process.pid for process in processes())))
    assert len(theirs) == 3
    assert all(not held & ours for held in theirs)
    loaded.close()  # type: ignore[attr-defined]


def test_closing_early_ends_the_processes() -> None:
    """At once, and not only when an image that takes long has been decoded."""
    order = itertools.chain([0], itertools.repeat(SLOW))
    loaded = load_in_order(Drawn(), LARGE, order, workers=2)
    next(loaded)
    assert len(processes()) == 2
    began = time.monotonic()
    loaded.close()  # type: ignore[attr-defined]
    assert processes() == []
    assert time.monotonic() - began < 2


def test_an_error_in_the_consumer_ends_the_processes() -> None:
    def consume() -> None:
        for image in load_in_order(Drawn(), LARGE, itertools.repeat(0), workers=2):
            raise KeyError(image.index)

    with pytest.raises(KeyError):
        consume()
    assert processes() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSYS])
@pytest.mark.parametrize("order", [itertools.repeat(0), [0] * 9], ids=["endless", "all sent"])
@pytest.mark.timeout(60)
def test_a_process_that_dies_is_reported(order: Iterable[int], number: signal.Signals) -> None:
    """SIGSYS stands for every crash: it dumps core, too, and pytest does not print a traceback of it."""
    loaded = load_in_order(Drawn(), LARGE, order, workers=2)
    next(loaded)
    time.sleep(0.5)  # both are now in the middle of writing an answer
    processes()[0].send_signal(number)
    time.sleep(0.2)  # in which nothing is raised: the consumer is at work
    with pytest.raises(TryAgainError, match="a process that decodes images died") as caught:
        list(itertools.islice(loaded, 50))
    assert caught.value.exit_code == 75


def test_a_process_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, started = os.fork, []

    def once() -> int:
        started.append(0)
        if len(started) > 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", once)
    with pytest.raises(TryAgainError, match=r"cannot start .*Resource temporarily unavailable"):
        next(load_in_order(Drawn(), PLAIN, [0], workers=2))


def test_a_bug_in_a_process_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(load_in_order(Drawn(), PLAIN, range(20), workers=2))


def test_forking_beside_threads_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 and later warn."""
    fork = os.fork

    def warning() -> int:
        warnings.warn("This process is multi-threaded, use of fork() may lead to deadlocks", DeprecationWarning, 2)
        return fork()

    monkeypatch.setattr(os, "fork", warning)
    assert len(list(load_in_order(Drawn(), PLAIN, range(3), workers=1))) == 3


def test_a_process_prints_nothing_of_what_a_decoder_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "TIFF", compression="tiff_adobe_deflate")
    broken = whole.getvalue().replace(b"\x78\x9c", b"\x00\x00", 1)
    assert broken != whole.getvalue()
    (tmp_path / "broken.tif").write_bytes(broken)
    (image,) = load_in_order(ImageFiles((tmp_path / "broken.tif",)), PLAIN, [0], workers=1)
    assert image.problem
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_left_to_the_parent(number: signal.Signals) -> None:
    """As a terminal, torchrun and systemd send it."""
    loaded = load_in_order(Drawn(), PLAIN, [0] * 40, workers=2)
    next(loaded)
    for process in processes():
        process.send_signal(number)
    assert len(list(loaded)) == 39


def test_ctrl_c_at_the_start_is_left_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(os, "fork", interrupted)
    assert len(list(load_in_order(Drawn(), PLAIN, range(3), workers=2))) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.timeout(60)
def test_no_process_outlives_its_parent_or_prints_anything(files: ImageFiles, number: signal.Signals) -> None:
    script = f"""
import itertools, signal, sys, time
from pathlib import Path
from sinder_cli.images.loading import load_in_order
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageFiles

def end(number, _):
    print("told once", flush=True)
    raise SystemExit(number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
preprocess = Preprocessing(518, (0, 0, 0), (1, 1, 1))
loaded = load_in_order(ImageFiles((Path({str(files.paths[0])!r}),)), preprocess, itertools.repeat(0), 3)
next(loaded)
print("ready", flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 3
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal does it
    else:
        parent.send_signal(number)
    told = b"" if number == signal.SIGKILL else b"told once\n"
    assert parent.communicate(timeout=20) == (told, b"")  # ends when the last process has closed both
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_one_core_is_left_for_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 2, 3, 5, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        found.append(default_workers())
    assert found == [1, 1, 2, 4, 4]


def test_not_one_readable_image_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="all 4 failed") as caught:
        require_some(0, 4)
    assert caught.value.exit_code == 65
    require_some(1, 4)
    require_some(0, 0)


@pytest.fixture
def odd_files(tmp_path: Path) -> ImageFiles:
    """A plain square, a strip, and a TIFF of two pages, which is a strip as well."""
    square, strip = Image.new("RGB", (80, 80)), Image.new("RGB", (800, 80))
    square.save(tmp_path / "square.png")
    strip.save(tmp_path / "strip.png")
    strip.copy().save(tmp_path / "pages.tif", save_all=True, append_images=[square.copy()])
    return ImageFiles(tuple(tmp_path / name for name in ("square.png", "strip.png", "pages.tif")))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_done_to_images_is_said_in_lines(odd_files: ImageFiles, workers: int) -> None:
    preprocess, told = Preprocessing(80, (0, 0, 0), (1, 1, 1), "short", 8, max_tokens=400), []
    changes, other = Changes(), Changes()
    for indices, into in (([0, 1, 1, 0], changes), ([1, 2], other)):
        loaded = load_in_order(odd_files, preprocess, indices, workers)
        assert len(list(readable(loaded, {}, told.append, into))) == len(indices)
    changes.tell(told.append, 400)
    assert told == [Noted("1 image (strip.png) scaled down to at most 400 patch tokens (--max-tokens)")]
    changes.merge(other)
    told.clear()
    changes.tell(told.append, 1400)
    assert told == [
        Noted("only the first page or frame is used of 1 image (pages.tif)"),
        Noted("2 images (strip.png, …) scaled down to at most 1,400 patch tokens (--max-tokens)"),
    ]


def test_nothing_is_said_of_images_used_as_they_are(files: ImageFiles) -> None:
    changes, told = Changes(), []
    assert list(readable(load_in_order(files, PLAIN, [0, 1]), {}, told.append, changes))
    changes.tell(told.append)
    assert told == []
