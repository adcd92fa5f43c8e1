"""A base is known again in every naming and float type, and no other base is taken for it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.layouts import canonical_to_ldm
from ortho_cli.checkpoints.store import Checkpoint, open_checkpoint
from ortho_cli.errors import CheckpointError

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
BLOCK = "unet.down_blocks.0.attentions.0"
LAYERS = [f"{BLOCK}.transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn2.to_k", "ff.net.0.proj")]
LAYERS += [f"{BLOCK}.proj_in", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]


@pytest.fixture
def weights() -> Tensors:
    """Canonical layer name -> weight: small, larger than the hashed edges, and convolutional ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (80, 96), (64, 8), (8, 8, 1, 1), (6, 6)]
    values = [torch.randn(shape, generator=generator).half().float() for shape in shapes]
    return dict(zip(LAYERS, values, strict=True))


def fingerprint(checkpoint: Checkpoint) -> str:
    return base_fingerprint(checkpoint, checkpoint.layers())


def ldm(path: Path, weights: Tensors, save: Save) -> Path:
    return save(path, {f"{canonical_to_ldm(f'{name}.weight')}": weight for name, weight in weights.items()})


def diffusers(folder: Path, weights: Tensors, save: Save, flat: bool = False) -> Path:
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        own = {f"{n.partition('.')[2]}.weight": w for n, w in weights.items() if n.startswith(f"{component}.")}
        if flat:  # transformers >= 5.6
            own = {name.removeprefix("text_model."): weight for name, weight in own.items()}
        save(folder / component / f"{file}.safetensors", own)
    return folder


def test_every_naming_gives_the_same(weights: Tensors, tmp_path: Path, save: Save) -> None:
    checkpoints = [
        open_checkpoint(ldm(tmp_path / "ldm.safetensors", weights, save)),
        open_checkpoint(diffusers(tmp_path / "pipe", weights, save)),
        open_checkpoint(diffusers(tmp_path / "flat", weights, save, flat=True)),
    ]
    assert [checkpoint.layout for checkpoint in checkpoints] == ["sd15-ldm", "sd15-diffusers", "sd15-diffusers"]
    assert len({fingerprint(checkpoint) for checkpoint in checkpoints}) == 1
    unet = {name: weight for name, weight in weights.items() if name.startswith("unet.")}
    alone = open_checkpoint(tmp_path / "pipe" / "unet")
    assert alone.layout == "sd15-unet"
    assert fingerprint(alone) == fingerprint(open_checkpoint(ldm(tmp_path / "unet.safetensors", unet, save)))


