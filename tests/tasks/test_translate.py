"""The translation task: pairs from files, sets and packages; batches and losses that processes share; honest scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue_files import write_catalogue
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.recipe.translation import Parallel, TransformerSmall, Translate
from ortho_cli.tasks.catalogues import message_part
from ortho_cli.tasks.data_check import check_data, describe_data, found_text
from ortho_cli.tasks.parallel_text import read_lines, read_pairs
from ortho_cli.tasks.tokenization import PADDING
from ortho_cli.tasks.translate import TranslateTask

VERBS = {"save": "sichere", "delete": "lösche", "open": "öffne", "close": "schließe", "move": "bewege"}
NOUNS = {"page": "Seite", "user": "Nutzer", "file": "Datei", "list": "Liste", "image": "Bild", "name": "Namen"}
SENTENCES = [
    (f"{first} the {noun}{end}", f"{erst} {wort}{end}")
    for first, erst in VERBS.items()
    for noun, wort in NOUNS.items()
    for end in ("", " now and then", ", please!")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pairs: 73 to train on, 8 to validate, 9 to test."""
    place = tmp_path_factory.mktemp("text")
    for name, rows in (("train", SENTENCES[:73]), ("valid", SENTENCES[73:81]), ("test", SENTENCES[81:])):
        for side, language in enumerate(("en", "de")):
            (place / f"{name}.{language}").write_text("".join(f"{row[side]}\n" for row in rows), "utf-8")
    return place


def section(folder: Path | None = None, **settings: Any) -> Parallel:
    name = {"name": "parallel-text", "path": str(folder)} if folder is not None else {}
    usual = {"languages": ("en", "de"), "vocabulary": 300, "max_length": 24, "batch": 200}
    return Parallel.model_validate({**usual, **name, **settings})


def task(folder: Path, seed: int = 0, task: dict[str, Any] | None = None, **data: Any) -> TranslateTask:
    config = Translate.model_validate({"name": "translate", "beam": 2, "max_length": 24, **(task or {})})
    return TranslateTask(config, section(folder, **data), seed=seed)


def model(made: TranslateTask) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"name": "transformer-small", "dim": 16, "hidden": 16, "heads": 2, "depth": 1, "positions": 64}
    return made.build_model(TransformerSmall.model_validate({**sizes, "dropout": 0.0, "activation_dropout": 0.0}))


def test_files_give_their_lines(folder: Path, tmp_path: Path) -> None:
    assert read_pairs(section(folder), "val") == SENTENCES[73:81]
    assert read_pairs(section(folder, languages=("de", "en")), "test") == [pair[::-1] for pair in SENTENCES[81:]]
    (tmp_path / "odd").write_bytes("a\x85b\u2028c\r\nd".encode())
    assert read_lines(tmp_path / "odd") == ["a\x85b\u2028c", "d"]
    for name, text in (("train.en", "a\nb\n"), ("train.de", "a\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=r"train\.en has 2 lines and train\.de 1"):
        read_pairs(section(tmp_path), "train")
    with pytest.raises(RecipeError, match=r"has no valid\.en and valid\.de"):
        read_pairs(section(tmp_path), "val")


def test_sets_with_a_column_of_translations(tmp_path: Path) -> None:
    for name, rows in (("train", SENTENCES[:5]), ("validation", SENTENCES[5:7]), ("test", SENTENCES[7:9])):
        lines = [json.dumps({"translation": {"en": first, "de": second}}) + "\n" for first, second in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    found = section(name="parallel-text", source=str(tmp_path))
    assert [read_pairs(found, part) for part in ("train", "val", "test")] == [
        SENTENCES[:5], SENTENCES[5:7], SENTENCES[7:9],
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="has the languages en, de, expected en and fr"):
        read_pairs(section(name="parallel-text", source=str(tmp_path), languages=("en", "fr")), "train")
    with pytest.raises(RecipeError, match="does not open"):
        read_pairs(section(name="iwslt14-de-en", languages=("de", "en")), "train")


def test_messages_of_packages_in_parts_that_share_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_catalogue(tmp_path, "ortho_words", "de", dict(SENTENCES))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {
        part: read_pairs(section(name="catalogues", packages=("ortho_words",)), part)  # type: ignore[arg-type]
        for part in ("train", "val", "test")
    }
    assert sorted(pair for pairs in found.values() for pair in pairs) == sorted(SENTENCES)
    assert all(message_part(english) == part for part, pairs in found.items() for english, _ in pairs)
    back = read_pairs(section(name="catalogues", packages=("ortho_words",), languages=("de", "en")), "test")
    assert back == [pair[::-1] for pair in found["test"]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "parallel-text"}, "needs path: FOLDER"),
        ({"name": "catalogues", "path": "x"}, "come with packages"),
        ({"name": "catalogues", "languages": ("de", "fr")}, "one of the two languages is en"),
        ({"name": "wmt14-de-en", "languages": ("de", "de")}, "both are de"),
        ({"name": "wmt14-de-en", "max_length": 26}, "does not hold 8 sentences of 26; raise batch, or take 25 here"),
    ],
)
def test_recipes_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        section(**settings)


