"""`run.export` of language models: what transformers and PEFT load says what the run's own model says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from text_bases import save_base
from training_runs import write

from ortho_cli.recipe.train import load_train
from ortho_cli.training.evaluate import find_checkpoint, restore_for_judging
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("datasets", reason="tables are read by it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks for it
WORDS = torch.tensor([[2, 5, 15, 18, 17, 3], [2, 6, 15, 19, 16, 3]])  # tokens of two sentences
SHORT = {
    "optimizer": "{name: adamw, lr: 5e-2}", "schedule": "{name: constant}", "train": "{steps: 3, threads: 1}",
    "run": "{dir: FOLDER, export: [peft, merged]}",
}  # fmt: skip


def inner(run: Path) -> Any:
    """The transformers model in a run's own, as it was trained."""
    session = open_session(load_train(run / "recipe.yaml"), judging=True)
    restore_for_judging(session, find_checkpoint(run, "last"))
    model: Any = session.model.get_submodule(getattr(session.model, "wraps", ""))
    return model.eval()


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=WORDS).logits
    return found


@pytest.mark.parametrize(
    "methods",
    [
        "[{name: hra, rank: 2, targets: [bert-all]}]",
        "[{name: peft, config: {peft_type: LORA, r: 2, target_modules: [query, value]}}]",
    ],
    ids=["hra", "peft"],
)
def test_a_classifier(tmp_path: Path, methods: str) -> None:
    base = save_base(tmp_path / "base")
    rows = [f"the film is {word},{label}" for word, label in (("good", "yes"), ("bad", "no"), ("fine", "yes")) * 8]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    sections = {
        "task": "{name: glue, max_length: 12}",
        "model": f"{{name: hf-text, base: {base}}}",
        "data": f"{{name: text-table, path: {tmp_path / 'films.csv'}, batch: 4}}",
        "methods": methods,
    }
    outcome = train(load_train(write(tmp_path, "run", **sections, **SHORT)))
    assert [Path(path).name for path in outcome.exports][1:] == ["peft-adapter", "merged"]
    export, wanted = tmp_path / "run" / "export", said(inner(tmp_path / "run"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with_peft = peft.PeftModel.from_pretrained(plain, export / "peft-adapter")
    assert torch.allclose(said(with_peft), wanted, atol=1e-5)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(export / "merged")
    assert torch.allclose(said(merged), wanted, atol=1e-5)


def test_a_causal_language_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", "AutoModelForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(base)
    sections = {
        "task": "{name: instruct, template: plain, max_length: 32, new_tokens: 4}",
        "model": f"{{name: causal-lm, base: {base}}}",
        "data": "{name: arithmetic, samples: 16, batch: 4, eval_batch: 4, judge_limit: 2}",
        "methods": "[{name: hra, rank: 2, targets: [llama-qv]}]",
    }
    train(load_train(write(tmp_path, "run", **sections, **SHORT)))
    export, wanted = tmp_path / "run" / "export", said(inner(tmp_path / "run"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = said(plain)
    assert float((wanted - before).abs().max()) > 1e-3
    with_peft = peft.PeftModel.from_pretrained(plain, export / "peft-adapter")
    assert torch.allclose(said(with_peft), wanted, atol=1e-5)
    merged = transformers.AutoModelForCausalLM.from_pretrained(export / "merged")
    assert torch.allclose(said(merged), wanted, atol=1e-5)
    assert (export / "merged" / "tokenizer.json").is_file()
