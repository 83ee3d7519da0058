"""All checks of one backbone, in the order in which one depends on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.opening import load_module
from sinder_cli.conformance import blocks, passes
from sinder_cli.conformance.subject import Candidate, CheckedPoint, Conformance, NonconformityError
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.memory import is_out_of_memory

Question = Callable[[Candidate], str]


def conformance(backbone: Backbone, describe: Callable[[Path], Backbone], emit: Emit = silent) -> Conformance:
    """Run all checks; `describe` is how the plugin describes a file of weights under the same name.

    A check that raises an exception has failed; only exceptions for lack of memory are raised again.
    """
    checks = tuple(_checks(backbone, describe, emit))
    return Conformance(backbone.name, backbone.weights.source.label, checks)


def _checks(backbone: Backbone, describe: Callable[[Path], Backbone], emit: Emit) -> Iterator[CheckedPoint]:
    subjects: list[Candidate] = []

    def load() -> str:
        subjects.append(Candidate(backbone, load_module(backbone), describe))
        return f"{len(backbone.weights.names)} tensors"

    fits = _asked("map: tensors", lambda: passes.map_fits_weights(backbone), emit)
    yield fits
    yield _asked("module: weights", load, emit) if fits.outcome == "passed" else _not_run("module: weights")
    for name, question in _questions(backbone, emit):
        if question is None:
            yield CheckedPoint(name, "not given", "the plugin gives no `forward` to compare with")
        elif subjects:
            yield _asked(name, partial(question, subjects[0]), emit)
        else:
            yield _not_run(name)


def _not_run(name: str) -> CheckedPoint:
    return CheckedPoint(name, "not run", "it needs a module with its weights")


def _questions(backbone: Backbone, emit: Emit) -> list[tuple[str, Question | None]]:
    """Return the checks that need a module, by name; None without `forward`. The repair, which changes it, is late."""
    forward = backbone.forward
    return [
        ("map: roles", lambda subject: passes.roles_are_apart(subject.backbone)),
        ("tokens: prefix", passes.tokens_are_counted),
        ("tokens: patches", passes.patches_lie_row_by_row),
        ("passes: forward", None if forward is None else lambda subject: passes.forward_agrees(subject, forward)),
        ("passes: batches", passes.images_are_apart),
        ("passes: inputs", passes.blocks_keep_their_input),
        ("passes: gradients", passes.gradients_arrive),
        ("blocks: formula", lambda subject: blocks.blocks_follow_the_map(subject, emit)),
        ("blocks: linearization", lambda subject: blocks.linearization_agrees(subject, emit)),
        ("repair: step", passes.repair_keeps_to_the_map),
        ("export: native", passes.export_reads_back),
    ]


def _asked(name: str, ask: Callable[[], str], emit: Emit) -> CheckedPoint:
    emit(Noted(f"checking {name}"))
    try:
        return CheckedPoint(name, "passed", ask())
    except NonconformityError as error:
        return CheckedPoint(name, "failed", str(error))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return CheckedPoint(name, "failed", " ".join(f"{type(error).__name__}: {error}".split()))
