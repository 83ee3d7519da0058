"""Target `transformers`: a folder for `from_pretrained`, with configuration, weights, preprocessor and card.

A model made by transformers keeps its names and its configuration. Any other becomes one of three families, the one
that holds it: ViT, Dinov2 (LayerScale, gated MLPs), Dinov2WithRegisters. Names are those in files on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.storing import write_sharded
from sinder_cli.backbone.weights import Weights
from sinder_cli.defects.tokens import stream_from_embedding
from sinder_cli.errors import BadInputError
from sinder_cli.exporting.conversion import ConvertedTensors
from sinder_cli.exporting.layouts import Architecture, Layout, architecture_of, recipes
from sinder_cli.exporting.targets import CARD_OPTIONS, SHARD_BYTES, ExportCheck, ExportTarget, Loading, Plan
from sinder_cli.exporting.verifying import verify_features
from sinder_cli.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}

_COMMON = Layout(
    cls="embeddings.cls_token",
    position="embeddings.position_embeddings",
    registers="embeddings.register_tokens",
    mask="embeddings.mask_token",
    patch="embeddings.patch_embeddings.projection",
    norm="layernorm",
    block="encoder.layer.{}.",
    norm1="layernorm_before",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    norm2="layernorm_after",
    up="intermediate.dense",
    down="output.dense",
    required=frozenset({"output_bias", "up_bias", "down_bias"}),
)
VIT = replace(_COMMON, mask="")
DINOV2 = replace(
    _COMMON,
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    up="mlp.fc1",
    down="mlp.fc2",
    required=_COMMON.required | {"scale"},
)
DINOV2_GATED = replace(DINOV2, gate="mlp.weights_in", up="mlp.weights_in", down="mlp.weights_out")


@dataclass(frozen=True)
class TransformersModel:
    """A backbone as one of transformers' families."""

    config: Mapping[str, Any]
    weights: Weights


def _config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Return the settings that have the same name in all three families."""
    return {
        "attention_probs_dropout_prob": 0.0,
        "dtype": dtype,
        "hidden_act": ACTIVATIONS[architecture.activation],
        "hidden_dropout_prob": 0.0,
        "hidden_size": architecture.width,
        "image_size": architecture.image_size,
        "initializer_range": 0.02,
        "layer_norm_eps": architecture.eps,
        "num_attention_heads": architecture.heads,
        "num_channels": 3,
        "num_hidden_layers": architecture.depth,
        "patch_size": architecture.patch,
        "qkv_bias": "attention.value_bias" in architecture.biases,
    }


def converted(backbone: Backbone) -> TransformersModel:
    """Return the backbone in the family that holds it. Raises `BadInputError` with the reason if none does."""
    refuse = partial(_refuse, backbone)
    architecture = architecture_of(backbone, "transformers")
    if architecture.has_stem_norm:
        refuse("it has a norm before its first block")
    if architecture.activation not in ACTIVATIONS:
        refuse(f"no family has the activation {architecture.activation}")
    dtype = backbone.weights.info(backbone.weights.names[0]).dtype
    config = _config(architecture, str(dtype).removeprefix("torch."))
    if architecture.layer_scale or architecture.registers or architecture.gated:
        layout, config = _dinov2(backbone, architecture, config)
    else:
        more = {"architectures": ["ViTModel"], "model_type": "vit", "intermediate_size": architecture.hidden}
        layout, config = VIT, config | more
    source = ConvertedTensors(backbone.weights, recipes(layout, backbone, architecture), dtype)
    return TransformersModel(config, Weights.of(source))


def _dinov2(backbone: Backbone, architecture: Architecture, config: dict[str, Any]) -> tuple[Layout, dict[str, Any]]:
    ratio = _mlp_ratio(architecture)
    if ratio is None:
        _refuse(backbone, f"its MLP width {architecture.hidden} is no whole multiple of {architecture.width}")
    if architecture.gated and architecture.activation != "silu":
        _refuse(backbone, f"gates of Dinov2 are SiLU, not {architecture.activation}")
    config |= {
        "apply_layernorm": True,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu" if architecture.gated else config["hidden_act"],  # the gated MLP ignores it
        "layerscale_value": 1.0,
        "mlp_ratio": ratio,
        "reshape_hidden_states": True,
        "use_swiglu_ffn": architecture.gated,
    }
    layout = DINOV2_GATED if architecture.gated else DINOV2
    if architecture.registers:
        family = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        config |= family | {"num_register_tokens": architecture.registers}
        return replace(layout, required=layout.required | {"mask"}), config
    family = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    return layout, config | family | {"use_mask_token": architecture.has_mask}


def _mlp_ratio(architecture: Architecture) -> int | None:
    """Return the integer from which transformers computes the width of the MLP; None if there is none."""

    def hidden(ratio: int) -> int:
        wide = architecture.width * ratio
        return (int(wide * 2 / 3) + 7) // 8 * 8 if architecture.gated else wide

    return next((ratio for ratio in range(1, 17) if hidden(ratio) == architecture.hidden), None)


def _refuse(backbone: Backbone, why: str) -> NoReturn:
    raise BadInputError(f"cannot export {backbone.name} to transformers", why, "use --to native")


def own(backbone: Backbone) -> TransformersModel | None:
    """Return a model made by transformers as it is; None for any other backbone."""
    text = backbone.sidecars.get(CONFIG)
    whole = json.loads(text) if text else {}
    config = whole.get("vision_config", whole)  # for a vision tower that was stored with its text model
    return TransformersModel(config, backbone.weights) if "model_type" in config else None


def preprocessor(backbone: Backbone) -> dict[str, Any]:
    """Return the preprocessing of an image: the shorter side resized, the centre cropped, values normalized."""
    size = backbone.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(backbone.mean),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(backbone.std),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _require(plan: Plan) -> None:
    if own(plan.backbone) is None:
        converted(plan.backbone)


def _write(plan: Plan, path: Path) -> None:
    backbone = plan.backbone
    made = own(backbone) or converted(backbone)
    path.mkdir(exist_ok=True)
    write_json(path / CONFIG, made.config)
    given = {name: text for name, text in backbone.sidecars.items() if name != CONFIG}
    for name, text in given.items():
        (path / name).write_text(text, encoding="utf-8")
    if PREPROCESSOR not in given:
        write_json(path / PREPROCESSOR, preprocessor(backbone))
    tensors = (tensor for _, tensor in made.weights.stream(made.weights.names))
    write_sharded(path, made.weights.output_infos(), tensors, plan.settings.max_shard_size or SHARD_BYTES)


def _verify(plan: Plan, path: Path) -> ExportCheck:
    return verify_features(plan, path, "load_transformers.py", ("transformers",), hidden_states)


def hidden_states(backbone: Backbone, module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the residual stream before the first block and after each one, and the tokens after the final norm."""
    stream = list(stream_from_embedding(backbone, module, images))
    states = {f"hidden_states.{index}": tokens for index, tokens in enumerate(stream)}
    return states | {"last_hidden_state": backbone.finish(module, stream[-1])}


def _loading(_: Plan, place: str) -> Loading:
    return Loading(
        "from transformers import AutoImageProcessor, AutoModel",
        f"model = AutoModel.from_pretrained({place!r})",
        f"processor = AutoImageProcessor.from_pretrained({place!r})",
    )


TARGET = ExportTarget(
    kind="folder",
    summary="a folder for transformers' `from_pretrained`, ready for a hub",
    write=_write,
    verify=_verify,
    loading=_loading,
    require=_require,
    options=frozenset({"--dtype", "--max-shard-size"}) | CARD_OPTIONS,
)
