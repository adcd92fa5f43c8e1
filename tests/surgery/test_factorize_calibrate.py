"""`--calibrate`: factors fitted to what layers see, on small transformers with real text and on the real MiniLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from minilm import SENTENCES, embeddings, factored, prose

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, TargetError, UsageError
from ortho_cli.surgery.factorize import factorize
from ortho_cli.surgery.factorize_calibrate import calibration
from ortho_cli.surgery.factorize_selection import select_layers

transformers = pytest.importorskip("transformers")
WIDTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*is deprecated")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(prose()[:160]), "utf-8")
    return path


def save(folder: Path, kind: str, lines: list[str]) -> Path:
    """A small model of a kind with random weights, and a tokenizer of the words of some lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(["[UNK]", "[PAD]", *(word for line in lines for word in line.split())])
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(words), n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2Model(config)
    elif kind == "albert":
        config = transformers.AlbertConfig(
            vocab_size=len(words), embedding_size=WIDTH, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=2 * WIDTH, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.AlbertModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * WIDTH, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return save(tmp_path_factory.mktemp(request.param), request.param, text.read_text("utf-8").splitlines())


def inputs_and_outputs(folder: Path, name: str, line: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What one layer of a model reads and gives for a line of text."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen.update(x=inputs[0].detach(), y=output.detach())

    model.get_submodule(name).register_forward_hook(keep)
    words = transformers.AutoTokenizer.from_pretrained(folder)(line, return_tensors="pt")
    with torch.no_grad():
        model(**words)
    return seen["x"], seen["y"]


def test_the_fitted_factors_beat_truncation_where_it_counts(base: Path, text: Path, tmp_path: Path) -> None:
    """Of the same rank, on text they were not fitted to: less error of what the layers give, in every layer and sum."""
    report = factorize(base, tmp_path / "out", rank_scale=0.25, calibrate=text, samples=160)
    fitted = [layer for layer in report.details if layer["rank"]]
    assert len(fitted) >= 8
    total, plain = (sum(layer[key] ** 2 for layer in fitted) for key in ("activation_error", "plain_activation_error"))
    assert total < 0.9 * plain
    note = next(note for note in report.notes if "fitted" in note)
    assert "fitted to 120 samples of prose.txt" in note and "those on 40 others" in note


def test_the_reported_error_is_that_of_the_outputs(base: Path, tmp_path: Path) -> None:
    """Fit to some lines, judge by one: the report's number is the relative error of that line's outputs."""
    lines = ["the cat sat", "a dog ran off", "it rained all day long", "we read many old books"]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines), "utf-8")
    report = factorize(base, tmp_path / "out", rank=8, calibrate=tmp_path / "few.jsonl", form="dense")
    first = next(layer for layer in report.details if layer["rank"])
    x, y = inputs_and_outputs(base, first["name"], lines[-1])
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    layer = model.get_submodule(first["name"])
    bias = layer.bias.detach()
    with torch.no_grad():
        error = float((layer(x) - y).norm() / (y - bias).norm())
    assert error == pytest.approx(first["activation_error"], rel=1e-3)


def test_layers_that_run_several_times_are_fitted_to_all_they_see(tmp_path: Path) -> None:
    """ALBERT's layers are one, applied three times: its Gram matrix is of the inputs of all three."""
    lines = ["the cat sat", "a dog ran off", "it rained all day long", "we read many old books"]
    folder = save(tmp_path / "albert", "albert", lines)
    (tmp_path / "few.txt").write_text("\n".join(lines), "utf-8")
    checkpoint = open_checkpoint(folder)
    name = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    layers = select_layers(checkpoint, [name], []).layers
    found = calibration(checkpoint, layers, tmp_path / "few.txt", 4)
    found.prepare()
    model, tokenizer = (kind.from_pretrained(folder) for kind in (transformers.AutoModel, transformers.AutoTokenizer))
    rows: list[torch.Tensor] = []
    model.eval().get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].detach().flatten(0, -2).double())
    )
    with torch.no_grad():
        for line in lines[:3]:
            model(**tokenizer(line, return_tensors="pt"))
    seen = torch.cat(rows)
    assert len(rows) == 9
    torch.testing.assert_close(found.fit(layers[0]), (seen.T @ seen / len(seen)).float())


@pytest.mark.parametrize("unit", ["params", "flops"])
def test_a_budget_counts_what_it_is_told_to(base: Path, text: Path, tmp_path: Path, unit: str) -> None:
    report = factorize(base, tmp_path / "out", budget=0.5, budget_unit=unit, calibrate=text, samples=60)
    before = sum(layer["parameters_before"] for layer in report.details)
    kept = sum(layer["parameters"] for layer in report.details)
    assert 0.45 * before < kept <= 0.5 * before  # each of these layers is applied to each token: FLOPs are parameters


def test_refusals(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "three.txt").write_text("one\n\ntwo\nthree\n", "utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n', "utf-8")
    embeddings_too = ["wte" if "gpt2" in base.name else "**.word_embeddings"]
    with pytest.raises(UsageError, match="3 samples are too few"):
        factorize(base, out, rank=8, calibrate=tmp_path / "three.txt")
    with pytest.raises(CheckpointError, match=r'expected {"text": ...}') as caught:
        factorize(base, out, rank=8, calibrate=tmp_path / "bad.jsonl")
    assert caught.value.where == f"{tmp_path / 'bad.jsonl'}:2"
    with pytest.raises(CheckpointError, match="cannot be read"):
        factorize(base, out, rank=8, calibrate=tmp_path / "none.txt")
    with pytest.raises(TargetError, match="kind embedding"):
        factorize(base, out, rank=8, calibrate=text, targets=embeddings_too)
    with pytest.raises(UsageError, match="runs the model of a transformers folder"):
        factorize(base / "model.safetensors", out, rank=8, calibrate=text)
    assert not out.exists()


def test_real_weights(minilm_weights: Path, text: Path, tmp_path: Path) -> None:
    """At 0.7 of the linear parameters ranks to a budget, and factors fitted to text, keep more of its sentences."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_weights)
    wanted = embeddings(transformers.AutoModel.from_pretrained(minilm_weights).eval(), tokenizer)

    def cosine(model: Any) -> float:
        return float((embeddings(model, tokenizer) * wanted).sum(1).mean())

    uniform, error, _ = factored(minilm_weights, tmp_path / "uniform", 0.7, "uniform")
    budget, least, _ = factored(minilm_weights, tmp_path / "budget", 0.7, "budget")
    fitted, _, _ = factored(minilm_weights, tmp_path / "fitted", 0.7, "uniform", text)
    assert len(SENTENCES) == len(wanted) == 24
    assert least < 0.75 * error
    assert cosine(uniform) + 0.05 < min(cosine(budget), cosine(fitted))
