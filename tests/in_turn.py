"""Every tensor of a checkpoint dropped, doubled, resized and put beside another, one at a time: nothing goes unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sinder_cli import BadInputError, MemoryTensors, Weights

Read = Callable[[Weights], Weights]  # what a plugin makes of the tensors of a file: those of the backbone


def changes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """What is done, to which tensor, and the tensors then."""
    for name, tensor in tensors.items():
        yield "dropped", name, {other: value for other, value in tensors.items() if other != name}
        wider = torch.nn.functional.pad(tensor[None] if tensor.ndim == 0 else tensor, (0, 1), value=0.5)
        yield "resized", name, {**tensors, name: wider}
        yield "joined by another", name, {**tensors, f"{name}_more": torch.ones(2)}


def unseen(
    tensors: Mapping[str, Tensor], read: Read, beside: Mapping[str, Tensor] | None = None
) -> tuple[int, list[str]]:
    """How many changes were tried, and those after which a plugin used other tensors than the file has.

    A file may be refused. One that is not is either used to the last tensor, each as it is stored, or what is not used
    is named as ignored. Tensors `beside` stay as they are.
    """
    fixed = beside or {}
    tried, missed = 0, []
    for done, name, part in changes({name: tensor for name, tensor in tensors.items() if name not in fixed}):
        tried += 1
        changed = {**part, **fixed}
        try:
            found = read(Weights.of(MemoryTensors("file", changed)))
        except BadInputError:
            continue
        held = sum(tensor.numel() for tensor in found.read(found.names).values())
        left_out = sum(changed[each].numel() for each in found.ignored if each in changed)
        everything = sum(tensor.numel() for tensor in changed.values())
        if held + left_out != everything:
            missed.append(f"{name} {done}: {held} numbers used, {left_out} left out, of {everything}")
    return tried, missed