def test_every_float_type_gives_the_same(weights: Tensors, tmp_path: Path, save: Save) -> None:
    found = set()
    for dtype in (torch.float16, torch.float32, torch.float64):
        path = ldm(tmp_path / f"{dtype}.safetensors", {name: w.to(dtype) for name, w in weights.items()}, save)
        found.add(fingerprint(open_checkpoint(path)))
    assert len(found) == 1
    coarse = {name: weight.bfloat16() for name, weight in weights.items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        path = ldm(tmp_path / f"coarse-{dtype}.safetensors", {name: w.to(dtype) for name, w in coarse.items()}, save)
        found.add(fingerprint(open_checkpoint(path)))
    assert len(found) == 2  # one for the fine values, one for the coarse


def test_full_precision_rounds_as_torch_rounds(tmp_path: Path, save: Save) -> None:
    values = torch.randn(100, 50, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-9, 41).view(1, 50)
    values[0, :4] = torch.tensor([65519.9, 65520.0, -65520.0, -1e38])
    values[1, :3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    single = save(tmp_path / "single.safetensors", {"x.weight": values})
    half = save(tmp_path / "half.safetensors", {"x.weight": values.half()})
    assert fingerprint(open_checkpoint(single)) == fingerprint(open_checkpoint(half))
    values[2, 0] = float("nan")
    assert len(fingerprint(open_checkpoint(save(tmp_path / "nan.safetensors", {"x.weight": values})))) == 64


def test_the_definition(tmp_path: Path, save: Save) -> None:
    values = torch.arange(5000.0).reshape(50, 100) / 8
    path = save(tmp_path / "x.safetensors", {"b.weight": values, "a.weight": values[:1, :2].clone()})
    flat = values.flatten().tolist()
    expected = hashlib.sha256(b"a:1x2\n" + 2 * struct.pack("<2e", *flat[:2]) + b"b:50x100\n")
    expected.update(struct.pack("<4096e", *flat[:2048], *flat[-2048:]))
    checkpoint = open_checkpoint(path)
    for layers in (["b", "a"], ["a", "b"], ["a", "b", "a"]):
        assert base_fingerprint(checkpoint, layers) == expected.hexdigest()


def test_a_pickled_base_gives_the_same(weights: Tensors, tmp_path: Path, save: Save) -> None:
    safe = open_checkpoint(ldm(tmp_path / "x.safetensors", weights, save))
    named = {f"{canonical_to_ldm(f'{name}.weight')}": weight for name, weight in weights.items()}
    named = {name: w.T.contiguous().T if w.dim() == 2 else w for name, w in named.items()}  # not row-major
    torch.save({"state_dict": named}, tmp_path / "x.ckpt")
    pickled = open_checkpoint(tmp_path / "x.ckpt")
    assert any(info.strides is not None for info in pickled.tensors.values())
    assert fingerprint(pickled) == fingerprint(safe)


def test_a_base_with_an_adapter_in_it_is_hashed_without_it(weights: Tensors, tmp_path: Path, save: Save) -> None:
    plain = open_checkpoint(ldm(tmp_path / "x.safetensors", weights, save))
    tensors: Tensors = {}
    for name, weight in weights.items():
        layer = str(canonical_to_ldm(f"{name}.weight")).removesuffix(".weight")
        tensors[f"{layer}.fixed_linear.weight"] = weight
        tensors[f"{layer}.hra_u"] = torch.ones(weight[0].numel(), 2)
    adapted = open_checkpoint(save(tmp_path / "hra.safetensors", tensors))
    assert list(adapted.layers()) == list(plain.layers())
    assert fingerprint(adapted) == fingerprint(plain)


@pytest.mark.parametrize("change", ["first", "last", "name", "shape", "missing", "more"])
def test_another_base_differs(change: str, weights: Tensors, tmp_path: Path, save: Save) -> None:
    before = fingerprint(open_checkpoint(diffusers(tmp_path / "a", weights, save)))
    layer = LAYERS[1]
    if change in ("first", "last"):
        place = 0 if change == "first" else -1
        weights[layer].view(-1)[place] = weights[layer].view(-1)[place].half().nextafter(torch.tensor(9.0).half())
    elif change == "name":
        weights[LAYERS[2].replace("net.0.proj", "net.2")] = weights.pop(LAYERS[2])
    elif change == "shape":
        weights[layer] = weights[layer].reshape(96, 80)
    elif change == "missing":
        del weights[LAYERS[0]]
    else:
        weights[f"{BLOCK}.proj_out"] = torch.ones(8, 8, 1, 1)
    assert fingerprint(open_checkpoint(diffusers(tmp_path / "b", weights, save))) != before


def test_two_encoders_of_one_name_are_both_hashed(tmp_path: Path, save: Save) -> None:
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    found = set()
    for first, second in ((1, 2), (2, 1), (1, 1)):
        root = tmp_path / f"{first}{second}"
        save(root / "text_encoder" / "model.safetensors", {name: torch.full((2, 2), float(first))})
        save(root / "text_encoder_2" / "model.safetensors", {name: torch.full((2, 2), float(second))})
        found.add(fingerprint(open_checkpoint(root)))
    assert len(found) == 3


def test_what_has_no_fingerprint(tmp_path: Path, save: Save) -> None:
    packed = open_checkpoint(save(tmp_path / "x.safetensors", {"x.weight": torch.ones(2, 2, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"weight 'x\.weight' is I8; a fingerprint needs floats"):
        fingerprint(packed)
    path = save(tmp_path / "y.safetensors", {"y.weight": torch.ones(2, 2)})
    opened = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        fingerprint(opened)
    empty = open_checkpoint(save(tmp_path / "z.safetensors", {"z.weight": torch.ones(0, 2)}))
    assert fingerprint(empty) == hashlib.sha256(b"z:0x2\n").hexdigest()
