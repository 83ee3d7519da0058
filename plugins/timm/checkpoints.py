"""Which tensors of a checkpoint are the backbone's, converted by timm's own function where their names are others'."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import timm
import torch
from timm.models import _builder as builder
from torch import Tensor, nn

from sinder_cli import BadInputError, MemoryTensors, Weights, require_matching

from .architecture import Architecture, create

ANCHOR = "patch_embed.proj.weight"  # of timm's own checkpoints, and of most official ones
TOWERS = ("visual.conv1.weight",)  # that timm's functions know by this name, text beside them
TOWER = "visual."
WRAPPERS = ("model_ema", "model", "module", "state_dict")  # that timm's functions look into, one inside another
ENCODER = "encoder"  # of I-JEPA, the same
# What a backbone does without when it runs: a token for masked patches, a mask of biases; what timm computes itself.
COMPUTED = ("periods", "relative_position_index", "freqs_cos", "freqs_sin")
UNUSED = ("mask_token", "bias_mask", *COMPUTED)
HALF_PRECISION = 0.01  # relative: what a computed number may be off that was stored in bfloat16
SIZES = r"(_?(reg)?\d+)+"  # in a name of timm's, with the word for registers
REGISTERS = ("reg_token", "register_tokens")  # timm's name, and the official one
ROUNDING = 0.01  # of a tag, where a function resamples a tensor that is the same all over

Filter = Callable[[dict[str, Any], nn.Module], Mapping[str, Tensor]]


def backbone_weights(name: str, described: Architecture, weights: Weights) -> Weights:
    """The tensors of the backbone by timm's names, those of the classifier left out.

    Where names and shapes are timm's already, they are read lazily. Others are converted, all tensors at once, by the
    function that timm itself applies to the official checkpoints of this model. It may give tensors other names and
    order their numbers anew, and nothing else: `require_as_stored`. Raises `BadInputError` for weights that do not fit.
    """
    shapes = described.shapes
    located = _located(weights)
    found = without(located, described.classifiers)
    if {tensor: found.shape(tensor) for tensor in found.names} != shapes:
        with contextlib.suppress(LookupError):
            convert = filter_of(name)
            left_out = require_as_stored(name, located, described, convert)
            found = without(converted(name, located, described.module, convert), described.classifiers)
            found = replace(found, ignored=(*found.ignored, *left_out))
    require_matching(shapes, found, f"timm/{name}")
    return found


def _located(weights: Weights) -> Weights:
    """The backbone inside a training checkpoint; of a file in which none can be told, all there is."""
    own = any(name.startswith(f"{ENCODER}.") for name in weights.names)
    averaged = any(name.startswith(f"target_{ENCODER}.") for name in weights.names)
    if weights.branch is None and own and not averaged:
        weights = weights.without(lambda name: not name.startswith(f"{ENCODER}."))  # as timm does it, of I-JEPA
    if weights.holds(ANCHOR):
        return weights.located(ANCHOR)
    for anchor in TOWERS:
        if weights.holds(anchor):
            return weights.located(anchor).without(lambda name: not name.startswith(TOWER))
    return weights


def require_as_stored(name: str, weights: Weights, described: Architecture, convert: Filter) -> tuple[str, ...]:
    """Refuse a conversion that changes, resizes or drops what a file holds; the stored names of what it may leave out.

    timm's function is run on tensors each of which is one number, its own, all over: what comes out tells whose numbers
    lie where, and how many of them. Left out may be the classifier, what a backbone does without (`UNUSED`), and zeros.
    """
    sizes = {stored: math.prod(weights.shape(stored)) for stored in weights.names}
    tags = {stored: tag for tag, stored in enumerate(sizes, start=1)}
    tagged = {stored: torch.tensor(float(tag)).expand(weights.shape(stored)) for stored, tag in tags.items()}
    used = _used(name, weights, described, tags, _converted(name, weights, described.module, convert, tagged))
    for stored in sizes:
        if used[stored] > sizes[stored]:
            raise _resized(name, weights, described, stored)
        if 0 < used[stored] < sizes[stored]:
            _require_rest_zero(name, weights, described, convert, stored)
    dropped = [stored for stored, size in sizes.items() if size and not used[stored]]
    classifiers = tuple(f"{layer}." for layer in described.classifiers)
    missed = [s for s in dropped if s.rsplit(".", 1)[-1] not in UNUSED and not s.startswith(classifiers)]
    if any(bool(weights.read([stored])[stored].count_nonzero()) for stored in missed):
        raise _dropped(name, weights, missed)
    _require_as_computed(name, weights, [stored for stored in dropped if stored.rsplit(".", 1)[-1] in COMPUTED])
    return tuple(weights.stored_names[stored] for stored in dropped)


def _require_as_computed(name: str, weights: Weights, stored: Sequence[str]) -> None:
    """Refuse stored angles and the like that are others than timm computes in their place, where it can be told."""
    if not stored:
        return
    with contextlib.suppress(TypeError), torch.device("cpu"):  # TypeError: a model that takes no depth
        buffers = {key.rsplit(".", 1)[-1]: value for key, value in create(name, depth=1).named_buffers()}
        for each in stored:
            own, found = buffers.get(each.rsplit(".", 1)[-1]), weights.read([each])[each]
            if (
                own is not None
                and own.shape == found.shape
                and not torch.allclose(own.float(), found.float(), rtol=HALF_PRECISION)
            ):
                raise _changed(name, weights, f"its {each} are others than those of this model")


def _used(
    name: str, weights: Weights, described: Architecture, tags: Mapping[str, int], made: Mapping[str, Tensor]
) -> Counter[str]:
    """How many numbers come of each stored tensor, given what is made of the tagged ones.

    Of a model whose registers have no position, the class token takes its own in: cls_token + pos_embed[0].
    """
    of_tag = {tag: stored for stored, tag in tags.items()}
    folded = tags.get("cls_token", 0) + tags.get("pos_embed", 0)
    counts = Counter[str]()
    for tensor, values in made.items():
        numbers, found = values.float().unique(return_counts=True)
        for number, count in zip(numbers.tolist(), found.tolist(), strict=True):
            tag = round(number)
            if tensor == "cls_token" and tag == folded:
                counts.update({"cls_token": count, "pos_embed": count})
            elif tag in of_tag and abs(number - tag) < ROUNDING:
                counts[of_tag[tag]] += count
            elif number != 0 and tensor in weights and weights.shape(tensor) != tuple(values.shape):
                raise _resized(name, weights, described, tensor)
            elif number != 0:
                raise _changed(name, weights, f"timm's function mixes the numbers of {tensor}")
    return counts


def _require_rest_zero(name: str, weights: Weights, described: Architecture, convert: Filter, stored: str) -> None:
    """Refuse a conversion that takes some numbers of a tensor alone, unless the others are zeros."""
    size = math.prod(weights.shape(stored))
    places = {key: torch.zeros(()).expand(weights.shape(key)) for key in weights.names}
    places[stored] = torch.arange(1.0, size + 1).reshape(weights.shape(stored))
    found: set[float] = set()
    for values in _converted(name, weights, described.module, convert, places).values():
        found |= set(values.float().unique().tolist()) - {0.0}
    if not found <= set(map(float, range(1, size + 1))):
        raise _resized(name, weights, described, stored)
    rest = torch.ones(size, dtype=torch.bool)
    rest[[int(place) - 1 for place in found]] = False
    if bool(weights.read([stored])[stored].flatten()[rest].count_nonzero()):
        raise _dropped(name, weights, [stored], f"{int(rest.sum())} of the {size} numbers of ")


def _resized(name: str, weights: Weights, described: Architecture, stored: str) -> BadInputError:
    """The error for a tensor that timm would resample to the size of the model."""
    wanted = described.shapes.get(stored)
    model = f"and the model's is {_times(wanted)}" if wanted else "and the model's is of another size"
    fitting = fitting_names(name, weights)
    remedy = f"name the model {' or '.join(fitting)}" if fitting else "name the model of this size and patch"
    return _changed(name, weights, f"{stored} is {_times(weights.shape(stored))}, {model}", remedy)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _dropped(name: str, weights: Weights, dropped: Sequence[str], part: str = "") -> BadInputError:
    """The error for numbers that are not zero and that the model has no place for."""
    more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
    remedy = "is it a checkpoint of this model?"
    if dropped[0].endswith("bias") and timm.models.is_model(f"{name}_qkvb"):
        remedy = f"name the model timm/{name}_qkvb"
    return _changed(name, weights, f"it has no place for {part}{dropped[0]}{more}, which are not zero", remedy)


def _changed(name: str, weights: Weights, why: str, remedy: str = "is it a checkpoint of this model?") -> BadInputError:
    return BadInputError(f"weights {weights.source.label} do not fit timm/{name}", why, remedy)


def fitting_names(name: str, weights: Weights) -> list[str]:
    """Names of timm's that differ from this one in sizes and registers alone, and fit what is stored.

    That is the patches, the positions, and whether there are registers.
    """
    skeleton = re.sub(SIZES, "#", name.partition(".")[0])
    near = [other for other in timm.list_models(module="vision_transformer") if re.sub(SIZES, "#", other) == skeleton]
    registers = any(key in weights for key in REGISTERS)
    fitting = []
    for other in near:
        with contextlib.suppress(Exception), torch.device("meta"):
            shapes = {key: tuple(value.shape) for key, value in create(other).state_dict().items()}
            stored = {key: weights.shape(key) for key in ("pos_embed", ANCHOR, "cls_token") if key in weights}
            alike = any(key in shapes for key in REGISTERS) == registers
            if registers and stored.get("pos_embed") == _with_one_more(shapes.get("pos_embed")):
                del stored["pos_embed"]  # the position of cls, which timm's models with registers do without
            if stored and alike and all(shapes.get(key) == shape for key, shape in stored.items()):
                fitting.append(f"timm/{other}")
    return fitting


def _with_one_more(positions: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The shape of positions `[1, T, N]` with one token more."""
    return positions and (positions[0], positions[1] + 1, *positions[2:])


