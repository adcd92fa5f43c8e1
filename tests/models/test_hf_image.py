"""transformers' picture classifiers: loaded whole or refused, with a head for the task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ortho_cli.errors import CheckpointError, RecipeError, UsageError
from ortho_cli.models.hf_image import HFImageClassifier, build
from ortho_cli.recipe.models import HFImage

transformers = pytest.importorskip("transformers", reason="the model is transformers' own")


def section(base: Path | str) -> HFImage:
    return HFImage.model_validate({"name": "hf-image", "base": str(base)})


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_weights_are_the_bases(vit: Path) -> None:
    model = build(section(vit), 3, 3, 8).eval()
    peer = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    images = torch.randn(2, 3, 8, 8)
    assert isinstance(model, HFImageClassifier)
    assert model.notes == []
    torch.testing.assert_close(model(images), peer(pixel_values=images).logits)


def test_another_number_of_classes_gets_a_new_head_and_says_so(vit: Path) -> None:
    torch.manual_seed(1)
    first = build(section(vit), 10, 3, 8)
    torch.manual_seed(1)
    again = build(section(vit), 10, 3, 8)
    assert isinstance(first, HFImageClassifier)
    assert first.notes == ["new head: classifier.bias", "new head: classifier.weight"]
    assert first(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_stored_in_half_trains_in_single(vit: Path, dtype: torch.dtype) -> None:
    """An update of a thousandth of a weight reaches it; in bfloat16 it would be rounded away."""
    half = transformers.AutoModelForImageClassification.from_pretrained(vit).to(dtype)
    half.save_pretrained(vit)
    model = build(section(vit), 3, 3, 8)
    assert isinstance(model, HFImageClassifier)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.notes == [f"from {str(dtype).removeprefix('torch.')} to float32, to train in"]
    assert all(torch.equal(a, b.float()) for a, b in zip(model.model.parameters(), half.parameters(), strict=True))
    weight = model.get_parameter("model.classifier.weight")
    before = weight.detach().clone()
    weight.grad = before * 1e-3
    torch.optim.SGD([weight], lr=1.0).step()
    assert torch.allclose(weight.detach(), 0.999 * before, rtol=1e-6)


def test_grey_pictures_are_repeated(vit: Path) -> None:
    model = build(section(vit), 3, 1, 8).eval()
    grey = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(grey), build(section(vit), 3, 3, 8).eval()(grey.repeat(1, 3, 1, 1)))


def test_a_dry_run_needs_no_weights(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    with torch.device("meta"):
        model = build(section(vit), 10, 3, 8)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_parameter("model.classifier.weight").shape == (10, 8)


def test_a_base_that_lacks_more_than_a_head_is_refused(vit: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(vit / "model.safetensors")
    gone = next(name for name in tensors if "fc1.weight" in name or "intermediate.dense.weight" in name)
    del tensors[gone]
    save_file(tensors, vit / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks more than its head: 1 tensors"):
        build(section(vit), 3, 3, 8)


def test_pictures_of_another_size_are_refused_before_they_reach_the_model(vit: Path) -> None:
    with pytest.raises(RecipeError, match="16 pixels wide, the base was made for 8") as caught:
        build(section(vit), 3, 3, 16)
    assert caught.value.hint == "add size: 8 to the data section"


@pytest.mark.parametrize("base", ["no/such", "nowhere"])
def test_a_base_that_is_not_there(base: str) -> None:
    with pytest.raises(CheckpointError, match="does not open as a picture classifier"):
        build(section(base), 3, 3, 8)


def test_a_language_model_is_no_picture_classifier(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not open as a picture classifier"):
        build(section(tmp_path), 3, 3, 8)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs transformers") as caught:
        build(section("org/name"), 3, 3, 8)
    assert "pip install" in str(caught.value.hint)


def test_gradient_checkpointing_reaches_the_wrapped_model(vit: Path) -> None:
    model = build(section(vit), 3, 3, 8)
    assert isinstance(model, HFImageClassifier)
    gradients = []
    for _ in range(2):
        model.train()(torch.ones(2, 3, 8, 8)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(*gradients)
    flags = [
        flag for module in model.modules() for name, flag in vars(module).items() if name.endswith("checkpointing")
    ]
    assert True in flags
