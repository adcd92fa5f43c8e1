"""What add-hra will not do, and why; and that the same command writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import metadata, write_sharded
from safetensors.torch import save_file
from true_scale import LDM, TARGETS, sparse

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, OrthoError, TargetError, UsageError
from ortho_cli.surgery.add_hra import add_hra, plan_add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.small_sd15 import small_sd15


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "v1-5-small.safetensors"
    small_sd15(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A few layers of every kind that matters."""
    tensors = {
        "encoder.proj.weight": torch.randn(6, 12), "encoder.proj.bias": torch.randn(6),
        "encoder.narrow.weight": torch.randn(6, 3), "encoder.conv.weight": torch.randn(4, 3, 3, 3),
        "encoder.wide_conv.weight": torch.randn(4, 3, 1, 5), "encoder.wave.weight": torch.randn(4, 3, 5),
        "encoder.packed.weight": torch.ones(6, 12, dtype=torch.uint8), "embed_tokens.weight": torch.randn(9, 12),
        "norm.weight": torch.ones(12),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("options", "error", "message", "hint"),
    [
        ({"targets": ["*.projj"]}, TargetError, r"'\*\.projj' matched 0 of 7 layers", "proj"),
        ({"targets": ["*.proj"], "rank": 5}, TargetError, "rank 5 is odd: .* determinant -1", "--rank 6"),
        ({"targets": ["*.proj"], "rank": 14}, TargetError, "rank 14 does not fit .*proj, .* 12 wide", "--rank 12"),
        ({"targets": ["*.narrow"], "rank": 4}, TargetError, "does not fit .*narrow, .* 3 wide", "--rank 2 or less"),
        (
            {"targets": ["*.proj"], "rank": 8, "gram_schmidt": True},
            TargetError, "rank 8 does not fit .*12 wide", "--rank 6",
        ),
        ({"targets": ["*.proj"], "rank": 0}, TargetError, "rank 0 at layer encoder.proj", "--rank 8"),
        ({"targets": ["*.proj"], "rank": -3}, TargetError, "rank -3 at layer encoder.proj", "--rank 8"),
        ({"targets": ["*.wide_conv"]}, TargetError, "4x3x1x5; HRA sits on .*square", "--exclude encoder.wide_conv"),
        ({"targets": ["*.wave"]}, TargetError, "4x3x5; HRA sits on", "--exclude encoder.wave"),
        ({"targets": ["*.packed"]}, TargetError, "stored as U8; only float", None),
        ({"targets": ["embed_tokens"]}, TargetError, "embed_tokens is an embedding", "--exclude embed_tokens"),
        ({"targets": ["*.proj"], "exclude": ["*.proj"]}, TargetError, "all of them excluded", "exclusion"),
        ({"targets": ["*.proj"], "exclude": ["*.prok"]}, TargetError, "'\\*.prok' matched 0", "proj"),
        ({}, UsageError, "no default targets are known for model.safetensors", "sd15-control, sd15"),
        ({"targets": ["sd15-control"]}, TargetError, "preset 'sd15-control' does not fit", "patterns"),
        ({"targets": ["*.proj"], "layout": "hra-repo"}, UsageError, "writes one checkpoint file", "NAME.safetensors"),
        ({"targets": ["*.proj"], "ema": "use"}, TargetError, "has no EMA copy", "--ema drop"),
        (
            {"targets": ["*.{proj,narrow}"], "rank": [4, "*.narrow=2"]},
            TargetError, "encoder.narrow is 3 wide; PEFT has one rank for all layers, here 4", "--as checkpoint",
        ),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be(
    model: Path, tmp_path: Path, options: dict[str, Any], error: type[OrthoError], message: str, hint: str | None
) -> None:
    with pytest.raises(error, match=message) as caught:
        add_hra(model, tmp_path / "out", **options)
    assert caught.type is error
    assert (caught.value.hint is None) if hint is None else (hint in (caught.value.hint or ""))
    assert not (tmp_path / "out").exists()


def test_the_same_layers_fit_where_they_fit(model: Path, tmp_path: Path) -> None:
    """The refusals above are not refusals of everything."""
    report = add_hra(model, tmp_path / "out", targets=["*.{proj,conv}"], rank=12)
    assert {detail["name"]: detail["parameters"] for detail in report.details} == {
        "encoder.proj": 12 * 12,
        "encoder.conv": 27 * 12,
    }
    assert add_hra(model, tmp_path / "narrow.safetensors", targets=["*.narrow"], rank=2).layers == 1


@pytest.mark.parametrize(
    ("output", "options", "error", "message"),
    [
        ("x.ckpt", {}, UsageError, "does not write .ckpt files"),
        ("x.safetensors", {"form": "adapter"}, UsageError, "an adapter is a folder"),
        ("x", {"layout": "hra-repo", "form": "checkpoint"}, UsageError, "one checkpoint file"),
        ("x.safetensors", {"layout": "hra-repo", "ema": "keep"}, UsageError, "drops the EMA copy"),
        ("x.safetensors", {"layout": "hra-repo"}, CheckpointError, "lacks .* tensors the authors' loader wants"),
    ],
)
def test_outputs_that_cannot_be(
    small: Path, tmp_path: Path, output: str, options: dict[str, Any], error: type[OrthoError], message: str
) -> None:
    with pytest.raises(error, match=message):
        add_hra(small, tmp_path / output, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["sd15-attention"]}, "needs the 144 layers of sd15-control, found 128"),
        ({"exclude": ["**.ff.**"]}, "needs the 144 layers of sd15-control, found 128"),
        ({"rank": [8, "**.attn2.**=4"]}, "one even rank for all layers, found 4, 8"),
        ({"rank": 5, "gram_schmidt": True}, "one even rank for all layers, found 5"),
    ],
)
def test_a_selection_the_strict_loader_would_refuse(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    full = open_checkpoint(sparse(tmp_path / "v1-5.safetensors"))
    with pytest.raises(TargetError, match=message):
        plan_add_hra(full, tmp_path / "out.safetensors", layout="hra-repo", **options)


@pytest.mark.parametrize("stored", ["fixed_linear.weight", "weight"])
def test_a_base_that_holds_hra_already(tmp_path: Path, stored: str) -> None:
    """Both of the authors' forms: the control model's, and the language models', which keeps `X.weight`."""
    save_file({f"a.{stored}": torch.randn(4, 4), "a.hra_u": torch.randn(4, 2)}, tmp_path / "hra.safetensors")
    with pytest.raises(TargetError, match="already holds a Householder adapter") as caught:
        add_hra(tmp_path / "hra.safetensors", tmp_path / "out", targets=["a"])
    assert "--to base" in (caught.value.hint or "")
    assert "ortho merge" in (caught.value.hint or "")


def test_an_adapter_is_no_model(small: Path, tmp_path: Path) -> None:
    """Its own factors are matrices too, and would be adapted like any."""
    add_hra(small, tmp_path / "hra")
    convert(tmp_path / "hra", tmp_path / "lora", "peft-lora", base=small)
    convert(tmp_path / "hra", tmp_path / "kohya.safetensors", "kohya-lora", base=small)
    for name in ("hra", "lora", "kohya.safetensors"):
        with pytest.raises(TargetError, match=f"{name} is an adapter") as caught:
            add_hra(tmp_path / name, tmp_path / "out", targets=["all-linear"])
        assert "add-hra BASE" in (caught.value.hint or "")


@pytest.mark.parametrize("told_by", ["configuration", "bias"])
def test_gpt2_keeps_its_weights_transposed(tmp_path: Path, told_by: str) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": torch.randn(6, 18), "h.0.attn.c_attn.bias": torch.randn(18),
        "h.0.attn.c_proj.weight": torch.randn(6, 6), "lm_head.weight": torch.randn(9, 6),
    }  # fmt: skip
    if told_by == "configuration":
        del tensors["h.0.attn.c_attn.bias"]
    write_sharded(tmp_path / "gpt2", tensors, 1)
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"} if told_by != "bias" else {}))
    for target in ("c_attn", "c_proj"):
        with pytest.raises(TargetError, match=f"{target} is a transformers Conv1D"):
            add_hra(tmp_path / "gpt2", tmp_path / "out", targets=[target], rank=2)
    assert add_hra(tmp_path / "gpt2", tmp_path / "out", targets=["lm_head"], rank=2).layers == 1


