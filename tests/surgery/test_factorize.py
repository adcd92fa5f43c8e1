"""factorize against the naive arithmetic: `torch.linalg.svd` of each layer's matrix, in float64, form by form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_folders import Tensors, metadata, read, relative_error, write_sharded
from safetensors.torch import save_file
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.checkpoints.factored import CONFIG_NAME, factored_layers
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import NumericsError, OutputError, TargetError, UsageError
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.factorize import factorize
from ortho_cli.surgery.inspect import inspect
from ortho_cli.surgery.merge import merge

LAYERS = ("net.0", "net.1", "net.2")


def decaying(rows: int, cols: int, seed: int, power: float = 1.0) -> Tensor:
    """A matrix whose singular values fall as those of trained layers do."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(cols, rank, generator=generator)).Q
    return left * torch.arange(1.0, rank + 1).pow(-power) @ right.T


def tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    """A tall and a wide Linear, a convolution, and what nobody factors."""
    generator = torch.Generator().manual_seed(5)
    conv = decaying(64 * 3, 80 * 3, 2).reshape(64, 3, 80, 3).transpose(1, 2).contiguous()
    found = {"net.0.weight": decaying(160, 96, 0), "net.1.weight": decaying(72, 200, 1), "net.2.weight": conv}
    rest = {
        "net.0.bias": (160,), "net.2.bias": (64,), "net.norm.weight": (96,), "net.small.weight": (8, 8),
        "lm_head.weight": (100, 96),
    }  # fmt: skip
    found |= {name: torch.randn(shape, generator=generator) for name, shape in rest.items()}
    return {**{name: value.to(dtype) for name, value in found.items()}, "steps": torch.tensor(7)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "base.safetensors", {"format": "pt", "theirs": "kept"})
    return tmp_path / "base.safetensors"


