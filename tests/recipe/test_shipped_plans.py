"""Every shipped training recipe as a dry run on the meta device, with the parameter counts of the literature."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm_library import needs_timm

from ortho_cli.recipe.catalog import load_any
from ortho_cli.recipe.shipped import shipped
from ortho_cli.recipe.train import TrainRecipe, cell_recipes, load_train
from ortho_cli.training.dry_run import describe

TRAINING = [name for name in shipped() if isinstance(load_any(name), TrainRecipe)]
PLANNED = [pytest.param(name, marks=needs_timm) if load_train(name).model.name == "timm" else name for name in TRAINING]

# Parameters of the model and of those that train; for a matrix in its first cell.
RESNET20 = 269_722 - 2 * 3 * 3 * 16  # the literature's count, with one channel in place of three
VIT = 201_418
SMALL_VIT = 101_834  # of two blocks in place of four
HRA = 4 * 16 * (64 + 64 + 64 + 256)  # 16 reflections on the inputs of the four layers of each of four blocks
HEAD = 65 * 10
SD15 = 859_520_964 + 83_653_863 + 123_060_480  # UNet, autoencoder, text encoder
HINTS = 1_086_480  # the hint encoder of controllable generation
TINY_LM = 164_544
TINY_LM_HRA = 2 * 16 * (6 * 64 + 256)  # 16 reflections on the inputs of the seven layers of each of two blocks
SOC = 64 * 64 * 9 - 64 * 3 * 9  # a filter from 64 channels to 64 in place of one from 3
COUNTS = {
    "glue-deberta-v3-hra": (184_423_682, 663_552),  # the paper's 72 modules; the head does not train
    "glue-deberta-v3-hra-matrix": (184_424_451, 663_552),  # MNLI has three classes
    "docstrings-minilm-comparison": (22_716_681, 8 * 6 * (5 * 384 + 1536) + 9 * 385),
    "quickstart": (RESNET20, RESNET20),
    "digits-resnet20-gor": (RESNET20, RESNET20),
    "digits-resnet20-plain": (RESNET20, RESNET20),
    "digits-vit-pretrain": (VIT, VIT),
    "digits-vit-comparison": (VIT, VIT),
    "digits-vit-hra-finetune": (VIT, HRA + HEAD),
    "digits-vit-hra-matrix": (VIT, HRA + HEAD),
    "digits-vit-oialr": (SMALL_VIT, SMALL_VIT),  # nothing is frozen before a basis has settled
    "digits-vit-oialr-comparison": (SMALL_VIT, SMALL_VIT),
    "digits-vit-oialr-quick": (SMALL_VIT, SMALL_VIT),  # larger patches have as many more weights as positions fewer
    "cifar10-minivit": (42_684_682, 42_684_682),  # timm's count
    "cifar10-minivit-oialr": (42_684_682, 42_684_682),
    "imagenet-vit-b16-oialr": (86_567_656, 86_567_656),
    "imagenet-resnetrs101-oialr": (63_618_696, 63_618_696),  # timm's count too
    "ettm2-forecaster-oialr": (6_352_072, 6_352_072),
    "series-forecaster-oialr": (102_352, 102_352),
    "cifar10-resnet18-whiten": (11_173_962, 11_173_962),
    "cifar10-resnet18-whiten-nog-olr": (11_173_962, 11_173_962),
    "cifar10-resnet18-whiten-nog-olr-soc": (11_173_962, 11_173_962 + SOC),
    "cifar100-resnet50-whiten": (23_705_252, 23_705_252),
    "cifar100-resnet50-whiten-nog-olr-soc": (23_705_252, 23_705_252 + SOC),
    "ffhq-eigengan-nog": (22_994_951 + 13_635_601,) * 2,
    "animeface-eigengan-nog": (10_262_529 + 8_915_985,) * 2,
    "celeba-gan128-nog": (28_416_579 + 27_927_361,) * 2,
    "lsun-church-gan128-nog": (28_416_579 + 27_927_361,) * 2,
    "dsprites-gan-orojar": (2_869_313 + 6_950_721,) * 2,
    "sd15-control-segm-hra": (SD15 + HINTS, 895_488 + HINTS),
    "sd15-control-canny-hra": (SD15 + HINTS, 895_488 + HINTS),
    "sd15-control-landmark-hra": (SD15 + HINTS, 895_488 + HINTS),
    "iwslt14-transformer": (11_890_448, 11_890_448),
    "iwslt14-transformer-factorized": (11_890_448, 6_379_280),
    "catalogues-translator-dense": (902_748, 902_748),
    "catalogues-translator-factorized": (902_748, 513_180),
    "arithmetic-lm-pretrain": (TINY_LM, TINY_LM),
    "arithmetic-lm-hra-finetune": (TINY_LM, TINY_LM_HRA),
    "llama2-metamath-hra": (6_738_415_616, 64 * 4096 * 32),  # rank 32; the paper's 2,097,152 is rank 8
    "llama-3.2-3b-metamath-hra": (3_212_749_824, 56 * 3072 * 32),
    "tiny-sd-pretrain": (268_899, 203_204),  # the UNet trains
    "tiny-sd-lora-gor": (268_899, 5_504),
    "sd15-lora-gor-pokemon": (859_520_964 + 83_653_863 + 123_060_480, 797_184),
    "cifar10-resnet110-gor": (1_795_064, 1_795_064),  # the paper's model with its head of 1000 outputs
}


@pytest.mark.parametrize("name", PLANNED)
def test_each_plans_every_kind_of_cell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {}
    for _, recipe in cell_recipes(load_train(name)):
        kind = recipe.model, recipe.methods
        if repr(kind) not in found:
            found[repr(kind)] = describe(recipe)["totals"]
    assert all(totals["trainable"] > 0 and totals["memory_bytes"] > 0 for totals in found.values())
    first = next(iter(found.values()))
    if name in COUNTS:
        assert (first["parameters"], first["trainable"]) == COUNTS[name]
    assert list(tmp_path.iterdir()) == []


def test_gor_regularises_what_the_paper_does() -> None:
    (line,) = describe(load_train("cifar10-resnet110-gor"))["details"]
    assert (line["layers"], line["added"]) == (111, 0)