def test_a_linear_of_the_same_name_is_no_conv1d(tmp_path: Path) -> None:
    """Qwen and StarCoder call their Linear layers `c_attn` too."""
    tensors = {"h.0.attn.c_attn.weight": torch.randn(18, 6), "h.0.attn.c_attn.bias": torch.randn(18)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert add_hra(tmp_path / "model.safetensors", tmp_path / "out", targets=["c_attn"], rank=2).layers == 1


def test_ema_of_another_family_is_no_crash(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4)}, tmp_path / "llama.safetensors")
    with pytest.raises(TargetError, match="no EMA copy"):
        add_hra(tmp_path / "llama.safetensors", tmp_path / "out", targets=["q_proj"], rank=2, ema="use")


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return {item.relative_to(path).as_posix(): item.read_bytes() for item in files}


@pytest.mark.parametrize("output", ["adapter", "inside.safetensors"])
def test_the_same_command_writes_the_same_bytes(small: Path, tmp_path: Path, output: str) -> None:
    written = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        add_hra(small, tmp_path / folder / output, rank=[4, "**.ff.**=8"], gram_schmidt=True, seed=3)
        written.append(contents(tmp_path / folder / output))
    assert written[0] == written[1]


@pytest.mark.parametrize("output", ["adapter", "inside.safetensors"])
def test_no_folder_gets_into_what_is_written(small: Path, tmp_path: Path, output: str) -> None:
    add_hra(small, tmp_path / output)
    name = "adapter_model.safetensors" if output == "adapter" else ""
    written = metadata(tmp_path / output / name if name else tmp_path / output)
    assert written["ortho.command"].startswith("ortho add-hra v1-5-small.safetensors --rank 8")
    assert json.loads(written["ortho.method"])["name"] == "hra"
    assert json.loads(written["ortho.targets"]) == ["sd15-control"]
    private = str(small.parent).encode()
    assert not any(private in content or str(tmp_path).encode() in content for content in contents(tmp_path).values())


