"""The backbone's tensors in a checkpoint; if their names are not timm's, timm's own function converts them."""

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
TOWERS = ("visual.conv1.weight",)  # vision tower beside a text tower, by the names in timm's functions
TOWER = "visual."
WRAPPERS = ("model_ema", "model", "module", "state_dict")  # nested dictionaries that timm's functions open
ENCODER = "encoder"  # the same for I-JEPA
# Tensors that a running backbone does not need: a token for masked patches, a mask of biases, values computed by timm.
COMPUTED = ("periods", "relative_position_index", "freqs_cos", "freqs_sin")
UNUSED = ("mask_token", "bias_mask", *COMPUTED)
HALF_PRECISION = 0.01  # relative error allowed for a computed number stored in bfloat16
SIZES = r"(_?(reg)?\d+)+"  # numbers in a name of timm, with the word for registers
REGISTERS = ("reg_token", "register_tokens")  # timm's name, and the official one
ROUNDING = 0.01  # of a tag: resampling a constant tensor rounds

Filter = Callable[[dict[str, Any], nn.Module], Mapping[str, Tensor]]


def backbone_weights(name: str, described: Architecture, weights: Weights) -> Weights:
    """Return the tensors of the backbone by timm's names, without those of the classifier.

    If names and shapes are timm's already, tensors are read lazily. Otherwise all tensors are converted at once, by the
    function that timm itself applies to official checkpoints of this model. It may only rename tensors and rearrange
    their numbers, as `require_as_stored` checks. Raises `BadInputError` for weights that do not fit.
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
    """Return the backbone inside a training checkpoint; all tensors if no backbone is recognized."""
    own = any(name.startswith(f"{ENCODER}.") for name in weights.names)
    averaged = any(name.startswith(f"target_{ENCODER}.") for name in weights.names)
    if weights.branch is None and own and not averaged:
        weights = weights.without(lambda name: not name.startswith(f"{ENCODER}."))  # as timm does for I-JEPA
    if weights.holds(ANCHOR):
        return weights.located(ANCHOR)
    for anchor in TOWERS:
        if weights.holds(anchor):
            return weights.located(anchor).without(lambda name: not name.startswith(TOWER))
    return weights


def require_as_stored(name: str, weights: Weights, described: Architecture, convert: Filter) -> tuple[str, ...]:
    """Check that a conversion does not change, resize or drop stored numbers; return the names of unused tensors.

    timm's function is run on constant tensors, each filled with a number of its own, the tag: the result shows whose
    numbers go where, and how many. Allowed to be unused are the classifier, tensors that a running backbone does not
    need (`UNUSED`), and zeros. Raises `BadInputError` for any other change.
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
    """Raise `BadInputError` if stored values that timm computes itself, such as angles, differ from its values."""
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
                raise _changed(name, weights, f"its {each} differ from those of this model")


def _used(
    name: str, weights: Weights, described: Architecture, tags: Mapping[str, int], made: Mapping[str, Tensor]
) -> Counter[str]:
    """Return how many numbers of each stored tensor are used, from the converted tensors `made` of the tagged ones.

    If registers have no position, timm adds the position of cls to its token: cls_token + pos_embed[0].
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
    """Raise `BadInputError` if a conversion uses only some numbers of a tensor, unless the others are zeros."""
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
    """Return the error for a tensor that timm would resample to the size of the model."""
    wanted = described.shapes.get(stored)
    model = f"and the model's is {_times(wanted)}" if wanted else "and the model's has another size"
    fitting = fitting_names(name, weights)
    remedy = f"name the model {' or '.join(fitting)}" if fitting else "name the model of this size and patch"
    return _changed(name, weights, f"{stored} is {_times(weights.shape(stored))}, {model}", remedy)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _dropped(name: str, weights: Weights, dropped: Sequence[str], part: str = "") -> BadInputError:
    """Return the error for numbers that are not zero and that the model has no place for."""
    more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
    remedy = "is it a checkpoint of this model?"
    if dropped[0].endswith("bias") and timm.models.is_model(f"{name}_qkvb"):
        remedy = f"name the model timm/{name}_qkvb"
    return _changed(name, weights, f"the model has no place for {part}{dropped[0]}{more}, which are not zero", remedy)


def _changed(name: str, weights: Weights, why: str, remedy: str = "is it a checkpoint of this model?") -> BadInputError:
    return BadInputError(f"weights {weights.source.label} do not fit timm/{name}", why, remedy)


def fitting_names(name: str, weights: Weights) -> list[str]:
    """Return names of timm that differ from this one only in sizes and registers, and fit the stored tensors.

    The patch projection, the positions, cls and the presence of registers are compared.
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
                del stored["pos_embed"]  # it includes the position of cls, which timm's models with registers lack
            if stored and alike and all(shapes.get(key) == shape for key, shape in stored.items()):
                fitting.append(f"timm/{other}")
    return fitting


