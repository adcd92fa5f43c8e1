"""Combined adapters merge to what the parts do together, load in PEFT, and say what was lost."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import metadata, read, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import ortho_cli as ortho
from ortho_cli.cli.app import app
from ortho_cli.errors import CheckpointError, NumericsError, OutputError, TargetError, UsageError
from ortho_cli.linalg import Householder

SHAPES = {"first": (12, 16), "second": (6, 12), "third": (14, 12)}


class Net(nn.Module):
    """Three Linear layers, two of them side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (out, width) in SHAPES.items():
            setattr(self, name, nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x).tanh()
        return torch.cat([self.second(hidden), self.third(hidden)], dim=-1)


def config(kind: str, rank: int, layers: list[str], **more: Any) -> dict[str, Any]:
    lora = {"lora_alpha": 2 * rank, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False}
    own = {"apply_GS": False, "init_weights": True} if kind == "HRA" else lora
    return {"peft_type": kind, "r": rank, "target_modules": layers, "bias": "none", **own, **more}


ALL = tuple(SHAPES)


def adapter(folder: Path, kind: str, rank: int, seed: int, layers: tuple[str, ...] = ALL, **more: Any) -> Path:
    """A PEFT folder with trained-looking values: rotations by moderate angles, or LoRA factors at scale 2."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in layers:
        out, width = SHAPES[layer]
        prefix = f"base_model.model.{layer}"
        if kind == "HRA":
            start = torch.randn(width, rank // 2).repeat_interleave(2, dim=1)
            tensors[f"{prefix}.hra_u"] = start + 0.3 * torch.randn(width, rank)
        else:
            tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, width)
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(out, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(kind, rank, list(layers), **more)))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(Net().state_dict(), path)
    return path


@pytest.fixture
def turns(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"turn{seed}", "HRA", 4, seed) for seed in range(3)]


@pytest.fixture
def sums(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"sum{seed}", "LORA", 2, 10 + seed) for seed in range(3)]


def merged(base: Path, *adapters: Any) -> dict[str, Tensor]:
    out = base.parent / "merged.safetensors"
    ortho.merge(base, adapters, out, exact=True, force=True)
    return {name: tensor for name, tensor in read(out).items() if name.endswith("weight")}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) < tolerance, name


def test_a_product_merges_as_the_parts_one_after_the_other(base: Path, turns: list[Path], tmp_path: Path) -> None:
    report = ortho.combine(turns, tmp_path / "all", mode="compose")
    assert_same(merged(base, tmp_path / "all"), merged(base, *turns))
    detail = report.details[0]
    assert report.layers == 3
    assert len(detail["angles_before"]) == 3
    assert detail["order_effect"] > 0.1
    assert detail["defect"] < 1e-12
    assert detail["rank"] == 12
    backwards = merged(base, *turns[::-1])
    assert relative_error(backwards["first.weight"], merged(base, *turns)["first.weight"]) > 0.01
    ortho.combine([(turns[0], 1), (turns[0], -1)], tmp_path / "undone", mode="compose")
    assert_same(merged(base, tmp_path / "undone"), {k: v for k, v in read(base).items() if k.endswith("weight")})


def test_half_twice_is_the_whole(base: Path, turns: list[Path], tmp_path: Path) -> None:
    ortho.combine([f"{turns[0]}=0.5", f"{turns[0]}=0.5"], tmp_path / "whole", mode="compose")
    assert_same(merged(base, tmp_path / "whole"), merged(base, turns[0]))


@pytest.mark.parametrize("mode", ["mean", "log-mean", "orthomerge", "slerp"])
def test_means_of_equals_are_each_of_them_and_weights_are_shares(
    mode: str, base: Path, turns: list[Path], tmp_path: Path
) -> None:
    ortho.combine([turns[0], turns[0]], tmp_path / "same", mode=mode)
    assert_same(merged(base, tmp_path / "same"), merged(base, turns[0]))
    ortho.combine([(turns[0], 3), (turns[1], 0)], tmp_path / "one", mode=mode)
    assert_same(merged(base, tmp_path / "one"), merged(base, turns[0]))
    for index, scale in enumerate((1, 10)):
        ortho.combine([(turns[0], 0.3 * scale), (turns[1], 0.7 * scale)], tmp_path / f"w{index}", mode=mode)
    assert_same(merged(base, tmp_path / "w0"), merged(base, tmp_path / "w1"))


def test_a_mean_lies_between_and_restored_angles_turn_as_far_as_the_parts(turns: list[Path], tmp_path: Path) -> None:
    plain = ortho.combine(turns[:2], tmp_path / "mean").details[0]
    restored = ortho.combine(turns[:2], tmp_path / "restored", restore_angles=True).details[0]
    assert plain["largest_angle"] < restored["largest_angle"]


def test_a_lower_rank_states_its_error(base: Path, turns: list[Path], tmp_path: Path) -> None:
    whole = ortho.combine(turns[:2], tmp_path / "whole", mode="compose").details
    report = ortho.combine(turns[:2], tmp_path / "less", mode="compose", rank=["4", "third=2"])
    assert [detail["rank"] for detail in report.details] == [4, 4, 2]
    assert all(detail["relative_error"] is None for detail in whole)
    for detail in report.details:
        name = f"base_model.model.{detail['name']}.hra_u"
        vectors = [read(tmp_path / folder)[name].double() for folder in ("whole", "less")]
        eye = torch.eye(vectors[0].shape[0], dtype=torch.float64)
        full, less = (Householder(columns).apply(eye) for columns in vectors)
        assert float((full - less).norm() / (full - eye).norm()) == pytest.approx(detail["relative_error"], rel=1e-4)


def test_grassmann_keeps_gram_schmidt_adapters_reflections(base: Path, tmp_path: Path) -> None:
    parts = [adapter(tmp_path / f"gs{seed}", "HRA", 2, 5, apply_GS=True) for seed in range(2)]
    report = ortho.combine(parts, tmp_path / "mean", mode="grassmann")
    assert_same(merged(base, tmp_path / "mean"), merged(base, parts[0]))
    assert report.details[0]["rank"] == 2
    with pytest.raises(NumericsError, match="half a turn"):
        ortho.combine(parts, tmp_path / "other", mode="log-mean")


def test_sums_add_up_as_their_merges(base: Path, sums: list[Path], tmp_path: Path) -> None:
    original = {name: tensor for name, tensor in read(base).items() if name.endswith("weight")}
    changes = [{name: tensor - original[name] for name, tensor in merged(base, path).items()} for path in sums]
    report = ortho.combine([sums[0], (sums[1], 0.5), (sums[2], -1)], tmp_path / "linear")
    wanted = {name: original[name] + a + 0.5 * changes[1][name] - changes[2][name] for name, a in changes[0].items()}
    assert_same(merged(base, tmp_path / "linear"), wanted)
    assert [detail["rank"] for detail in report.details] == [6, 6, 6]
    low = ortho.combine(sums, tmp_path / "svd", mode="svd").details
    assert [detail["rank"] for detail in low] == [2, 2, 2]
    total = sum(change["first.weight"] for change in changes)
    values = torch.linalg.svdvals(total)
    assert low[0]["relative_error"] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    ortho.combine([sums[0], sums[0]], tmp_path / "ties", mode="ties", density=1)
    assert_same(merged(base, tmp_path / "ties"), merged(base, sums[0]))
    for name in ("dare", "again"):
        ortho.combine(sums, tmp_path / name, mode="dare", seed=3)
    assert read(tmp_path / "dare").keys() == read(tmp_path / "again").keys()
    for name, tensor in read(tmp_path / "dare").items():
        assert torch.equal(tensor, read(tmp_path / "again")[name])


def test_rotations_and_sums_meet_on_their_base(base: Path, turns: list[Path], sums: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rotations and low-rank sums meet") as refused:
        ortho.combine([turns[0], sums[0]], tmp_path / "both")
    assert "--base" in str(refused.value.hint)
    ortho.combine([turns[0], sums[0]], tmp_path / "both", mode="compose", base=base)
    assert_same(merged(base, tmp_path / "both"), merged(base, turns[0], sums[0]))
    ortho.combine([turns[0], (sums[0], -0.5)], tmp_path / "default", base=base)  # a sum has no share in the mean
    assert_same(merged(base, tmp_path / "default"), merged(base, turns[0], (sums[0], -0.5)))
    said = metadata(tmp_path / "both" / "adapter_model.safetensors")
    assert json.loads(said["ortho.method"]) == {"base_bound": True, "combined": 2, "name": "lora"}
    other = base.parent / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in read(base).items()}, other)
    with pytest.raises(CheckpointError, match="only right on the base"):
        ortho.merge(other, tmp_path / "both", tmp_path / "out.safetensors")


def test_a_layer_that_one_adapter_lacks_stays_as_it_is_there(base: Path, turns: list[Path], tmp_path: Path) -> None:
    short = adapter(tmp_path / "short", "HRA", 2, 7, layers=("second",))
    report = ortho.combine([turns[0], short], tmp_path / "all", mode="compose")
    assert_same(merged(base, tmp_path / "all"), merged(base, turns[0], short))
    assert any("2 layers are not in every adapter" in note for note in report.notes)
    report = ortho.combine([turns[0], short], tmp_path / "mean")
    assert report.details[0]["largest_angle"] == pytest.approx(report.details[0]["angles_before"][0] / 2, abs=1e-5)


def test_adapters_bound_to_their_base_combine_on_one_base_only(
    base: Path, turns: list[Path], sums: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in read(base).items()}, other)
    for name, where in (("one", base), ("two", base), ("three", other)):
        ortho.convert(turns[0], tmp_path / name, "peft-lora", base=where)
    for second in (tmp_path / "three", sums[0]):
        with pytest.raises(CheckpointError, match="do not all name that base"):
            ortho.combine([tmp_path / "one", second], tmp_path / "out")
    ortho.combine([(tmp_path / "one", 0.5), (tmp_path / "two", 0.5)], tmp_path / "out")
    assert_same(merged(base, tmp_path / "out"), merged(base, turns[0]))
    with pytest.raises(CheckpointError, match="only right on the base"):
        ortho.merge(other, tmp_path / "out", tmp_path / "merged.safetensors", force=False)


def test_reflections_of_the_output_side_combine_on_their_base(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = [tmp_path / f"output{index}.safetensors" for index in range(2)]
    for path in parts:
        start = torch.randn(12, 1).repeat_interleave(2, dim=1)
        vectors = {"first.hra_u": start + 0.3 * torch.randn(12, 2)}
        save_file(vectors, path, {"ortho.method": json.dumps({"name": "hra", "side": "output", "eps": 0.0})})
    with pytest.raises(UsageError, match="no output side"):
        ortho.combine(parts, tmp_path / "out", mode="compose")
    ortho.combine(parts, tmp_path / "out", mode="compose", base=base)
    # On the output side W' = D^T W, so that the product of the rotations is undone in the order of the merges.
    assert_same(merged(base, tmp_path / "out"), merged(base, *parts))


def test_convolutions_combine_and_untold_shapes_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base.safetensors"
    save_file({"conv.weight": torch.randn(6, 4, 3, 3)}, base)
    parts = [tmp_path / f"locon{index}" for index in range(2)]
    for folder in parts:
        folder.mkdir()
        tensors = {"lora_A": torch.randn(2, 4, 3, 3), "lora_B": torch.randn(6, 2, 1, 1)}
        named = {f"base_model.model.conv.{name}.weight": tensor for name, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config("LORA", 2, ["conv"])))
    lohas = tmp_path / "loha"
    lohas.mkdir()
    factors = {f"w{i}_{x}": torch.randn(*((6, 2) if x == "a" else (2, 36))) for i in (1, 2) for x in "ab"}
    named = {f"base_model.model.conv.hada_{name}": tensor for name, tensor in factors.items()}
    save_file(named, lohas / "adapter_model.safetensors")
    settings = {"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["conv"], "use_effective_conv2d": False}
    (lohas / "adapter_config.json").write_text(json.dumps(settings))
    ortho.combine(parts, tmp_path / "both")
    assert read(tmp_path / "both")["base_model.model.conv.lora_A.weight"].shape == (4, 4, 3, 3)
    assert_same(merged(base, tmp_path / "both"), merged(base, *parts), 1e-5)
    with pytest.raises(UsageError, match="does not say whether it sits on a Linear or a convolution"):
        ortho.combine([lohas, lohas], tmp_path / "out")
    ortho.combine([lohas, parts[0]], tmp_path / "mixed")
    assert_same(merged(base, tmp_path / "mixed"), merged(base, lohas, parts[0]), 1e-5)


def test_untrained_adapters_combine_to_nothing(base: Path, sums: list[Path], tmp_path: Path) -> None:
    fresh = adapter(tmp_path / "fresh", "LORA", 2, 0)
    for role in ("lora_A", "lora_B"):
        tensors = {name: tensor * (role not in name) for name, tensor in read(fresh).items()}
        save_file(tensors, fresh / "adapter_model.safetensors")
        for mode in ("linear", "svd", "ties", "dare"):
            ortho.combine([fresh, fresh], tmp_path / "none", mode=mode, force=True)
            assert_same(merged(base, tmp_path / "none"), {k: v for k, v in read(base).items() if k.endswith("weight")})


def test_ties_sees_the_adapter_not_how_it_is_stored(base: Path, sums: list[Path], tmp_path: Path) -> None:
    ortho.combine(sums, tmp_path / "plain", mode="ties")
    tensors = {name: tensor * (100 if "lora_B" in name else 0.01) for name, tensor in read(sums[0]).items()}
    save_file(tensors, sums[0] / "adapter_model.safetensors")
    ortho.combine(sums, tmp_path / "scaled", mode="ties")
    assert_same(merged(base, tmp_path / "scaled"), merged(base, tmp_path / "plain"), 1e-5)


def test_parts_without_weight_have_no_say(base: Path, turns: list[Path], tmp_path: Path) -> None:
    mirror = adapter(tmp_path / "mirror", "HRA", 2, 5, apply_GS=True)
    for mode in ("mean", "log-mean", "orthomerge", "grassmann"):
        ortho.combine([turns[0], (mirror, 0)], tmp_path / mode, mode=mode)
        assert_same(merged(base, tmp_path / mode), merged(base, turns[0]))


def test_peft_loads_the_result_and_it_acts_as_computed(
    base: Path, turns: list[Path], sums: list[Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    x = torch.randn(5, 16)
    for name, parts in (("rotation", turns), ("sum", sums)):
        ortho.combine(parts, tmp_path / name)
        weights = merged(base, tmp_path / name)
        wanted = Net()
        wanted.load_state_dict(weights, strict=False)
        loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / name)
        assert relative_error(loaded(x), wanted(x)) < 1e-5
        assert relative_error(loaded(x), Net()(x)) > 1e-2


def test_what_cannot_be_combined_is_refused_with_the_reason(
    base: Path, turns: list[Path], sums: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    short = adapter(tmp_path / "short", "HRA", 2, 0, layers=("second",))
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (turns[:1], {}, UsageError, "1 adapter to combine"),
        (turns, {"mode": "slerp"}, UsageError, "between two adapters, found 3"),
        (turns, {"mode": "ties"}, UsageError, "ties is for low-rank sums"),
        (sums, {"mode": "mean"}, UsageError, "mean is for rotations"),
        (turns, {"mode": "average"}, UsageError, "average"),
        ([turns[0], (turns[1], -1)], {}, UsageError, "weights of at least 0, found -1"),
        (sums, {"density": 0, "mode": "ties"}, UsageError, "density 0 is no share"),
        (sums, {"density": 0.1}, UsageError, "density 0.1 is about --mode ties and dare"),
        (sums, {"seed": 1, "mode": "ties"}, UsageError, "seed 1 is about --mode dare"),
        (turns, {"mode": ["mean", "compose"]}, UsageError, "mean and --mode compose are for the same"),
        (turns, {"mode": "compose", "restore_angles": True}, UsageError, "about means of rotations"),
        (turns, {"rank": 1}, UsageError, "a rotation takes two reflections"),
        (turns, {"rank": 7}, UsageError, "a rotation takes two reflections"),
        ([(turns[0], 0), (turns[1], 0)], {}, UsageError, "every weight is 0"),
        ([turns[0], f"{turns[1]}=0,7"], {}, UsageError, "strength '0,7' of .* is not a number"),
        (sums, {"restore_angles": True}, UsageError, "about means of rotations"),
        (sums, {"rank": 0}, UsageError, "no such rank"),
        (turns, {"rank": ["fourth=2"]}, TargetError, "fourth"),
        ([turns[0], (turns[1], float("nan"))], {}, UsageError, "nan"),
        ([turns[0], short], {"mode": "grassmann"}, TargetError, "leaves a layer as it is"),
    ]  # fmt: skip
    for parts, options, error, reason in refusals:
        with pytest.raises(error, match=reason):
            ortho.combine(parts, out, **options)
        assert not out.exists()
    only = [adapter(tmp_path / name, "HRA", 2, 0, layers=(name,)) for name in ("first", "second")]
    with pytest.raises(TargetError, match="share no layer: first has first, second has second"):
        ortho.combine(only, out)
    odd = adapter(tmp_path / "odd", "HRA", 2, 0)
    vectors = {name: tensor[:, :1].clone() for name, tensor in read(odd).items()}
    save_file(vectors, odd / "adapter_model.safetensors")
    (odd / "adapter_config.json").write_text(json.dumps(config("HRA", 1, list(SHAPES))))
    with pytest.raises(TargetError, match="odd number of reflections"):
        ortho.combine([odd, turns[0]], out)
    ortho.combine([(odd, 0), turns[0]], tmp_path / "uncounted", mode="compose")
    assert_same(merged(base, tmp_path / "uncounted"), merged(base, turns[0]))
    dora = adapter(tmp_path / "dora", "LORA", 2, 0, use_dora=True)
    magnitudes = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(SHAPES[name][0]) for name in SHAPES}
    save_file(read(dora) | magnitudes, dora / "adapter_model.safetensors")
    with pytest.raises(TargetError, match="DoRA"):
        ortho.combine([dora, sums[0]], out)
    wide = [adapter(tmp_path / f"large{seed}", "HRA", 8, seed) for seed in range(2)]
    with pytest.raises(TargetError, match="16 reflections at first do not fit second, which is 12 wide") as refused:
        ortho.combine(wide, out, mode="compose")
    assert refused.value.hint == "use --rank 12 or less"
    ortho.combine(turns, out)
    with pytest.raises(OutputError, match="exists"):
        ortho.combine(turns, out)
    with pytest.raises(UsageError, match="PEFT folder"):
        ortho.combine(turns, tmp_path / "out.safetensors", force=True)


def test_the_command_its_recipe_and_a_dry_run(turns: list[Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    a, b = f"{turns[0]}=0.4", f"{turns[1]}=0.6"
    dry = run(app, ["combine", a, b, "-o", str(tmp_path / "out"), "--dry-run", "--json"])
    assert json.loads(dry.stdout)["totals"]["adapters"] == ["turn0=0.4", "turn1=0.6"]
    assert not (tmp_path / "out").exists()
    recipe = tmp_path / "combine.yaml"
    made = run(app, ["combine", a, b, "-o", str(tmp_path / "out"), "--rank", "4", "--save-recipe", str(recipe)])
    assert made.exit_code == 0, made.output
    assert "order effect" in made.stdout
    again = run(app, ["combine", "--recipe", str(recipe), "-o", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    for name, tensor in read(tmp_path / "out").items():
        assert torch.equal(tensor, read(tmp_path / "again")[name])
    assert run(app, ["combine", a]).exit_code == 2