def test_what_there_is_and_how_to_get_it(folder: Path) -> None:
    assert (
        found_text(section(folder), check_data(section(folder)))
        == "found: 73 pairs to train on, 8 to validate, 9 to test; en to de"
    )
    text = describe_data(section(name="iwslt14-de-en", languages=("de", "en")))
    assert "read from: the hub, bbaaaa/iwslt14-de-en-preprocess" in text
    assert "FOLDER/valid.de" in text


def flat(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int(place) for batch in batches for place in batch["index"]]


def test_epochs_hold_whole_eights_within_the_limit(folder: Path) -> None:
    made = task(folder)
    epochs = [list(made.batches("train", epoch, batch=200)) for epoch in (0, 1)]
    for batches in epochs:
        assert len(batches) == made.steps_per_epoch > 3
        assert len(set(flat(batches))) == len(flat(batches)) == 72
        for batch in batches:
            assert len(batch["source"]) % 8 == 0
            assert batch["source"].numel() <= 200 >= batch["target"].numel()
            assert int(batch["pieces"]) == int((batch["target"] != PADDING).sum())
    assert flat(epochs[0]) != flat(epochs[1])
    assert flat(list(task(folder).batches("train", 1, batch=200))) == flat(epochs[1])
    assert flat(list(task(folder, seed=1).batches("train", 1, batch=200))) != flat(epochs[1])
    assert flat(list(made.batches("train", 1, batch=200, skip=2))) == flat(epochs[1][2:])
    assert sorted(flat(list(made.batches("eval", 0, batch=50)))) == list(range(9))