def test_a_dry_run_writes_nothing_and_says_everything(small: Path, tmp_path: Path) -> None:
    dry = add_hra(small, tmp_path / "out.safetensors", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert (dry.layers, len(dry.details), dry.outputs) == (144, 144, [])
    real = add_hra(small, tmp_path / "out.safetensors")
    assert dry.totals["bytes_out"] == (tmp_path / "out.safetensors").stat().st_size == real.outputs[0]["bytes"]
    assert dry.details == real.details
    assert dry.as_dict()["dry_run"] is True
    assert "dry_run" not in real.as_dict()


def test_true_scale_tables_are_whole() -> None:
    """The data these tests stand on."""
    assert len(LDM) == 1145
    assert len(TARGETS) == 144
    assert sum(width * rank for (width, rank), _ in TARGETS.values()) == 895_488
    assert sum(bias for _, bias in TARGETS.values()) == 48


@pytest.mark.parametrize("options", [{"max_shard_size": "5GB"}, {"ema": "drop"}, {"ema": "keep"}])
def test_options_without_effect_on_an_adapter(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')}") as caught:
        add_hra(model, tmp_path / "out", targets=["*.proj"], **options)
    assert "--as checkpoint" in (caught.value.hint or "")
    assert add_hra(model, tmp_path / "out", targets=["*.proj"], form="checkpoint", **options).layers == 1


def test_one_text_is_one_pattern(model: Path, tmp_path: Path) -> None:
    report = add_hra(model, tmp_path / "out", targets="encoder.{proj,narrow}", exclude="*.narrow", rank="12")
    assert [(detail["name"], detail["rank"]) for detail in report.details] == [("encoder.proj", 12)]