def without(weights: Weights, layers: tuple[str, ...]) -> Weights:
    """The weights but for those of some layers, which are counted as ignored."""
    prefixes = tuple(f"{layer}." for layer in layers)
    kept = {name: stored for name, stored in weights.stored_names.items() if not name.startswith(prefixes)}
    left_out = tuple(name for name in weights.names if name not in kept)
    return replace(weights, stored_names=kept, ignored=(*weights.ignored, *left_out))


def converted(name: str, weights: Weights, module: nn.Module, convert: Filter) -> Weights:
    """The weights as timm's function makes them of these, held in memory."""
    tensors = _converted(name, weights, module, convert, weights.read(weights.names))
    found = Weights.of(MemoryTensors(f"{weights.source.label}, converted by timm", tensors))
    return replace(found, ignored=weights.ignored, prefix=weights.prefix, others=weights.others)


def _converted(
    name: str, weights: Weights, module: nn.Module, convert: Filter, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What timm's function makes of tensors by the names of `weights`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # standard output is for results
            made = dict(convert(nested(tensors), module))
        if strange := [key for key, value in made.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"{strange[0]} is no tensor")
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        sizes = _positions(weights, module)
        why = (
            sizes or f"timm's function for this model cannot convert it ({type(error).__name__}: {_first_line(error)})"
        )
        fitting = fitting_names(name, weights)
        remedy = f"name the model {' or '.join(fitting)}" if fitting else "is it a checkpoint of it?"
        raise BadInputError(f"cannot use weights {weights.source.label}", why, remedy) from error
    return made


def _positions(weights: Weights, module: nn.Module) -> str:
    """The stored positions against the model's, where they differ; those are what the functions fail at."""
    wanted = module.state_dict().get("pos_embed")
    if wanted is None or "pos_embed" not in weights or weights.shape("pos_embed") == tuple(wanted.shape):
        return ""
    return f"pos_embed is {_times(weights.shape('pos_embed'))}, and the model's is {_times(tuple(wanted.shape))}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors in the dictionaries they were stored in, as far as timm's functions look: `model.x` is `x` of `model`."""
    for wrapper in (*WRAPPERS, ENCODER):
        prefix = f"{wrapper}."
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            return {wrapper: inside if wrapper == ENCODER else nested(inside)}
    return dict(tensors)


@cache  # a module is made for it
def filter_of(name: str) -> Filter:
    """The function that timm applies to pretrained tensors of this model, with the options that it binds to it.

    timm hands it to its own loader alone, so a loader that loads nothing takes it. Raises `LookupError` without one.
    """
    taken: list[Filter | None] = []
    with _loading(lambda *_, filter_fn=None, **__: taken.append(filter_fn)), torch.device("meta"):
        create(name, pretrained=True)
    if not taken or taken[0] is None:
        raise LookupError(name)
    return taken[0]


@contextlib.contextmanager
def _loading(load: Callable[..., None]) -> Iterator[None]:
    """Another loader in the place of timm's."""
    own, builder.load_pretrained = builder.load_pretrained, load
    try:
        yield
    finally:
        builder.load_pretrained = own