def test_long_sentences_are_left_out_of_training_only(folder: Path) -> None:
    made, short = task(folder), task(folder, max_length=8)
    assert 0 < short.size("train") < made.size("train") == 73
    assert int(short.dataset("train").lengths.max()) <= 8 < int(short.dataset("eval").lengths.max())
    assert short.size("eval") == 9


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 2), (1, 8)])
def test_processes_and_parts_together_are_one_batch_with_one_loss(folder: Path, world: int, parts: int) -> None:
    made = task(folder)
    net = model(made)
    alone = next(iter(made.batches("train", 3, batch=200)))
    shares = [
        batch
        for rank in range(world)
        for batch in list(task(folder).batches("train", 3, batch=200 // parts, rank=rank, world=world))[:parts]
    ]
    assert sorted(flat(shares)) == sorted(flat([alone]))
    losses = [made.loss(net, share, "train")[0] for share in shares]
    torch.testing.assert_close(torch.stack(losses).mean(), made.loss(net, alone, "train")[0])
    with pytest.raises(RecipeError, match="8 sentences cannot be shared evenly by 3 processes"):
        made.batches("train", 0, batch=200, world=3)


def test_the_loss_is_smoothed_cross_entropy_a_piece(folder: Path) -> None:
    batch = next(iter(task(folder).batches("train", 0, batch=200)))
    for smoothing in (0.0, 0.1):
        made = task(folder, task={"label_smoothing": smoothing})
        net = model(made)
        loss, scores, named = made.loss(net, batch, "train")
        target, rows = batch["target"].flatten(), scores.flatten(0, 1)
        wanted = F.cross_entropy(rows, target, ignore_index=PADDING, label_smoothing=smoothing)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(named["nll"], F.cross_entropy(rows, target, ignore_index=PADDING).detach())


@pytest.fixture(scope="module")
def learnt(folder: Path) -> nn.Module:
    """A model after forty epochs."""
    made = task(folder)
    net = model(made)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for epoch in range(40):
        for batch in made.batches("train", epoch, batch=200):
            optimizer.zero_grad()
            made.loss(net, batch, "train")[0].backward()
            optimizer.step()
    return net


@pytest.mark.parametrize("compat", [None, "tokenized-bleu"])
def test_scores_do_not_depend_on_how_the_part_is_shared_out(
    folder: Path, learnt: nn.Module, compat: str | None
) -> None:
    made = task(folder, task={"compat": compat})
    whole = made.evaluate(learnt, made.batches("eval", 0, batch=200))
    assert whole["bleu"] > 0 or compat  # few sentences of four words and more match without smoothing
    handed: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        handed.append(sums)
        return sums

    for rank in range(2):
        made.evaluate(learnt, made.batches("eval", 0, batch=60, rank=rank, world=2), collect)
    total = torch.stack(handed).sum(0)
    assert made.evaluate(learnt, made.batches("eval", 0, batch=60), lambda _: total) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        made.evaluate(learnt, [])


def test_it_learns_to_translate_what_it_has_not_seen(folder: Path, learnt: nn.Module, tmp_path: Path) -> None:
    made = task(folder)
    before, after = (made.evaluate(net, made.batches("eval", 0, batch=200)) for net in (model(made), learnt))
    assert before["bleu"] < 5 < 15 < after["bleu"]
    assert after["loss"] < before["loss"] / 2
    made.samples(learnt, torch.Generator().manual_seed(0), tmp_path)
    shown = (tmp_path / "translations.txt").read_text("utf-8")
    assert shown.count("source") == shown.count("found") == 9
    assert SENTENCES[-1][0] in shown


def test_what_a_run_keeps_serves_without_its_text(folder: Path, tmp_path: Path) -> None:
    first, later = task(folder), task(tmp_path / "gone")
    first.keep(tmp_path)
    later.recall(tmp_path)
    assert later.steps_per_epoch == first.steps_per_epoch
    torch.testing.assert_close(later.corpus.encoded(["save the page"]), first.corpus.encoded(["save the page"]))
    other = task(folder, max_length=8)
    other.recall(tmp_path)
    with pytest.raises(RecipeError, match=r"the training text is not that of the run: .* when it began 73"):
        other.batches("train", 0, batch=200)
    changed = task(folder, languages=("en", "de"))
    changed.corpus._pairs["train"] = SENTENCES[1:73] + SENTENCES[:1]  # as many, in another order
    changed.recall(tmp_path)
    with pytest.raises(RecipeError, match="the training text is not that of the run"):
        changed.batches("train", 0, batch=200)
    (tmp_path / "vocabulary" / "text.json").unlink()
    with pytest.raises(CheckpointError, match=r"text\.json cannot be read"):
        task(folder).recall(tmp_path)


def test_one_vocabulary_for_both(folder: Path) -> None:
    made = task(folder, joint=True)
    assert made.corpus.pieces("source") is made.corpus.pieces("target")
    apart = task(folder)
    assert apart.corpus.pieces("source").encode(["Seite"]) != apart.corpus.pieces("target").encode(["Seite"])