def matrix(weight: Tensor) -> Tensor:
    """The matrix of a Linear or a convolution, rows (out, vertical tap), columns (in, horizontal tap)."""
    return weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) if weight.dim() == 4 else weight


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, in float64 and the weight's own shape."""
    u, s, vt = torch.linalg.svd(matrix(weight).double(), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    if weight.dim() == 2:
        return best
    out, inputs, height, width = weight.shape
    return best.reshape(out, height, inputs, width).transpose(1, 2)


class TestFactors:
    def test_each_layer_gets_the_best_factors(self, base: Path, tmp_path: Path) -> None:
        report = factorize(base, tmp_path / "out.safetensors", rank=12, method="svd")
        found = read(tmp_path / "out.safetensors")
        for detail in report.details:
            name, weight = detail["name"], tensors()[f"{detail['name']}.weight"]
            u, vt = found[f"{name}.U"], found[f"{name}.VT"]
            assert u.shape == (matrix(weight).shape[0], 12) and vt.shape == (12, matrix(weight).shape[1])
            assert relative_error(u @ vt, matrix(truncated(weight, 12))) < 1e-5
            assert torch.allclose(u.T @ u, vt @ vt.T, atol=1e-6), "balanced"
            wanted = relative_error(truncated(weight, 12), weight)
            assert detail["relative_error"] == pytest.approx(wanted, rel=1e-4)
            assert detail["energy"] == pytest.approx(1 - wanted**2, rel=1e-4)
            values = torch.linalg.svdvals(matrix(weight).double())
            assert detail["condition"] == pytest.approx(float(values[0] / values[11]), rel=1e-3)
            assert detail["non_orthogonality"] < 1e-5
        assert [detail["name"] for detail in report.details] == list(LAYERS)

    def test_the_rest_is_copied(self, base: Path, tmp_path: Path) -> None:
        factorize(base, tmp_path / "out.safetensors", rank=12)
        found, own = read(tmp_path / "out.safetensors"), tensors()
        untouched = own.keys() - {f"{layer}.weight" for layer in LAYERS}
        assert found.keys() == untouched | {f"{layer}.{part}" for layer in LAYERS for part in ("U", "VT")}
        assert metadata(tmp_path / "out.safetensors")["theirs"] == "kept"
        assert all(torch.equal(found[name], own[name]) for name in ("net.0.bias", "steps", "lm_head.weight"))

    def test_parameters_and_totals(self, base: Path, tmp_path: Path) -> None:
        report = factorize(base, tmp_path / "out.safetensors", rank=12)
        written = sum(value.numel() for value in read(tmp_path / "out.safetensors").values())
        assert report.parameters == report.totals["parameters_after"] == written
        norms = [float(tensors()[f"{layer}.weight"].norm()) for layer in LAYERS]
        lost = [detail["relative_error"] * norm for detail, norm in zip(report.details, norms, strict=True)]
        whole = sum(norm**2 for norm in norms)
        assert report.totals["relative_error"] == pytest.approx((sum(x**2 for x in lost) / whole) ** 0.5, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_the_type_stays_and_rounding_is_in_the_error(self, tmp_path: Path, dtype: torch.dtype) -> None:
        save_file(tensors(dtype), tmp_path / "base.safetensors")
        report = factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=30)
        found = read(tmp_path / "out.safetensors")
        for detail in report.details:
            weight = tensors(dtype)[f"{detail['name']}.weight"]
            u, vt = found[f"{detail['name']}.U"], found[f"{detail['name']}.VT"]
            assert u.dtype == vt.dtype == dtype
            assert detail["relative_error"] == pytest.approx(
                relative_error(u.double() @ vt.double(), matrix(weight)), rel=1e-3
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rule", ["max_error", "energy"])
    def test_a_bound_that_rounding_breaks_is_told(self, tmp_path: Path, rule: str, dtype: torch.dtype) -> None:
        """Ranks come from exact spectra; factors in bfloat16 add an error of their own, in float32 none that counts."""
        weight = decaying(160, 96, 0, power=3.0).to(dtype)
        save_file({"net.0.weight": weight}, tmp_path / "base.safetensors")
        error = float((weight.double() - truncated(weight, 6)).norm() / weight.double().norm()) * 1.001
        limit = error if rule == "max_error" else 1 - error**2
        report = factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", **{rule: limit})
        (detail,) = report.details
        assert detail["rank"] == 6
        notes = [note for note in report.notes if "rounded" in note]
        if dtype == torch.float32:
            assert detail["relative_error"] <= error
            assert notes == []
        else:
            assert detail["relative_error"] > 1.02 * error
            assert notes[0].startswith(f"1 of 1 layers miss {rule.replace('_', '-')} {limit} as they are rounded")
            assert notes[0].endswith("lower --max-error" if rule == "max_error" else "higher --energy")

    def test_workers_change_nothing(self, base: Path, tmp_path: Path) -> None:
        written = []
        for workers in (1, 2, 5):
            out = tmp_path / f"{workers}" / "out.safetensors"
            factorize(base, out, budget=0.4, workers=workers)
            written.append(out.read_bytes())
        assert written[0] == written[1] == written[2]

    def test_threads_are_given_back(self, base: Path, tmp_path: Path) -> None:
        before = torch.get_num_threads()
        factorize(base, tmp_path / "out.safetensors", rank=4)
        assert torch.get_num_threads() == before


class TestLayouts:
    def test_shards_keep_their_place(self, tmp_path: Path) -> None:
        folder = write_sharded(tmp_path / "base", tensors(), 3)
        (folder / "config.json").write_text("{}")
        factorize(folder, tmp_path / "out", rank=12)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(read(tmp_path / "out"))
        table = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
        assert table["layers"]["net.2"] == {"kind": "conv", "shape": [64, 80, 3, 3], "rank": 12}
        assert (tmp_path / "out" / "config.json").read_text() == "{}"

    def test_shards_give_the_factors_of_one_file(self, base: Path, tmp_path: Path) -> None:
        factorize(base, tmp_path / "one.safetensors", rank=12)
        factorize(write_sharded(tmp_path / "base", tensors(), 3), tmp_path / "many", rank=12)
        one, many = read(tmp_path / "one.safetensors"), read(tmp_path / "many")
        assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)

    def test_a_pickle(self, base: Path, tmp_path: Path) -> None:
        torch.save({"state_dict": tensors()}, tmp_path / "base.ckpt")
        factorize(base, tmp_path / "one.safetensors", rank=12)
        factorize(tmp_path / "base.ckpt", tmp_path / "other.safetensors", rank=12)
        one, other = read(tmp_path / "one.safetensors"), read(tmp_path / "other.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def test_a_pipeline_has_a_table_for_each_component(self, tmp_path: Path) -> None:
        for part in ("first", "second"):
            write_sharded(tmp_path / "base" / part, {f"{part}.weight": decaying(96, 96, 3)}, 1)
        (tmp_path / "base" / "model_index.json").write_text('{"first": ["a", "B"], "second": ["a", "B"]}')
        factorize(tmp_path / "base", tmp_path / "out", rank=8, targets=["**"])
        for part in ("first", "second"):
            assert set(factored_layers(open_checkpoint(tmp_path / "out" / part))) == {part}
        assert set(factored_layers(open_checkpoint(tmp_path / "out"))) == {"first.first", "second.second"}


class TestDense:
    def test_truncated_weights(self, base: Path, tmp_path: Path) -> None:
        report = factorize(base, tmp_path / "out.safetensors", rank=12, form="dense", method="svd")
        found, own = read(tmp_path / "out.safetensors"), tensors()
        assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in own.items()}
        for detail in report.details:
            weight = own[f"{detail['name']}.weight"]
            assert relative_error(found[f"{detail['name']}.weight"], truncated(weight, 12)) < 1e-5

    @pytest.mark.parametrize("single", [True, False])
    def test_convert_gives_the_same(self, base: Path, tmp_path: Path, single: bool) -> None:
        factors = tmp_path / ("factors.safetensors" if single else "factors")
        factorize(base, factors, rank=12)
        factorize(base, tmp_path / "dense.safetensors", rank=12, form="dense")
        report = convert(factors, tmp_path / "back.safetensors", "dense")
        back, dense = read(tmp_path / "back.safetensors"), read(tmp_path / "dense.safetensors")
        assert back.keys() == dense.keys() and report.layers == 3
        assert all(relative_error(back[name], dense[name]) < 1e-6 for name in dense if dense[name].dim() > 1)
        assert "ortho.method" not in metadata(tmp_path / "back.safetensors")

    def test_convert_leaves_no_table_behind(self, base: Path, tmp_path: Path) -> None:
        factorize(base, tmp_path / "factors", rank=12)
        convert(tmp_path / "factors", tmp_path / "dense", "dense")
        assert not (tmp_path / "dense" / CONFIG_NAME).exists()
        with pytest.raises(ortho.CheckpointError, match="holds no factors"):
            convert(tmp_path / "dense", tmp_path / "again", "dense")

    def test_a_folder_becomes_one_file_with_its_table(self, base: Path, tmp_path: Path) -> None:
        factorize(base, tmp_path / "factors", rank=12)
        convert(tmp_path / "factors", tmp_path / "one.safetensors", "safetensors")
        assert set(factored_layers(open_checkpoint(tmp_path / "one.safetensors"))) == set(LAYERS)


class TestResidual:
    @pytest.fixture
    def pair(self, base: Path, tmp_path: Path) -> Path:
        factorize(base, tmp_path / "pair", rank=12, form="lora-residual", method="svd")
        return tmp_path / "pair"

    def test_together_they_are_the_checkpoint(self, pair: Path, tmp_path: Path) -> None:
        merge(pair / "base", pair / "adapter", tmp_path / "merged")
        merged, own = read(tmp_path / "merged"), tensors()
        assert merged.keys() == own.keys()
        assert all(relative_error(merged[name], own[name]) < 1e-6 for name in own if own[name].dim() > 1)

    def test_the_adapter_holds_the_leading_components(self, pair: Path) -> None:
        own = tensors()["net.1.weight"]
        assert relative_error(read(pair / "base")["net.1.weight"], own - truncated(own, 12)) < 1e-5
        adapter = read(pair / "adapter")
        assert adapter["base_model.model.net.2.lora_A.weight"].shape == (12, 80, 3, 3)
        assert adapter["base_model.model.net.2.lora_B.weight"].shape == (64, 12, 1, 1)

    def test_it_belongs_to_its_residual_alone(self, pair: Path, base: Path, tmp_path: Path) -> None:
        fits = inspect(pair / "adapter", base=pair / "base").totals["adapter"]
        assert fits["base_bound"] and fits["fits_base"]["fingerprint"] is True
        with pytest.raises(ortho.CheckpointError, match="only right on the base it was made for"):
            merge(base, pair / "adapter", tmp_path / "wrong.safetensors")

    def test_a_rank_may_save_nothing(self, base: Path, tmp_path: Path) -> None:
        report = factorize(base, tmp_path / "pair", rank=70, form="lora-residual")
        assert [detail["rank"] for detail in report.details] == [70, 70, None]
        assert report.details[2]["reason"] == "rank 70 is above the full rank of 64x720"

    def test_force_replaces_the_pair(self, pair: Path, base: Path) -> None:
        before = (pair / "adapter" / "adapter_model.safetensors").read_bytes()
        factorize(base, pair, rank=12, form="lora-residual", method="svd", force=True)
        assert (pair / "adapter" / "adapter_model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("rule", ["target_ratio", "budget"])
    def test_there_is_nothing_to_save(self, base: Path, tmp_path: Path, rule: str) -> None:
        with pytest.raises(UsageError, match="keeps the whole base"):
            factorize(base, tmp_path / "pair", form="lora-residual", **{rule: 0.5})  # type: ignore[arg-type]


class TestRefusals:
    def test_nothing_is_factored_twice(self, base: Path, tmp_path: Path) -> None:
        factorize(base, tmp_path / "out.safetensors", rank=12)
        with pytest.raises(TargetError, match="holds factors already") as caught:
            factorize(tmp_path / "out.safetensors", tmp_path / "again.safetensors", rank=4)
        assert "--to dense" in str(caught.value.hint)
        with pytest.raises(TargetError, match="holds factors in place of weights"):
            merge(tmp_path / "out.safetensors", [], tmp_path / "merged.safetensors")

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        broken = tensors()
        broken["net.1.weight"][3, 4] = float("nan")
        save_file(broken, tmp_path / "base.safetensors")
        for rule in ({"rank": 8}, {"energy": 0.9}):
            with pytest.raises(NumericsError, match=r"layer net\.1: the weight holds values that are not finite"):
                factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", **rule)  # type: ignore[arg-type]
        assert not (tmp_path / "out.safetensors").exists()

    def test_an_existing_output_is_refused_before_the_spectra(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "out.safetensors").write_text("mine")
        with pytest.raises(OutputError, match="exists"):
            factorize(base, tmp_path / "out.safetensors", energy=0.9)
        assert (tmp_path / "out.safetensors").read_text() == "mine"

    def test_a_dry_run_writes_nothing_and_knows_the_ranks(self, base: Path, tmp_path: Path) -> None:
        for rule in ({"rank": 12}, {"energy": 0.9}):
            report = factorize(base, tmp_path / "out.safetensors", dry_run=True, **rule)  # type: ignore[arg-type]
            done = factorize(base, tmp_path / f"{len(rule)}{report.totals['rule']}.safetensors", **rule)  # type: ignore[arg-type]
            assert [x["rank"] for x in report.details] == [x["rank"] for x in done.details]
            assert report.totals["bytes_out"] == done.outputs[0]["bytes"]
        assert not (tmp_path / "out.safetensors").exists()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 96)
        self.up = nn.Linear(96, 160)
        self.conv = nn.Conv1d(160, 72, 3, padding=1)
        self.norm = nn.LayerNorm(72)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.up(self.embed(tokens)).tanh()
        out: Tensor = self.norm(self.conv(hidden.mT).mT)
        return out


class TestLoading:
    @pytest.fixture
    def model(self) -> Small:
        torch.manual_seed(0)
        return Small()

    @pytest.mark.parametrize("name", ["factors.safetensors", "factors"])
    def test_factors_load_without_being_told_anything(self, model: Small, tmp_path: Path, name: str) -> None:
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        for form, out in (("factors", name), ("dense", "dense.safetensors")):
            factorize(tmp_path / "base.safetensors", tmp_path / out, rank=20, targets=["**"], form=form)
        tokens = torch.randint(0, 100, (2, 9))
        loaded = ortho.load_factorized(Small(), tmp_path / name)
        dense = Small()
        dense.load_state_dict(read(tmp_path / "dense.safetensors"))
        assert type(loaded.embed).__name__ == "FactorizedEmbedding" and loaded.up.rank == 20
        assert torch.allclose(loaded(tokens), dense(tokens), atol=1e-5)
        assert not torch.allclose(loaded(tokens), model(tokens), atol=1e-3), "truncation shows"

    def test_a_wrapper_in_the_names(self, model: Small, tmp_path: Path) -> None:
        save_file({f"body.{name}": value for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
        factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=20, targets=["up"])
        assert ortho.load_factorized(Small(), tmp_path / "out.safetensors").up.rank == 20

    def test_what_does_not_fit(self, model: Small, tmp_path: Path) -> None:
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=20, targets=["up"])
        with pytest.raises(ortho.CheckpointError, match="holds no factors"):
            ortho.load_factorized(Small(), tmp_path / "base.safetensors")
        with pytest.raises(TargetError, match=r"layer up of out\.safetensors is not in the Linear"):
            ortho.load_factorized(nn.Linear(2, 2), tmp_path / "out.safetensors")
        larger = Small()
        larger.head = nn.Linear(72, 3)
        with pytest.raises(ortho.CheckpointError, match=r"lacks 2 parameters of the Small, first head\.weight"):
            ortho.load_factorized(larger, tmp_path / "out.safetensors")
        lesser = Small()
        del lesser.norm
        with pytest.raises(ortho.CheckpointError, match=r"2 tensors of out\.safetensors have no place"):
            ortho.load_factorized(lesser, tmp_path / "out.safetensors")
        other = Small()
        other.up = nn.Linear(160, 96)
        with pytest.raises(TargetError, match=r"layer up is a linear \(96, 160\)"):
            ortho.load_factorized(other, tmp_path / "out.safetensors")

    @pytest.mark.parametrize(
        "layer",
        [nn.Conv2d(96, 64, 3, stride=2, padding=1), nn.Conv2d(96, 96, 3, groups=2), nn.Conv3d(64, 64, (3, 1, 3))],
        ids=["strided", "grouped", "3-d"],
    )
    def test_convolutions(self, layer: nn.Module, tmp_path: Path) -> None:
        model = nn.Sequential(layer)
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=17, targets=["0"])
        factorize(tmp_path / "base.safetensors", tmp_path / "dense.safetensors", rank=17, targets=["0"], form="dense")
        loaded = ortho.load_factorized(nn.Sequential(layer), tmp_path / "out.safetensors")
        model.load_state_dict(read(tmp_path / "dense.safetensors"))
        inputs = torch.randn(2, layer.in_channels, *[7] * (layer.weight.dim() - 2))
        dense = nn.Sequential(layer)
        dense[0].load_state_dict({key[2:]: value for key, value in read(tmp_path / "dense.safetensors").items()})
        assert torch.allclose(loaded(inputs), dense(inputs), atol=1e-5)

    def test_a_transposed_convolution_is_told_apart(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.ConvTranspose2d(64, 96, 3))
        save_file(model.state_dict(), tmp_path / "base.safetensors")
        factorize(tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=17)
        with pytest.raises(TargetError, match="is a transposed") as caught:
            ortho.load_factorized(model, tmp_path / "out.safetensors")
        assert "--to dense" in str(caught.value.hint)
        convert(tmp_path / "out.safetensors", tmp_path / "dense.safetensors", "dense")
        model.load_state_dict(read(tmp_path / "dense.safetensors"))


def test_inspect_names_the_factors(base: Path, tmp_path: Path) -> None:
    factorize(base, tmp_path / "out.safetensors", rank=["12", "net.1=6"])
    found = inspect(tmp_path / "out.safetensors", layers=True)
    dense = sum(tensors()[f"{layer}.weight"].numel() for layer in LAYERS)
    assert found.totals["factors"]["ranks"] == [6, 12] and found.totals["factors"]["dense_parameters"] == dense
    assert {item["name"]: item.get("rank") for item in found.details}["net.1"] == 6
