"""The planted defect is what the plugin says it is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sinder_plugins.demo import tensor_shapes
from sinder_plugins.demo.drawing import draw_images
from sinder_plugins.demo.model import DemoVit
from sinder_plugins.demo.planting import BLOCK, NEURON, demo_weights
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli import BadInputError, ModelRequest, UsageError, api, inputs
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.detection import norm_ratios
from sinder_cli.defects.spectrum import angle_between
from sinder_cli.defects.tokens import patch_grid, residual_stream
from sinder_cli.requests import AnalyzeRequest, PredictRequest

COLUMN = f"blocks.{BLOCK}.down.weight"
HASH = "import hashlib; from sinder_plugins.demo.planting import demo_weights; " + (
    "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in demo_weights(True).values())).hexdigest())"
)


@pytest.fixture(scope="module")
def planted() -> dict[str, Tensor]:
    return demo_weights(True)


@pytest.fixture(scope="module")
def nu(planted: dict[str, Tensor]) -> Tensor:
    """The direction that the planted column writes."""
    column = planted[COLUMN][:, NEURON]
    return column / column.norm()


@pytest.mark.parametrize("kernels", [{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2"}])
def test_another_process_makes_the_same_weights(planted: dict[str, Tensor], kernels: dict[str, str]) -> None:
    environment = os.environ | kernels
    other = subprocess.run([sys.executable, "-c", HASH], capture_output=True, text=True, check=True, env=environment)
    here = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in planted.values()))
    assert other.stdout.strip() == here.hexdigest()


def test_whoever_changes_its_weights_changes_nobody_elses() -> None:
    demo_weights(True)[COLUMN].zero_()
    assert demo_weights(True)[COLUMN].any()


def test_the_twins_differ_in_one_column_of_one_tensor(planted: dict[str, Tensor]) -> None:
    clean = demo_weights(False)
    assert list(planted) == list(clean)
    assert [name for name in planted if not torch.equal(planted[name], clean[name])] == [COLUMN]
    different = (planted[COLUMN] != clean[COLUMN]).any(dim=0).nonzero().flatten().tolist()
    assert different == [NEURON]
    assert not clean[COLUMN][:, NEURON].any()


def test_images_depend_on_the_seed_and_their_number_alone() -> None:
    few, more, others = draw_images(2, seed=3), draw_images(4, seed=3), draw_images(2, seed=4)
    assert [image.tobytes() for image in few] == [image.tobytes() for image in more[:2]]
    assert few[0].tobytes() != few[1].tobytes()
    assert few[0].tobytes() != others[0].tobytes()
    assert {image.size for image in more} == {(320, 320)}


def test_the_predicted_direction_is_near_the_planted_one(nu: Tensor) -> None:
    prediction = api.predict_defects(PredictRequest(ModelRequest("demo_vit"), ("cumulative",)))
    angles = [angle_between(direction, nu) for direction in prediction.directions()]
    assert all(angle < 25 for angle in angles[BLOCK:]), angles
    assert all(angle > 45 for angle in angles[:BLOCK]), angles
    assert prediction.settled_from() == BLOCK == 5
    assert [gap >= 1.1 for gap in prediction.gaps()] == [False] * BLOCK + [True] * (12 - BLOCK)


def test_outlying_tokens_lie_along_the_planted_direction_in_every_image(nu: Tensor) -> None:
    backbone = api.open_model(ModelRequest("demo_vit"))
    module = load_module(backbone)
    preprocess = api.preprocessing(backbone, None)
    images = torch.stack([preprocess(image) for image in draw_images(6, seed=11)])
    with torch.no_grad():
        for block, tokens in enumerate(residual_stream(backbone, module, images)):
            patches = patch_grid(backbone, tokens, images)
            outlying = norm_ratios(patches.norm(dim=-1)) > 3
            per_image = outlying.flatten(1).sum(dim=1)
            assert bool((per_image >= 3).all() if block >= BLOCK else (per_image == 0).all()), (block, per_image)
            if block >= BLOCK:
                unit = torch.nn.functional.normalize(patches[outlying], dim=1)
                observed = torch.linalg.svd(unit, full_matrices=False).Vh[0]
                assert angle_between(observed, nu) < 5


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "DRAWN_IMAGES", 16)


@pytest.mark.usefixtures("few_images")
def test_the_analysis_shows_outliers_only_from_the_planted_block_on() -> None:
    analysis = api.analyze(
        AnalyzeRequest(ModelRequest("demo_vit"), (), AnalyzeSettings(device="cpu", batch_size=16))
    ).analysis
    assert analysis.images == 16
    for row in analysis.blocks:
        assert row.patch_norm is not None
        masked, outlying = row.marked["equation_5"], row.marked["outlying"]
        assert outlying is not None
        if row.block < BLOCK:
            assert masked is None  # the direction is not determined
            assert outlying.tokens == 0
            assert row.observed is None
        else:
            assert masked is not None
            assert min(outlying.tokens, masked.tokens) >= 3 * analysis.images
            assert masked.images == analysis.images
            assert row.observed is not None
            assert row.observed.angle_to_predicted_deg["cumulative"] < 25
            assert row.patch_norm.max > 10 * row.patch_norm.median


@pytest.mark.usefixtures("few_images")
def test_the_clean_twin_has_no_outlying_token_or_settled_direction() -> None:
    settings = AnalyzeSettings(device="cpu", batch_size=16)
    analysis = api.analyze(AnalyzeRequest(ModelRequest("demo_vit_clean"), (), settings)).analysis
    for row in analysis.blocks:
        assert row.marked["outlying"] is not None
        assert row.marked["outlying"].tokens == 0
        assert row.marked["equation_5"] is None
        assert row.gap["cumulative"] < 1.1
    assert api.predict_defects(PredictRequest(ModelRequest("demo_vit_clean"), ("cumulative",))).settled_from() is None


def test_a_third_name_is_refused_with_the_two_existing_ones() -> None:
    with pytest.raises(UsageError, match=r"did you mean demo_vit or demo_vit_clean\?"):
        api.open_model(ModelRequest("demo_vitamin"))


def test_plain_data_and_module_agree_on_names_order_and_shapes() -> None:
    state = DemoVit(scaled_dot_product_attention).state_dict()
    assert list(tensor_shapes().items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"head.weight": torch.ones(2)}, "1 unexpected: head.weight"),
        ({"norm.bias": None}, "1 missing: norm.bias"),
        (
            {"patches.weight": torch.ones(192, 3, 16, 16)},
            r"1 mis-shaped: patches.weight \(192×3×16×16 for",
        ),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_predicted(
    change: dict[str, Tensor | None], why: str, planted: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (planted | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(BadInputError, match=why):
        api.predict_defects(PredictRequest(ModelRequest("demo_vit", tmp_path / "other.safetensors"), ("attention",)))
