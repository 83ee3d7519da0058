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
    is named as ignored, and is zero. Tensors `beside`, such as a classifier, stay as they are, and may be ignored; so
    may what is outside the backbone in the file as it is.
    """
    fixed = beside or {}
    outside = {*fixed, *read(Weights.of(MemoryTensors("file", {**tensors, **fixed}))).ignored}
    outside |= {f"{name}_more" for name in outside}
    tried, missed = 0, []
    for done, name, part in changes({name: tensor for name, tensor in tensors.items() if name not in fixed}):
        tried += 1
        changed = {**part, **fixed}
        try:
            found = read(Weights.of(MemoryTensors("file", changed)))
        except BadInputError:
            continue
        left_out = {each: changed[each] for each in found.ignored if each in changed}
        used = found.read(found.names)
        if not torch.equal(_numbers([*used.values(), *left_out.values()]), _numbers(list(changed.values()))):
            missed.append(f"{name} {done}: other numbers are used and left out than the file has")
        wrongly = [each for each, tensor in left_out.items() if each not in outside and bool(tensor.count_nonzero())]
        if wrongly:
            missed.append(f"{name} {done}: {wrongly[0]} is left out, and is not zero")
    return tried, missed


def _numbers(tensors: list[Tensor]) -> Tensor:
    """All numbers of these tensors, in ascending order: the same wherever they lie."""
    return torch.cat([tensor.flatten().double() for tensor in tensors]).sort().values
