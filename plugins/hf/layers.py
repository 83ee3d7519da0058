"""The layer map of an encoder, and the tensors that it must have, from its family's names and its configuration."""

from __future__ import annotations

from sinder_cli import (
    AttentionMap,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    NormMap,
    PlainMlpMap,
    PositionMap,
    StemMap,
    WeightRef,
)

from .config import Config

Shape = tuple[int, ...]

STEERED = {"rotary", "relative", "relative of two"}  # embeddings whose positions affect the mixing in every block


def layer_map(config: Config, fused: bool) -> LayerMap:
    """Return the layer map of the whole encoder; with `fused`, gate and up are stored as one tensor."""
    family, parts = config.family, config.parts
    stem = family.stem
    return LayerMap(
        width=config.width,
        blocks=tuple(_block(config, fused, family.block.format(index)) for index in range(config.depth)),
        position=PositionMap(weight=WeightRef(name=stem.position), prefix=family.prefix) if parts.position else None,
        stem=StemMap(
            patch=WeightRef(name=f"{stem.patch}.weight"),
            patch_bias=_ref(f"{stem.patch}.bias", stem.patch_bias),
            cls=_ref(stem.cls, bool(stem.cls)),
            registers=_ref(stem.registers, config.registers > 0),
            mask=_ref(stem.mask, bool(stem.mask and parts.mask)),
            norm=_norm(config, stem.norm) if stem.norm else None,
        ),
        norm=_norm(config, family.norm) if parts.norm else None,
    )


def _block(config: Config, fused: bool, block: str) -> BlockMap:
    return BlockMap(
        attention=_attention(config, block), mlp=(_gated if config.parts.gated else _plain)(config, fused, block)
    )


def _attention(config: Config, block: str) -> AttentionMap:
    names, parts = config.family.names, config.parts
    return AttentionMap(
        norm=_norm(config, f"{block}.{names.norms[0]}"),
        query=WeightRef(name=f"{block}.{names.query}.weight"),
        key=WeightRef(name=f"{block}.{names.key}.weight"),
        value=WeightRef(name=f"{block}.{names.value}.weight"),
        output=WeightRef(name=f"{block}.{names.output}.weight"),
        query_bias=_ref(f"{block}.{names.query}.bias", parts.query_bias),
        key_bias=_ref(f"{block}.{names.key}.bias", parts.key_bias),
        value_bias=_ref(f"{block}.{names.value}.bias", parts.value_bias),
        output_bias=_ref(f"{block}.{names.output}.bias", parts.output_bias),
        scale=_ref(f"{block}.{names.scales[0]}", parts.scales),
        heads=config.heads,
        mixing="other" if config.family.embedding in STEERED else "plain",
    )


def _plain(config: Config, _: bool, block: str) -> PlainMlpMap:
    names, parts = config.family.names, config.parts
    up, down = names.mlp
    return PlainMlpMap(
        norm=_norm(config, f"{block}.{names.norms[1]}"),
        activation=config.activation,
        up=WeightRef(name=f"{block}.{up}.weight"),
        up_bias=_ref(f"{block}.{up}.bias", parts.mlp_bias),
        down=WeightRef(name=f"{block}.{down}.weight"),
        down_bias=_ref(f"{block}.{down}.bias", parts.mlp_bias),
        scale=_ref(f"{block}.{names.scales[1]}", parts.scales),
    )


def _gated(config: Config, fused: bool, block: str) -> GatedMlpMap:
    names, parts, H = config.family.names, config.parts, config.hidden
    gate, up, down = (names.fused[0], *names.fused) if fused else names.gated
    gate_rows, up_rows = ((0, H), (H, 2 * H)) if fused else (None, None)
    return GatedMlpMap(
        norm=_norm(config, f"{block}.{names.norms[1]}"),
        activation=config.activation,
        gate=WeightRef(name=f"{block}.{gate}.weight", rows=gate_rows),
        gate_bias=_ref(f"{block}.{gate}.bias", parts.mlp_bias, gate_rows),
        up=WeightRef(name=f"{block}.{up}.weight", rows=up_rows),
        up_bias=_ref(f"{block}.{up}.bias", parts.mlp_bias, up_rows),
        down=WeightRef(name=f"{block}.{down}.weight"),
        down_bias=_ref(f"{block}.{down}.bias", parts.mlp_bias),
        scale=_ref(f"{block}.{names.scales[1]}", parts.scales),
    )


