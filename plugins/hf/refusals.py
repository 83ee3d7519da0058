"""Library families whose blocks cannot be expressed, each with the block and the reason."""

from __future__ import annotations

from collections.abc import Mapping

POST_NORM = "is post-norm: it normalizes what a sub-layer gives, not what it takes"
HIERARCHICAL = "is hierarchical: the tokens change in number and width between stages"
CONVOLUTIONAL = "is convolutional: there are no tokens whose residual stream could be followed"
EXPERTS = "is a mixture of experts: tokens take different MLPs, which have no one linear part"

REFUSED: Mapping[str, tuple[str, str]] = {
    "swin": ("SwinLayer", HIERARCHICAL),
    "maskformer-swin": ("MaskFormerSwinLayer", HIERARCHICAL),
    "donut-swin": ("DonutSwinLayer", HIERARCHICAL),
    "swinv2": ("Swinv2Layer", POST_NORM),
    "swin2sr": ("Swin2SRLayer", POST_NORM),
    "hiera": ("HieraLayer", HIERARCHICAL),
    "sam2_hiera_det_model": ("Sam2MultiScaleBlock", HIERARCHICAL),
    "dinat": ("DinatLayer", HIERARCHICAL),
    "pvt": ("PvtLayer", HIERARCHICAL),
    "pvt_v2": ("PvtV2BlockLayer", HIERARCHICAL),
    "segformer": ("SegformerLayer", HIERARCHICAL),
    "glpn": ("GLPNLayer", HIERARCHICAL),
    "levit": ("LevitResidualLayer", HIERARCHICAL),
    "cvt": ("CvtLayer", HIERARCHICAL),
    "mobilevit": ("MobileViTLayer", HIERARCHICAL),
    "mobilevitv2": ("MobileViTV2Layer", HIERARCHICAL),
    "swiftformer": ("SwiftFormerEncoderBlock", HIERARCHICAL),
    "groupvit": ("GroupViTStage", HIERARCHICAL),
    "groupvit_vision_model": ("GroupViTStage", HIERARCHICAL),
    "poolformer": ("PoolFormerLayer", CONVOLUTIONAL),
    "focalnet": ("FocalNetLayer", CONVOLUTIONAL),
    "convnext": ("ConvNextLayer", CONVOLUTIONAL),
    "convnextv2": ("ConvNextV2Layer", CONVOLUTIONAL),
    "dinov3_convnext": ("DINOv3ConvNextLayer", CONVOLUTIONAL),
    "resnet": ("ResNetBottleNeckLayer", CONVOLUTIONAL),
    "rt_detr_resnet": ("RTDetrResNetBottleNeckLayer", CONVOLUTIONAL),
    "regnet": ("RegNetYLayer", CONVOLUTIONAL),
    "bit": ("BitBottleneckLayer", CONVOLUTIONAL),
    "efficientnet": ("EfficientNetBlock", CONVOLUTIONAL),
    "align_vision_model": ("AlignVisionBlock", CONVOLUTIONAL),
    "mobilenet_v1": ("MobileNetV1ConvLayer", CONVOLUTIONAL),
    "mobilenet_v2": ("MobileNetV2InvertedResidual", CONVOLUTIONAL),
    "hgnet_v2": ("HGNetV2BasicLayer", CONVOLUTIONAL),
}

# Keys of `config.json` that say how many experts an MLP has, whatever the family is.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
