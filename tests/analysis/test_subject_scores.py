"""DreamBooth's scores of folders, by small networks of the published kinds, against loops over pairs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from ortho_cli.analysis.picture_folder import PictureFolder, open_folder
from ortho_cli.analysis.picture_metrics import PictureOptions, measure_pictures
from ortho_cli.models.stable_diffusion_files import random_parts

SIDE = 16
VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT and a CLIP that know nothing, as folders."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("networks")
    transformers.ViTModel(transformers.ViTConfig(**VISION, image_size=SIDE, patch_size=8)).save_pretrained(root / "vit")
    tokenizer = random_parts("tiny").tokenizer
    text = {**VISION, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**text, **ends}, vision_config={**VISION, "image_size": SIDE, "patch_size": 8}, projection_dim=6
    )
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return root / "vit", root / "clip"


def folder(root: Path, count: int, seed: int, *, suffix: str = "png", shape: tuple[int, int] = (SIDE, SIDE)) -> Path:
    root.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / f"{number:06d}_0.{suffix}")
    return root


def options() -> PictureOptions:
    return PictureOptions(lambda: pytest.fail("the network of --features is not asked for"))


def mean_of_pairs(first: PictureFolder, second: PictureFolder, embed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    found = []
    with torch.no_grad():
        for name in first.names:
            for other in second.names:
                rows = [torch.from_numpy(np.array(each.open(key))).permute(2, 0, 1)[None] / 255
                        for each, key in ((first, name), (second, other))]  # fmt: skip
                found.append(float(F.cosine_similarity(*map(embed, rows))))
    return float(np.mean(found))


def test_pictures_are_compared_pair_by_pair(tmp_path: Path, networks: tuple[Path, Path]) -> None:
    vit, clip = networks
    made, real = open_folder(folder(tmp_path / "made", 3, 0)), open_folder(folder(tmp_path / "real", 2, 1))
    settings = {"dino": {"model": str(vit)}, "clip-i": {"model": str(clip)}}
    found, skipped = measure_pictures(made, real, ["dino", "clip-i"], options(), settings)
    assert not skipped
    dino = transformers.AutoModel.from_pretrained(vit)
    both = transformers.AutoModel.from_pretrained(clip)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    by_dino = mean_of_pairs(made, real, lambda x: dino(pixel_values=(x - mean) / std).last_hidden_state[:, 0])
    by_clip = mean_of_pairs(
        made, real, lambda x: both.visual_projection(both.vision_model((x - mean) / std).pooler_output)
    )
    assert found == pytest.approx({"dino": by_dino, "clip_i": by_clip}, abs=1e-5)


def test_each_picture_is_held_against_its_own_prompt(tmp_path: Path, networks: tuple[Path, Path]) -> None:
    _, clip = networks
    root = folder(tmp_path / "made", 2, 0)
    prompts = {"000000_0.png": "a wet qwe dog", "000001_0.png": "a red qwe dog"}
    lines = [json.dumps({"file": name, "prompt": prompt}) for name, prompt in prompts.items()]
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    made, settings = open_folder(root), {"clip-t": {"model": str(clip)}}
    found, _ = measure_pictures(made, made, ["clip-t"], options(), settings)
    swapped = {name: {"prompt": prompt} for name, prompt in zip(prompts, reversed(prompts.values()), strict=True)}
    other, _ = measure_pictures(PictureFolder(root, made.names, swapped), made, ["clip-t"], options(), settings)
    assert found["clip_t"] != pytest.approx(other["clip_t"], abs=1e-7)
    alone, skipped = measure_pictures(PictureFolder(root, made.names), made, ["clip-t"], options(), settings)
    assert not alone
    assert "no prompt is known for 2 pictures, first 000000_0.png" in str(skipped[0])


def test_references_of_any_type_and_shape_count(tmp_path: Path, networks: tuple[Path, Path]) -> None:
    vit, _ = networks
    made = open_folder(folder(tmp_path / "made", 1, 0))
    square = folder(tmp_path / "real", 2, 1)
    for number, suffix in ((2, "jpeg"), (3, "webp")):
        Image.new("RGB", (3 * SIDE, SIDE), (200, 30, 30)).save(square / f"{number}.{suffix}")
    real = open_folder(square)
    assert len(real) == 4
    found, _ = measure_pictures(made, real, ["dino"], options(), {"dino": {"model": str(vit)}})
    assert -1 <= found["dino"] <= 1


def test_what_is_missing_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    made = open_folder(folder(tmp_path / "made", 1, 0))
    names = ["dino", "clip-i", *([] if importlib.util.find_spec("lpips") else ["lpips"])]
    found, skipped = measure_pictures(made, made, names, options())
    assert not found
    assert [each.metric for each in skipped] == names
    assert skipped[0].command == "hf download facebook/dino-vits16"


def test_lpips_is_a_mean_over_all_pairs_at_512_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    class Difference(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            seen.append(first.shape)
            return (first - second).abs().mean((1, 2, 3), keepdim=True)

    for name in ("lpips", "torchvision"):
        module: Any = ModuleType(name)
        module.__spec__, module.LPIPS = ModuleSpec(name, None), Difference
        monkeypatch.setitem(sys.modules, name, module)
    for name, greys in (("made", (0, 255)), ("real", (0, 51))):
        (tmp_path / name).mkdir()
        for grey in greys:
            Image.new("RGB", (20, 16), (grey,) * 3).save(tmp_path / name / f"{grey}.png")
    found, skipped = measure_pictures(
        open_folder(tmp_path / "made"), open_folder(tmp_path / "real"), ["lpips"], options()
    )
    assert not skipped
    assert found["lpips"] == pytest.approx((0 + 0.4 + 2 + 1.6) / 4, abs=1e-5)
    assert set(seen) == {torch.Size([1, 3, 512, 512])}