def _norm(config: Config, name: str) -> NormMap:
    return NormMap(weight=WeightRef(name=f"{name}.weight"), bias=WeightRef(name=f"{name}.bias"), eps=config.eps)


def _ref(name: str, there: bool | None, rows: tuple[int, int] | None = None) -> WeightRef | None:
    return WeightRef(name=name, rows=rows) if there else None


def tensor_shapes(config: Config, fused: bool) -> dict[str, Shape]:
    """Return the name and shape of every tensor that the encoder must have."""
    blocks = (config.family.block.format(index) for index in range(config.depth))
    inside = _block_shapes(config, fused)
    norm = _affine(config.family.norm, (config.width,)) if config.parts.norm else {}
    return (
        _stem_shapes(config) | {f"{block}.{name}": shape for block in blocks for name, shape in inside.items()} | norm
    )


def _stem_shapes(config: Config) -> dict[str, Shape]:
    stem, parts = config.family.stem, config.parts
    N, P, G = config.width, config.patch, config.grid
    sizes = {"N": N, "P": P, "V": 3 * P**2, "T": config.family.prefix + G**2}

    def shape(symbols: str) -> Shape:
        return tuple(sizes.get(symbol) or int(symbol) for symbol in symbols.split())

    named: dict[str, Shape] = {
        stem.cls: shape(stem.cls_shape),
        stem.distillation: (1, 1, N),
        stem.registers: (1, config.registers, N),
        stem.mask if parts.mask else "": shape(stem.mask_shape),
        stem.position if parts.position else "": shape(stem.position_shape),
        stem.table if parts.shared_table else "": _table(config),
    }
    named |= _affine(stem.patch, shape(stem.patch_shape), stem.patch_bias)
    named |= _affine(stem.norm, (N,)) if stem.norm else {}
    return {name: shape for name, shape in named.items() if name}


def _block_shapes(config: Config, fused: bool) -> dict[str, Shape]:
    names, parts = config.family.names, config.parts
    N = config.width
    scales: dict[str, Shape] = dict.fromkeys(names.scales, (N,)) if parts.scales else {}
    return {
        **_affine(names.norms[0], (N,)),
        **_affine(names.query, (N, N), parts.query_bias),
        **_affine(names.key, (N, N), parts.key_bias),
        **_affine(names.value, (N, N), parts.value_bias),
        **_affine(names.output, (N, N), parts.output_bias),
        **_affine(names.norms[1], (N,)),
        **_mlp_shapes(config, fused),
        **scales,
        **({names.table: _table(config)} if parts.table else {}),
    }


def _mlp_shapes(config: Config, fused: bool) -> dict[str, Shape]:
    names, bias, N, H = config.family.names, config.parts.mlp_bias, config.width, config.hidden
    if not config.parts.gated:
        up, down = names.mlp
        return _affine(up, (H, N), bias) | _affine(down, (N, H), bias)
    if fused:
        both, down = names.fused
        return _affine(both, (2 * H, N), bias) | _affine(down, (N, H), bias)
    gate, up, down = names.gated
    return _affine(gate, (H, N), bias) | _affine(up, (H, N), bias) | _affine(down, (N, H), bias)


def _table(config: Config) -> Shape:
    """Return the shape of a bias table: a row per offset of two patches, and for cls–patch, patch–cls and cls–cls."""
    return ((2 * config.grid - 1) ** 2 + 3, config.heads)


def _affine(name: str, weight: Shape, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})
