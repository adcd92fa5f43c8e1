"""diff: two checkpoints tensor by tensor, whatever their naming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adapter_folders import Tensors, read, write_sharded
from safetensors.torch import save_file

from ortho_cli.checkpoints.layouts import canonical_shape, to_canonical
from ortho_cli.checkpoints.reading import BLOCK_BYTES
from ortho_cli.errors import CheckpointError, NumericsError, UsageError
from ortho_cli.surgery.diff import diff, judge
from ortho_cli.surgery.small_sd15 import small_sd15


def save(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def base() -> Tensors:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4),
        "a.bias": torch.randn(6),
        "b.weight": torch.randn(3, 3),
        "n": torch.tensor(2),
    }


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return save(tmp_path / "first.safetensors", base())


def statuses(first: Path, second: Path) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in diff(first, second).details}


def test_a_copy_is_equal(first: Path, tmp_path: Path) -> None:
    report = diff(first, save(tmp_path / "second.safetensors", base()), fail_above=0)
    assert (report.details, report.totals["equal"], report.totals["tensors"]) == ([], 4, 4)
    assert report.totals["max_relative_difference"] == 0


def test_every_status(first: Path, tmp_path: Path) -> None:
    tensors = base()
    tensors["a.weight"][0, 0] += 1
    tensors["a.bias"] = tensors["a.bias"].double()
    tensors["b.weight"] = torch.zeros(9, 1)
    tensors["extra"] = tensors.pop("n")
    second = save(tmp_path / "second.safetensors", tensors)
    assert statuses(first, second) == {
        "a.weight": "changed", "a.bias": "dtype", "b.weight": "shape", "n": "only in first", "extra": "only in second",
    }  # fmt: skip
    totals = diff(first, second).totals
    assert [totals[key] for key in ("equal", "changed", "dtype", "shape", "only_in_first", "only_in_second")] == [
        0, 1, 1, 1, 1, 1,
    ]  # fmt: skip


def test_equally_many_numbers_in_another_shape_are_not_compared(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    first = save(tmp_path / "a.safetensors", {"w": matrix})
    second = save(tmp_path / "b.safetensors", {"w": matrix.T.contiguous()})
    (entry,) = diff(first, second).details
    assert (entry["status"], entry["shape"], entry["other_shape"]) == ("shape", [4, 6], [6, 4])


def test_differences_are_measured_to_the_first(first: Path, tmp_path: Path) -> None:
    tensors = base()
    noise = 0.1 * torch.randn(6, 4)
    tensors["a.weight"] = tensors["a.weight"] + noise
    (entry,) = diff(first, save(tmp_path / "second.safetensors", tensors)).details
    change = tensors["a.weight"].double() - base()["a.weight"].double()
    assert entry["max_difference"] == pytest.approx(float(change.abs().max()), rel=1e-12)
    assert entry["relative_difference"] == pytest.approx(
        float(change.norm() / base()["a.weight"].double().norm()), rel=1e-9
    )


def test_blocks_and_dtypes_add_up(tmp_path: Path) -> None:
    """A tensor of several blocks of rows, against its half-precision copy."""
    torch.manual_seed(1)
    tall = torch.randn(3 * BLOCK_BYTES // (4 * 256) + 1, 256)
    halved = tall.half()
    halved[-1, -1] += 2
    first = save(tmp_path / "a.safetensors", {"w": tall})
    (entry,) = diff(first, save(tmp_path / "b.safetensors", {"w": halved})).details
    wanted = (tall.double() - halved.double()).norm() / tall.double().norm()
    assert (entry["status"], entry["dtype"], entry["other_dtype"]) == ("changed", "F32", "F16")
    assert entry["relative_difference"] == pytest.approx(float(wanted), rel=1e-9)
    assert entry["max_difference"] == pytest.approx(2, abs=1e-2)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    odd = torch.tensor([1.0, float("nan"), float("inf"), -2.0])
    first = save(tmp_path / "a.safetensors", {"w": odd})
    assert diff(first, save(tmp_path / "same.safetensors", {"w": odd.clone()})).details == []
    lost = odd.clone()
    lost[1] = 0.0
    (entry,) = diff(first, save(tmp_path / "lost.safetensors", {"w": lost})).details
    assert entry["relative_difference"] == entry["max_difference"] == math.inf
    moved = odd.clone()
    moved[3] = -1.0
    (entry,) = diff(first, save(tmp_path / "moved.safetensors", {"w": moved})).details
    assert entry["relative_difference"] == pytest.approx(1 / 5**0.5)  # an infinite norm hides nothing


def test_from_nothing_is_infinitely_far(tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", {"w": torch.zeros(3), "empty": torch.zeros(0, 4)})
    second = save(tmp_path / "b.safetensors", {"w": torch.ones(3), "empty": torch.zeros(0, 4)})
    (entry,) = diff(first, second).details
    assert entry["relative_difference"] == math.inf


class TestFailAbove:
    @pytest.mark.parametrize(("limit", "fails"), [(0.0, True), (1e-3, True), (0.5, False)])
    def test_values(self, first: Path, tmp_path: Path, limit: float, fails: bool) -> None:
        second = save(tmp_path / "second.safetensors", {**base(), "b.weight": base()["b.weight"] * 1.1})
        if not fails:
            assert diff(first, second, fail_above=limit).totals["max_relative_difference"] == pytest.approx(
                0.1, rel=1e-5
            )
            return
        with pytest.raises(NumericsError, match=rf"b\.weight differs by 0\.1, above --fail-above {limit:g}") as caught:
            diff(first, second, fail_above=limit)
        assert caught.value.exit_code == 5

    @pytest.mark.parametrize("change", ["missing", "extra", "shape"])
    def test_tensors_that_do_not_correspond(self, first: Path, tmp_path: Path, change: str) -> None:
        tensors = base()
        if change == "missing":
            del tensors["n"]
        elif change == "extra":
            tensors["m"] = torch.ones(1)
        else:
            tensors["n"] = torch.ones(2, dtype=torch.int64)
        report = diff(first, save(tmp_path / "second.safetensors", tensors))
        with pytest.raises(NumericsError, match=r"1 tensors do not correspond, first [nm]"):
            judge(report, 1e9)
        judge(report, None)

    def test_a_wider_copy_is_the_same(self, first: Path, tmp_path: Path) -> None:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base().items()}
        report = diff(first, save(tmp_path / "second.safetensors", wide), fail_above=0)
        assert {entry["status"] for entry in report.details} == {"dtype"}


class TestNaming:
    def test_ldm_and_diffusers_are_one_model(self, tmp_path: Path) -> None:
        small_sd15(tmp_path / "ldm.safetensors")
        parts: dict[str, Tensors] = {}
        for name, tensor in read(tmp_path / "ldm.safetensors").items():
            canonical = to_canonical(name, "sd15-ldm")
            component, _, local = canonical.partition(".")
            parts.setdefault(component, {})[local] = tensor.reshape(canonical_shape(canonical, tuple(tensor.shape)))
        for component, tensors in parts.items():
            write_sharded(tmp_path / "sd" / component, tensors, 2 if component == "unet" else 1)
        (tmp_path / "sd" / "model_index.json").write_text("{}")
        for pair in (("ldm.safetensors", "sd"), ("sd", "ldm.safetensors")):
            report = diff(tmp_path / pair[0], tmp_path / pair[1], fail_above=0)
            assert report.totals["equal"] == report.totals["tensors"] == 442
        assert any(tensor.dim() == 4 for name, tensor in read(tmp_path / "ldm.safetensors").items() if "attn_1" in name)

    def test_pickles_and_safetensors(self, first: Path, tmp_path: Path) -> None:
        torch.save({"state_dict": {**base(), "a.weight": base()["a.weight"].T.contiguous().T}}, tmp_path / "x.ckpt")
        assert diff(first, tmp_path / "x.ckpt", fail_above=0).details == []
        assert diff(tmp_path / "x.ckpt", first, fail_above=0).details == []


@pytest.mark.parametrize("size", [1, 7, 8, 13, 16, 4001])
@pytest.mark.parametrize("place", [0, -1])
def test_one_byte_anywhere_is_seen(tmp_path: Path, size: int, place: int) -> None:
    plain = torch.arange(size).to(torch.uint8)
    other = plain.clone()
    other[place] ^= 128
    paths = [save(tmp_path / f"{name}.safetensors", {"x": value}) for name, value in (("a", plain), ("b", other))]
    assert statuses(paths[0], paths[0]) == {}
    assert statuses(*paths) == {"x": "changed"}


def test_reports(first: Path, tmp_path: Path) -> None:
    second = save(tmp_path / "second.safetensors", {**base(), "n": torch.tensor(3)})
    report = diff(first, second).as_dict()
    assert json.loads(json.dumps(report)) == report
    assert (report["inputs"], report["layers"]) == (["first.safetensors", "second.safetensors"], 1)
    with pytest.raises(CheckpointError, match="no such file"):
        diff(first, tmp_path / "missing.safetensors")


@pytest.mark.parametrize("limit", [float("nan"), -1e-9, float("-inf")])
def test_no_limit_is_refused(first: Path, limit: float) -> None:
    with pytest.raises(UsageError, match="is no limit"):
        diff(first, first, fail_above=limit)
    with pytest.raises(UsageError, match="is no limit"):
        judge(diff(first, first), limit)
