"""Telling dialects apart, the HRA authors' files, `ortho`'s own vectors, and what every adapter has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ortho_cli.checkpoints.adapters import Adapter, AdapterLayer, adapter_of, base_bound, read_adapter
from ortho_cli.checkpoints.dialects import detect
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.errors import CheckpointError, NumericsError

DETECTED: dict[str, tuple[list[str], dict[str, Any], dict[str, str], str]] = {
    "peft": (["base_model.model.q.lora_A.weight"], {"peft_type": "LORA"}, {}, "peft"),
    "kohya": (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], {}, {}, "kohya"),
    "lycoris wrapper": (["lycoris_mid_block_attentions_0_proj_in.lokr_w1"], {}, {}, "kohya"),
    "kohya oft": (["oft_unet_conv_in.oft_blocks"], {}, {}, "kohya"),
    "diffusers": (["unet.conv_in.lora_A.weight"], {}, {}, "diffusers"),
    "diffusers, older": (["unet.conv_in.lora.down.weight"], {}, {}, "diffusers"),
    "diffusers, processors": (["down_blocks.0.attn1.processor.to_q_lora.up.weight"], {}, {}, "diffusers"),
    "diffusers, text encoder": (["text_encoder.fc1.lora_linear_layer.up.weight"], {}, {}, "diffusers"),
    "diffusers, other type": (["conv_in.hra_u"], {}, {"lora_adapter_metadata": "{}"}, "diffusers"),
    "hra checkpoint": (["x.fixed_linear.weight", "x.hra_u"], {}, {}, "hra-repo"),
    "hra checkpoint by ortho": (["x.fixed_linear.weight", "x.hra_u"], {}, {"ortho.method": "{}"}, "hra-repo"),
    "hra of their DeBERTa": (["x.weight", "x.hra_u"], {}, {}, "hra-repo"),
    "hra subject": (["mid_block.attn1.processor.to_q_hra.hra_u"], {}, {}, "hra-repo"),
    "ortho": (["x.hra_u"], {}, {"ortho.method": "{}"}, "ortho"),
    "ortho in PEFT's names": (["base_model.model.x.hra_u"], {}, {"ortho.method": "{}"}, "ortho"),
}


@pytest.mark.parametrize("case", DETECTED)
def test_dialects_are_told_by_their_names(case: str) -> None:
    names, config, metadata, dialect = DETECTED[case]
    assert detect([*names, *reversed(names)], config, metadata) == dialect


@pytest.mark.parametrize("names", [["model.layers.0.q_proj.weight"], []])
def test_a_plain_checkpoint_is_no_adapter(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="none named as in any dialect"):
        detect(names, {}, {})


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def reflect(weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """W H_1 ... H_r, one dense reflection after the other."""
    for u in vectors.double().T:
        v = u / u.norm()
        weight = weight - 2 * torch.outer(weight @ v, v)
    return weight


BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"


def hra_checkpoint(layers: Iterable[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.diffusion_model.time_embed.0.weight": torch.ones(2, 2)}
    for layer in layers:
        tensors |= {
            f"{BLOCK}.{layer}.fixed_linear.weight": torch.randn(4, 6),
            f"{BLOCK}.{layer}.hra_u": torch.randn(6, 2),
        }
    return tensors


def test_an_hra_checkpoint_in_ldm_names(tmp_path: Path) -> None:
    tensors = hra_checkpoint(["attn1.to_q", "attn2.to_k"])
    adapter = read_adapter(write(tmp_path / "x.safetensors", tensors))
    canonical = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert (adapter.dialect, adapter.kind) == ("hra-repo", "hra")
    assert list(adapter.layers) == [f"{canonical}.attn1.to_q", f"{canonical}.attn2.to_k"]
    assert not adapter.replacements and not base_bound(adapter)
    assert any("Gram-Schmidt" in note for note in adapter.notes)
    weight = tensors[f"{BLOCK}.attn1.to_q.fixed_linear.weight"].double()
    merged = adapter.operator(f"{canonical}.attn1.to_q", "float64").apply(weight)
    torch.testing.assert_close(merged, reflect(weight, tensors[f"{BLOCK}.attn1.to_q.hra_u"]), rtol=1e-12, atol=1e-12)
    del tensors[f"{BLOCK}.attn1.to_q.fixed_linear.weight"]
    with pytest.raises(CheckpointError, match=r"attn1\.to_q' has vectors .hra_u. but no weight"):
        read_adapter(write(tmp_path / "y.safetensors", tensors))


def test_hra_beside_plain_weights(tmp_path: Path) -> None:
    tensors = {"bert.q.weight": torch.ones(3, 4), "bert.q.bias": torch.ones(3), "bert.q.hra_u": torch.ones(4, 2)}
    assert list(read_adapter(write(tmp_path / "x.safetensors", tensors)).layers) == ["bert.q"]


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_subject_driven_processors(prefix: str, tmp_path: Path) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {f"{prefix}{attention}.processor.to_{x}_hra.hra_u": torch.rand(6, 2) for x in ("q", "k", "v", "out")}
    tensors[f"{prefix}{attention}.processor.hidden_size"] = torch.tensor(6)
    tensors[f"{prefix}{attention}.processor.cross_attention_dim"] = torch.tensor(0)
    adapter = read_adapter(write(tmp_path / "x.safetensors", tensors))
    assert sorted(adapter.layers) == [f"unet.{attention}.{x}" for x in ("to_k", "to_out.0", "to_q", "to_v")]
    twice = tensors | {f"{'' if prefix else 'unet.'}{attention}.processor.to_q_hra.hra_u": torch.rand(6, 2)}
    with pytest.raises(CheckpointError, match="are for the same layer"):
        read_adapter(write(tmp_path / "z.safetensors", twice))
    tensors[f"{prefix}{attention}.processor.scale"] = torch.tensor(0)
    with pytest.raises(CheckpointError, match=r"unknown tensor .*processor\.scale"):
        read_adapter(write(tmp_path / "y.safetensors", tensors))


def test_ortho_vectors_say_side_and_softness(tmp_path: Path) -> None:
    vectors, weight = 0.1 * torch.randn(4, 2), torch.randn(4, 6, dtype=torch.float64)
    method = {"name": "hra", "side": "output", "eps": 1e-2}
    adapter = read_adapter(
        write(tmp_path / "x.safetensors", {"q.hra_u": vectors}, **{"ortho.method": json.dumps(method)})
    )
    assert adapter.dialect == "ortho" and adapter.method == method and not base_bound(adapter)
    chain = torch.eye(4, dtype=torch.float64)
    for u in vectors.double().T:
        chain = chain @ (torch.eye(4) - 2 * torch.outer(u, u) / (u @ u + 1e-2))
    torch.testing.assert_close(adapter.operator("q", "float64").apply(weight), chain.T @ weight)
    for field, value, message in (("side", "left", "names the side 'left'"), ("eps", -1, "eps is '-1'")):
        bad = json.dumps(method | {field: value})
        with pytest.raises(CheckpointError, match=message):
            read_adapter(write(tmp_path / "y.safetensors", {"q.hra_u": vectors}, **{"ortho.method": bad}))
    with pytest.raises(CheckpointError, match=r"ortho\.method is not JSON"):
        read_adapter(write(tmp_path / "z.safetensors", {"q.hra_u": vectors}, **{"ortho.method": "{"}))


def test_gram_schmidt_training_is_not_gram_schmidt_storage(tmp_path: Path) -> None:
    """With a frozen start the columns [Q0 | Q] are a plain chain; only `apply_GS` has them orthonormalised."""
    basis, weight = torch.linalg.qr(torch.randn(6, 2))[0], torch.randn(4, 6, dtype=torch.float64)
    mixed = basis @ torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    reflected = weight - 2 * weight @ basis.double() @ basis.double().T
    for method, vectors, expected in (
        ({"gram_schmidt": True}, basis.repeat(1, 2), weight),
        ({"apply_GS": True}, mixed, reflected),
    ):
        metadata = {"ortho.method": json.dumps(method)}
        path = write(tmp_path / "x.safetensors", {"q.hra_u": vectors.contiguous()}, **metadata)
        merged = read_adapter(path).operator("q", "float64").apply(weight)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_vectors_beside_a_lora_export_win(tmp_path: Path) -> None:
    """An output-side HRA is saved as a LoRA that PEFT loads, bound to its base, and the vectors, bound to none."""
    export = {
        "base_model.model.q.lora_A.weight": torch.rand(2, 6),
        "base_model.model.q.lora_B.weight": torch.rand(4, 2),
    }
    method = {"ortho.method": json.dumps({"name": "hra", "side": "output"})}
    write(tmp_path / "adapter_model.safetensors", export, **method)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    alone = read_adapter(tmp_path)
    assert (alone.dialect, alone.kind, base_bound(alone)) == ("peft", "lora", True)
    write(tmp_path / "hra.safetensors", {"q.hra_u": torch.rand(4, 2)}, **method)
    both = read_adapter(tmp_path)
    assert (both.dialect, both.kind, base_bound(both)) == ("ortho", "hra", False)
    assert both.layers["q"].options["side"] == "output"
    write(tmp_path / "hra.safetensors", {"base_model.model.q.hra_u": torch.rand(4, 2)}, **method)
    assert list(read_adapter(tmp_path).layers) == ["q"]
    write(tmp_path / "hra.safetensors", {"k.hra_u": torch.rand(4, 2)}, **method)
    with pytest.raises(CheckpointError, match="layer 'k' is in one only"):
        read_adapter(tmp_path)


def test_a_value_that_cannot_act_names_its_layer(tmp_path: Path) -> None:
    vectors = torch.ones(6, 2)
    vectors[:, 1] = 0
    adapter = read_adapter(write(tmp_path / "x.safetensors", {"block.q.hra_u": vectors}))
    with pytest.raises(NumericsError, match=r"layer 'block\.q': "):
        adapter.operator("block.q")


def layer(kind: str, options: dict[str, object] | None = None, **shapes: tuple[int, ...]) -> AdapterLayer:
    infos = {role: TensorInfo(role, "F32", shape, Path("x"), 0) for role, shape in shapes.items()}
    return AdapterLayer(kind, infos, options or {})


FITS: list[tuple[AdapterLayer, tuple[int, ...], tuple[int, ...]]] = [
    (layer("hra", vectors=(6, 2)), (4, 6), (6, 4)),
    (layer("hra", {"side": "output"}, vectors=(6, 2)), (6, 4), (4, 6)),
    (layer("hra", vectors=(36, 2)), (8, 4, 3, 3), (8, 4, 1, 1)),
    (layer("lora", down=(2, 6), up=(4, 2)), (4, 6), (6, 4)),
    (layer("lora", {"transposed": True}, down=(2, 6), up=(4, 2)), (6, 4), (4, 6)),
    (layer("lora", down=(2, 4, 3, 3), up=(8, 2, 1, 1)), (8, 4, 3, 3), (8, 4, 3, 5)),
    (layer("lora", down=(2, 4, 1, 1), mid=(2, 2, 3, 3), up=(8, 2, 1, 1)), (8, 4, 3, 3), (8, 4, 1, 1)),
    (layer("lora", {"dora_axis": "input"}, down=(2, 36), up=(8, 2), magnitude=(1, 4, 1, 1)), (8, 4, 3, 3), (8, 36)),
    (layer("loha", w1_a=(4, 2), w1_b=(2, 6), w2_a=(4, 2), w2_b=(2, 6)), (4, 6), (6, 4)),
    (layer("lokr", w1=(2, 3), w2_a=(4, 1), w2_b=(1, 5)), (8, 15), (15, 8)),
    (layer("oft", skew=(3, 1)), (4, 6), (6, 4)),
    (layer("oft", {"block_share": True}, skew=(1, 3)), (4, 6), (6, 4)),
    (layer("boft", blocks=(1, 3, 2, 2), scale=(4, 1)), (4, 6), (6, 6)),
    (layer("diag-oft", blocks=(3, 2, 2)), (6, 4), (4, 6)),
]


@pytest.mark.parametrize(("kept", "fitting", "other"), FITS)
def test_shapes_are_checked_from_headers(kept: AdapterLayer, fitting: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert kept.expects(fitting) is None
    assert str(other) in str(kept.expects(other))
    assert kept.expects((4,)) == "a weight of shape (4,) is not a matrix or a convolution"


def test_ranks_and_parameters() -> None:
    assert layer("hra", vectors=(6, 2)).rank == 2
    assert layer("lora", down=(3, 6), up=(4, 3)).rank == 3
    assert layer("oft", skew=(3, 1)).rank is None
    assert layer("lora", down=(3, 6), up=(4, 3), alpha=()).parameters == 30


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    """A plan reads headers only, while torch still loads elsewhere."""
    path = write(tmp_path / "x.safetensors", hra_checkpoint(["attn1.to_q"]))
    code = (
        "import sys; from ortho_cli.checkpoints.adapters import read_adapter, base_bound;"
        f"a = read_adapter({str(path)!r}); a.layers.popitem()[1].expects((4, 6)); base_bound(a);"
        "assert not {'torch', 'numpy', 'safetensors'} & sys.modules.keys(), 'imported'"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_without_metadata_has_no_method() -> None:
    assert Adapter("x", Path("x"), "peft", "lora", {}).method == {}


def test_components_are_read_from_the_files_that_were_opened(tmp_path: Path) -> None:
    """A variant that was asked for: opened again, the component's folder would give its plain weights."""
    for variant, rank in (("", 2), (".fp16", 4)):
        folder = tmp_path / "both" / "unet"
        folder.mkdir(parents=True, exist_ok=True)
        name = "base_model.model.mid_block.attentions.0.proj_in.hra_u"
        save_file({name: torch.ones(8, rank)}, folder / f"adapter_model{variant}.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HRA", "r": 4}))
    adapter = adapter_of(open_checkpoint(tmp_path / "both", variant="fp16"))
    (layer,) = adapter.layers.values()
    assert (list(adapter.layers), layer.rank) == (["unet.mid_block.attentions.0.proj_in"], 4)
    assert adapter.config["unet"]["r"] == 4
