"""transformers' text classifiers: loaded whole or refused, with a head for the task that trains beside adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_bases import FAMILIES, config_of, save_base

from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.models import hf_known
from ortho_cli.models.hf_base import on_meta
from ortho_cli.models.hf_text import HFTextClassifier, build
from ortho_cli.recipe.models_text import HFText

transformers = pytest.importorskip("transformers", reason="the model is transformers' own")


def section(base: Path | str) -> HFText:
    return HFText.model_validate({"name": "hf-text", "base": str(base)})


def made(base: Path | str, outputs: int = 3, length: int = 12, *, frozen: bool = False) -> HFTextClassifier:
    model = build(section(base), outputs, length, frozen_head=frozen)
    assert isinstance(model, HFTextClassifier)
    return model


def words(vocabulary: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (3, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


HEADS = {
    "bert": ("classifier",), "roberta": ("classifier",), "deberta-v2": ("pooler", "classifier"),
    "t5": ("classification_head",),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_its_body_and_a_new_head(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind)
    model = made(base).eval()
    assert model.task_head == HEADS.get(kind, ("score",))
    assert all(note.startswith("new head: ") for note in model.notes)
    body = transformers.AutoModel.from_pretrained(base)
    own = dict(model.model.base_model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in body.named_parameters() if "pooler" not in name)
    ids = words()
    if kind == "t5":
        ids["input_ids"][:, -1] = 1  # T5 reads at its end mark
    assert model(**ids).shape == (3, 3)


def test_the_head_that_is_there_is_kept(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", loader="AutoModelForSequenceClassification", num_labels=3)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()
    model = made(base)
    assert (model.notes, model.task_head) == ([], ("classifier",))
    torch.testing.assert_close(model.eval()(**words()), peer(**words()).logits)


def test_a_body_without_its_pooler_gets_one_that_trains(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", loader="AutoModelForMaskedLM")
    assert made(base).task_head == ("classifier", "bert.pooler.dense")


def test_a_frozen_head_stays(tmp_path: Path) -> None:
    model = made(save_base(tmp_path / "base"), frozen=True)
    still = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert still == ["model.classifier.weight", "model.classifier.bias"]
    assert model.task_head == ()


def test_a_body_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks more than its head: 1 tensors"):
        made(base)


@pytest.mark.parametrize(("kind", "positions"), [("bert", 40), ("roberta", 40), ("gpt2", 40)])
def test_samples_longer_than_the_positions_are_refused(kind: str, positions: int, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind)
    longest = made(base, length=positions)
    ids = torch.full((1, positions), 7)
    assert longest.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (1, 3)
    with pytest.raises(RecipeError, match=f"max_length is {positions + 1}, .* has {positions} positions"):
        made(base, length=positions + 1)


def test_a_picture_model_is_no_text_classifier(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not open as a text classifier"):
        made(tmp_path)


def test_a_base_that_cannot_be_reached_has_its_known_sizes_on_paper_only() -> None:
    (name,) = [name for name in hf_known.KNOWN if "deberta" in name]
    with pytest.raises(CheckpointError, match="does not open"):
        made(name)
    with torch.device("meta"):
        assert on_meta()
        model = made(name, outputs=2, length=64)
    assert sum(parameter.numel() for parameter in model.parameters()) == 184_423_682
    assert model.notes == [f"{name} is not here; its sizes are those that are known of it"]


def test_known_sizes_of_minilm_are_those_of_its_weights(minilm_weights: Path) -> None:
    known = hf_known.KNOWN["sentence-transformers/all-MiniLM-L6-v2"]
    found = transformers.AutoConfig.from_pretrained(minilm_weights).to_dict()
    assert {key: found[key] for key in known} == known


def test_a_tiny_configuration_says_what_it_says() -> None:
    assert config_of("bert").hidden_dropout_prob == 0.0
    assert config_of("bert", hidden_dropout_prob=0.3).hidden_dropout_prob == 0.3
