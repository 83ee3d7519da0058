"""The families of vision transformers in Hugging Face's library, as data: the name of each part of an encoder.

Names are those of the library's own modules; `{}` is the number of a block. Shapes are written as symbols with spaces:
N width, T rows of the position embedding, P side of a patch, V = 3·P².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD

Embedding = Literal["plain", "resized", "unmasked", "rotary", "normed", "flattened", "relative", "relative of two"]
Triple = tuple[float, float, float]

HALF: Triple = (0.5, 0.5, 0.5)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BlockNames:
    """The names of the parts of a block, relative to the block."""

    norms: tuple[str, str]
    query: str
    key: str
    value: str
    output: str
    mlp: tuple[str, str]  # up, down
    gated: tuple[str, str, str] = ("", "", "")  # gate, up, down
    fused: tuple[str, str] = ("", "")  # gate and up as one tensor, as in older checkpoints, and down
    scales: tuple[str, str] = ("", "")
    table: str = ""  # of biases by relative position


@dataclass(frozen=True)
class StemNames:
    """The names of the parts that turn an image into tokens; empty for a part that a family never has."""

    patch: str
    patch_shape: str = "N 3 P P"
    patch_bias: bool = True
    cls: str = "embeddings.cls_token"
    cls_shape: str = "1 1 N"
    distillation: str = ""
    registers: str = ""
    mask: str = "embeddings.mask_token"
    mask_shape: str = "1 1 N"
    position: str = "embeddings.position_embeddings"
    position_shape: str = "1 T N"
    norm: str = ""
    table: str = ""  # of biases by relative position, shared by all blocks


@dataclass(frozen=True)
class Switches:
    """The optional parts: present always, never, by a key of `config.json`, or by its opposite (`not KEY`).

    None means that the checkpoint decides.
    """

    query_bias: str | bool = True
    key_bias: str | bool = True
    value_bias: str | bool = True
    output_bias: str | bool = True
    mlp_bias: str | bool = True
    scales: str | bool = False
    gated: str | bool = False
    mask: str | bool | None = None
    position: str | bool = True
    table: str | bool = False
    shared_table: str | bool = False
    norm: str | bool = True


@dataclass(frozen=True)
class Family:
    """One family; `defaults` are the values that its `config.json` may omit."""

    module: str  # the library's class
    configuration: str  # and that of its configuration
    block: str
    names: BlockNames
    stem: StemNames
    norm: str
    defaults: Mapping[str, object]
    embedding: Embedding
    switches: Switches = Switches()
    prefix: int = 1  # tokens before the patches that have a row in the position embedding
    finishes: bool = True  # whether the library's last hidden state is normalized
    heads: tuple[str, ...] = ("pooler.",)  # prefixes inside the encoder that do not belong to it
    astray: tuple[str, str] = ("", "")  # an encoder's prefix, and the prefix of names stored without it
    renames: tuple[tuple[str, str], ...] = ()  # from the names of older checkpoints, as regular expressions
    arguments: Mapping[str, object] = field(default_factory=dict)  # of the module, to omit its heads
    mask_argument: str = ""  # argument of the module that decides whether it has a mask token
    settings: Mapping[str, object] = field(default_factory=dict)  # of the configuration, for the same purpose
    mean: Triple = HALF
    std: Triple = HALF


QKV_BIAS = Switches(query_bias="qkv_bias", key_bias="qkv_bias", value_bias="qkv_bias")
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
VIT_SIZES = {**SIZES, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12}

# From the layout before transformers 5 to the present one. Present versions still write the old layout.
RENAMED_PROJECTIONS = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
RENAMED_BLOCKS = (
    (r"^encoder\.layer\.", "layers."),
    *RENAMED_PROJECTIONS,
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

DINOV2_BLOCK = BlockNames(
    norms=("norm1", "norm2"),
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    gated=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    fused=("mlp.weights_in", "mlp.weights_out"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
VIT_BLOCK = replace(
    DINOV2_BLOCK,
    norms=("layernorm_before", "layernorm_after"),
    scales=("lambda_1", "lambda_2"),
    table="relative_position_bias.relative_position_bias_table",
)
DINOV3_BLOCK = replace(DINOV2_BLOCK, mlp=("mlp.up_proj", "mlp.down_proj"))
DATA2VEC_BLOCK = replace(
    VIT_BLOCK,
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    table="attention.attention.relative_position_bias.relative_position_bias_table",
)
CLIP_BLOCK = BlockNames(
    norms=("layer_norm1", "layer_norm2"),
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)

VIT_STEM = StemNames(patch="embeddings.patch_embeddings.projection")
CLIP_STEM = StemNames(
    patch="embeddings.patch_embedding",
    patch_bias=False,
    cls="embeddings.class_embedding",
    cls_shape="N",
    mask="",
    position="embeddings.position_embedding.weight",
    position_shape="T N",
    norm="pre_layrnorm",  # so spelt in the library and in every checkpoint
)
SIGLIP_STEM = replace(CLIP_STEM, patch_bias=True, cls="", norm="")

VIT = Family(
    module="ViTModel",
    configuration="ViTConfig",
    block="layers.{}",
    names=VIT_BLOCK,
    stem=VIT_STEM,
    norm="layernorm",
    defaults={**VIT_SIZES, "qkv_bias": True},
    embedding="resized",
    switches=QKV_BIAS,
    renames=RENAMED_BLOCKS,
    arguments={"add_pooling_layer": False},
    mask_argument="use_mask_token",
)
DINOV2 = Family(
    module="Dinov2Model",
    configuration="Dinov2Config",
    block="encoder.layer.{}",
    names=DINOV2_BLOCK,
    stem=replace(VIT_STEM, mask_shape="1 N"),
    norm="layernorm",
    defaults={
        **SIZES,
        "patch_size": 14,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    },
    embedding="plain",
    switches=replace(QKV_BIAS, scales=True, gated="use_swiglu_ffn", mask=True),
    renames=RENAMED_PROJECTIONS,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
BEIT_SWITCHES = Switches(
    key_bias=False,
    scales="layer_scale_init_value",
    mask="use_mask_token",
    position="use_absolute_position_embeddings",
    table="use_relative_position_bias",
    shared_table="use_shared_relative_position_bias",
    norm="not use_mean_pooling",
)
BEIT = replace(
    VIT,
    module="BeitModel",
    configuration="BeitConfig",
    stem=replace(VIT_STEM, table="shared_position_bias.relative_position_bias_table"),
    defaults={
        **VIT_SIZES,
        "layer_scale_init_value": 0.1,
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mean_pooling": True,
    },
    embedding="relative",
    switches=BEIT_SWITCHES,
    renames=(
        (r"^encoder\.relative_position_bias\.", "shared_position_bias."),
        (r"\.attention\.attention\.relative_position_bias\.", ".relative_position_bias."),
        *RENAMED_BLOCKS,
    ),
    mask_argument="",
)
CLIP = Family(
    module="CLIPVisionModel",
    configuration="CLIPVisionConfig",
    block="encoder.layers.{}",
    names=CLIP_BLOCK,
    stem=CLIP_STEM,
    norm="post_layernorm",
    defaults={
        **SIZES,
        "patch_size": 32,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    embedding="normed",
    finishes=False,  # it normalizes cls alone, when it pools
    heads=("embeddings.position_ids",),  # not a head: the numbers from 0 on, stored in older checkpoints
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
SIGLIP = replace(
    CLIP,
    module="SiglipVisionModel",
    configuration="SiglipVisionConfig",
    stem=SIGLIP_STEM,
    defaults={
        **CLIP.defaults,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    embedding="resized",
    prefix=0,
    finishes=True,
    heads=("head.", "embeddings.position_ids"),
    settings={"vision_use_head": False},
    mean=HALF,
    std=HALF,
)

FAMILIES: Mapping[str, Family] = {
    "dinov2": replace(
        DINOV2,
        defaults={**DINOV2.defaults, "use_mask_token": True},
        switches=replace(DINOV2.switches, mask="use_mask_token"),
    ),
    "dinov2_with_registers": replace(
        DINOV2,
        module="Dinov2WithRegistersModel",
        configuration="Dinov2WithRegistersConfig",
        stem=replace(DINOV2.stem, registers="embeddings.register_tokens"),
        defaults={**DINOV2.defaults, "patch_size": 16, "num_register_tokens": 4},
    ),
    "dinov3_vit": Family(
        module="DINOv3ViTModel",
        configuration="DINOv3ViTConfig",
        block="model.layer.{}",
        names=DINOV3_BLOCK,
        stem=StemNames(patch="embeddings.patch_embeddings", registers="embeddings.register_tokens", position=""),
        norm="norm",
        defaults={
            **SIZES,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
            "use_gated_mlp": False,
            "num_register_tokens": 0,
        },
        embedding="rotary",
        switches=Switches(
            query_bias="query_bias",
            key_bias="key_bias",
            value_bias="value_bias",
            output_bias="proj_bias",
            mlp_bias="mlp_bias",
            scales=True,
            gated="use_gated_mlp",
            mask=True,
            position=False,
        ),
        renames=((r"^layer\.", "model.layer."),),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "vit": VIT,
    "deit": replace(
        VIT,
        module="DeiTModel",
        configuration="DeiTConfig",
        stem=replace(VIT_STEM, distillation="embeddings.distillation_token"),
        prefix=2,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "vit_mae": replace(
        VIT,
        module="ViTMAEModel",
        configuration="ViTMAEConfig",
        stem=replace(VIT_STEM, mask=""),
        embedding="unmasked",
        arguments={},
        mask_argument="",
        settings={"mask_ratio": 0.0},
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "vit_msn": replace(
        VIT,
        module="ViTMSNModel",
        configuration="ViTMSNConfig",
        astray=("vit.", "encoder."),  # in files of the library's own classifier
        defaults={**VIT.defaults, "layer_norm_eps": 1e-6},
        arguments={},
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "ijepa": replace(
        VIT,
        module="IJepaModel",
        configuration="IJepaConfig",
        stem=replace(VIT_STEM, cls=""),
        prefix=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "beit": BEIT,
    "data2vec-vision": replace(
        BEIT,
        module="Data2VecVisionModel",
        configuration="Data2VecVisionConfig",
        block="encoder.layer.{}",
        names=DATA2VEC_BLOCK,
        stem=replace(VIT_STEM, table="encoder.relative_position_bias.relative_position_bias_table"),
        embedding="relative of two",
        renames=(),
    ),
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "siglip2_vision_model": replace(
        SIGLIP,
        module="Siglip2VisionModel",
        configuration="Siglip2VisionConfig",
        stem=replace(SIGLIP_STEM, patch_shape="N V"),
        defaults={**SIGLIP.defaults, "num_patches": 256},
        embedding="flattened",
    ),
}