def _with_one_more(positions: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape of positions `[1, T, N]` with one more token."""
    return positions and (positions[0], positions[1] + 1, *positions[2:])


def without(weights: Weights, layers: tuple[str, ...]) -> Weights:
    """Return the weights without those of some layers, which count as ignored."""
    prefixes = tuple(f"{layer}." for layer in layers)
    kept = {name: stored for name, stored in weights.stored_names.items() if not name.startswith(prefixes)}
    left_out = tuple(name for name in weights.names if name not in kept)
    return replace(weights, stored_names=kept, ignored=(*weights.ignored, *left_out))


def converted(name: str, weights: Weights, module: nn.Module, convert: Filter) -> Weights:
    """Return these weights converted by timm's function, in memory."""
    tensors = _converted(name, weights, module, convert, weights.read(weights.names))
    found = Weights.of(MemoryTensors(f"{weights.source.label}, converted by timm", tensors))
    return replace(found, ignored=weights.ignored, prefix=weights.prefix, others=weights.others)


def _converted(
    name: str, weights: Weights, module: nn.Module, convert: Filter, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Convert tensors with the names of `weights` by timm's function. Raises `BadInputError` if it fails."""
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
        remedy = f"name the model {' or '.join(fitting)}" if fitting else "is it a checkpoint of this model?"
        raise BadInputError(f"cannot use weights {weights.source.label}", why, remedy) from error
    return made


def _positions(weights: Weights, module: nn.Module) -> str:
    """Return a phrase with the shapes of stored and the model's positions if they differ; conversions fail at that."""
    wanted = module.state_dict().get("pos_embed")
    if wanted is None or "pos_embed" not in weights or weights.shape("pos_embed") == tuple(wanted.shape):
        return ""
    return f"pos_embed is {_times(weights.shape('pos_embed'))}, and the model's is {_times(tuple(wanted.shape))}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return tensors nested in the dictionaries that timm's functions open: `model.x` becomes `x` of `model`."""
    for wrapper in (*WRAPPERS, ENCODER):
        prefix = f"{wrapper}."
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            return {wrapper: inside if wrapper == ENCODER else nested(inside)}
    return dict(tensors)


@cache  # it makes a module, which is slow
def filter_of(name: str) -> Filter:
    """Return the function that timm applies to pretrained tensors of this model, with its options bound.

    timm passes it only to its own loader; a temporary loader, which loads nothing, receives it instead. Raises
    `LookupError` if there is none.
    """
    taken: list[Filter | None] = []
    with _loading(lambda *_, filter_fn=None, **__: taken.append(filter_fn)), torch.device("meta"):
        create(name, pretrained=True)
    if not taken or taken[0] is None:
        raise LookupError(name)
    return taken[0]


@contextlib.contextmanager
def _loading(load: Callable[..., None]) -> Iterator[None]:
    """Replace timm's loader by another one inside the context."""
    own, builder.load_pretrained = builder.load_pretrained, load
    try:
        yield
    finally:
        builder.load_pretrained = own
