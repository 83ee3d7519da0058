"""nano_vit, which sinder does not know: PyTorch's own encoder without biases, softplus, four registers and no cls."""

from typing import Any

import sinder_cli as sinder

SINDER_API = 1
N, DEPTH, PATCH, REGISTERS = 192, 6, 16, 4


def build() -> Any:
    from torch import nn, zeros

    layer = nn.TransformerEncoderLayer(N, 3, activation=nn.Softplus(), batch_first=True, norm_first=True, bias=False)
    vit = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(N), enable_nested_tensor=False)
    vit.patches = nn.Conv2d(3, N, PATCH, PATCH)
    vit.registers = nn.Parameter(zeros(REGISTERS, N))
    return vit


def embed(vit: Any, images: Any) -> Any:  # [B, 3, h · PATCH, w · PATCH] → [B, REGISTERS + h · w, N]
    from torch import cat

    patches = vit.patches(images).flatten(2).transpose(1, 2)
    return cat([vit.registers.expand(len(images), -1, -1), patches], dim=1)


def block_map(at: str) -> sinder.BlockMap:
    def ref(name: str, rows: tuple[int, int] | None = None) -> sinder.WeightRef:
        return sinder.WeightRef(name=f"{at}.{name}", rows=rows)

    norm1, norm2 = (sinder.NormMap(weight=ref(f"{name}.weight"), eps=1e-5) for name in ("norm1", "norm2"))
    value = ref("self_attn.in_proj_weight", rows=(2 * N, 3 * N))  # below queries and keys
    attention = sinder.AttentionMap(norm=norm1, value=value, output=ref("self_attn.out_proj.weight"))
    mlp = sinder.PlainMlpMap(norm=norm2, activation="softplus", up=ref("linear1.weight"), down=ref("linear2.weight"))
    return sinder.BlockMap(attention=attention, mlp=mlp)


@sinder.hookimpl
def sinder_listing() -> list[sinder.Listing]:
    return [sinder.Listing("nano_vit", "an encoder of PyTorch's own", patch_size=PATCH, prefix_tokens=REGISTERS)]


@sinder.hookimpl
def sinder_backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    return sinder.Backbone(
        name=request.model,
        layers=sinder.LayerMap(width=N, blocks=tuple(block_map(f"layers.{index}") for index in range(DEPTH))),
        weights=weights,
        patch_size=PATCH,
        prefix_tokens=REGISTERS,
        has_cls=False,
        image_size=14 * PATCH,
        build=build,
        embed=lambda vit, images: (embed(vit, images), None),
        run_block=lambda vit, index, tokens, _: vit.layers[index](tokens),
        finish=lambda vit, tokens: vit.norm(tokens),
        forward=lambda vit, images: vit(embed(vit, images)),
    )
