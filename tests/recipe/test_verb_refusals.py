"""What a verb's recipe may not say, and what the user is told: line, key, reason, the nearest that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.catalog import load_any
from ortho_cli.recipe.verbs import VERBS

LISTED = ", ".join(VERBS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.yaml"


def errors(path: Path, verb: str, body: str) -> list[str]:
    path.write_text(f"version: 1\nverb: {verb}\n{body}", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_any(str(path))
    return [line.removeprefix(f"{path}:") for line in caught.value.message.splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "version: 1\nverb: mergee\n",
            f"2: verb: 'mergee' is none of {LISTED}; did you mean 'merge'?",
        ),
        ("version: 1\nbase: x\n", f"1: verb: missing; one of {LISTED}"),
        (
            "version: 1\nverb: [merge]\n",
            f"2: verb: '['merge']' is none of {LISTED}; did you mean 'merge'?",
        ),
        ("verb: merge\nbase: x\n", "1: version: missing"),
        ("version: 2\nverb: merge\nbase: x\n", "1: version: version 2 is not known; this ortho reads version 1"),
        ("version: true\nverb: merge\nbase: x\n", "1: version: expected a whole number, found true"),
        ("version: 1.0\nverb: merge\nbase: x\n", "1: version: expected a whole number, found 1.0"),
        ("version: '1'\nverb: merge\nbase: x\n", "1: version: expected a whole number, found '1' (remove the quotes)"),
    ],
)
def test_version_and_verb(path: Path, text: str, expected: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_any(str(path))
    assert caught.value.message == f"{path}:{expected}"


@pytest.mark.parametrize(
    ("verb", "body", "expected"),
    [
        ("add-hra", "checkpoint: x\nrnk: 8\n", "4: rnk: no such key; did you mean 'rank'?"),
        (
            "add-hra",
            "checkpoint: x\ngram-schmidt: true\n",
            "4: gram-schmidt: no such key; did you mean 'gram_schmidt'?",
        ),
        ("add-hra", "checkpiont: x\n", "3: checkpiont: no such key; did you mean 'checkpoint'?"),
        (
            "add-hra",
            "checkpoint: x\nas: adaptor\n",
            "4: as: expected adapter or checkpoint, found 'adaptor'; did you mean 'adapter'?",
        ),
        ("add-hra", "checkpoint: x\nas: true\n", "4: as: expected adapter or checkpoint, found true"),
        (
            "add-hra",
            "checkpoint: x\ntargets: sd15-control\n",
            "4: targets: expected a list, found 'sd15-control' (write a list: [item, ...])",
        ),
        (
            "add-hra",
            "checkpoint: x\ntargets:\n  - {a,b}.x\n",
            "5: while parsing a block collection expected <block end>, but found '<scalar>'",
        ),
        (
            "add-hra",
            "checkpoint: x\nexclude:\n  - ''\n",
            "5: exclude.0: String should have at least 1 character, found ''",
        ),
        ("add-hra", "checkpoint: x\nrank: true\n", "4: rank: expected a whole number or a list, found true"),
        ("add-hra", "checkpoint: x\nrank: 8.0\n", "4: rank: expected a whole number or a list, found 8.0"),
        (
            "add-hra",
            "checkpoint: x\nrank: '8'\n",
            "4: rank: expected a whole number or a list, found '8' (remove the quotes)",
        ),
        ("add-hra", "checkpoint: x\nrank: 0\n", "4: rank: should be greater than or equal to 1, found 0"),
        (
            "add-hra",
            "checkpoint: x\nrank:\n  - 8\n  - attn2\n",
            "6: rank.1: expected a rank or 'pattern=rank', found 'attn2'",
        ),
        ("add-hra", "checkpoint: x\nrank: [8, 'a=0']\n", "4: rank.1: expected a rank or 'pattern=rank', found 'a=0'"),
        ("add-hra", "checkpoint: x\nseed: 1e3\n", "4: seed: expected a whole number, found 1000.0"),
        (
            "add-hra",
            "checkpoint: x\ngram_schmidt: on\n",
            "4: gram_schmidt: expected true or false, found 'on' (write true without quotes)",
        ),
        (
            "add-hra",
            "checkpoint: x\nforce: true\n",
            "4: force: no such key here; known: version, verb, checkpoint, output, rank, targets, exclude,"
            " as, layout, gram_schmidt, ema, seed, max_shard_size",
        ),
        ("merge", "base: x\nadapters: [a]\n", "4: adapters.0: expected a mapping, found 'a'"),
        (
            "merge",
            "base: x\nadapters:\n  - path: a\n    strenght: 1\n",
            "6: adapters.0.strenght: no such key; did you mean 'strength'?",
        ),
        ("merge", "base: 12\n", "3: base: expected text, found 12 (put it in quotes)"),
        ("merge", "base: ''\n", "3: base: String should have at least 1 character, found ''"),
        (
            "merge",
            "base: x\ndtype: fp61\n",
            "4: dtype: expected keep, fp16, bf16 or fp32, found 'fp61'; did you mean 'fp16'?",
        ),
        ("convert", "to: ldm\n", "1: input: missing"),
        (
            "merge",
            "base: x\nstrength: [1, 'up=much']\n",
            "4: strength.1: expected a number or 'pattern=number', found 'up=much'",
        ),
        (
            "merge",
            "base: x\nadapters:\n  - path: a\n    strength: .inf\n",
            "6: adapters.0.strength: expected a finite number, found inf",
        ),
        (
            "unmerge",
            "merged: x\nstrength: half\n",
            "4: strength: expected a number or a list, found 'half' (write a list: [item, ...])",
        ),
        (
            "convert",
            "input: x\nto: peft-lroa\n",
            "4: to: expected peft-hra, peft-lora, kohya-lora, diffusers-lora, hra-repo, ldm, diffusers, base,"
            " dense or safetensors, found 'peft-lroa'; did you mean 'peft-lora'?",
        ),
        ("analyze-stability", "series: run\n", "3: series: expected a list, found 'run' (write a list: [item, ...])"),
        (
            "analyze-stability",
            "series: [run]\nlag: [1]\nreference: first\n",
            "5: reference: lag is given too, and they exclude each other",
        ),
        ("analyze-stability", "series: [run]\nlag: [0]\n", "4: lag.0: should be greater than or equal to 1, found 0"),
        (
            "analyze-stability",
            "series: [run]\nthreshold: 2\n",
            "4: threshold: should be less than or equal to 1, found 2",
        ),
        (
            "analyze-spectrum",
            "checkpoint: x\nformat: [html, gif]\n",
            "4: format.1: expected html, png, svg, pdf, csv or json, found 'gif'",
        ),
        (
            "analyze-spectrum",
            "checkpoint: x\nworkers: 2\n",
            "4: workers: no such key here; known: version, verb, checkpoint, output, targets, exclude, format",
        ),
        ("analyze-adapter", "base: x\nadapter: y\nthreshold: 1\n", "5: threshold: should be less than 1, found 1"),
        (
            "analyze-orthogonality",
            "checkpoint: x\nfail_below: 2\nfail_above: 1\n",
            "4: fail_below: nothing is between 2 and fail_above, 1",
        ),
    ],
)
def test_refused(path: Path, verb: str, body: str, expected: str) -> None:
    assert errors(path, verb, body) == [expected]


def test_all_errors_in_one(path: Path) -> None:
    body = "checkpoint: x\nrnk: 8\nseed: '3'\nlayout: hra\nseed: 4\n"
    assert errors(path, "add-hra", body) == [
        "4: rnk: no such key; did you mean 'rank'?",
        "5: seed: expected a whole number, found '3' (remove the quotes)",
        "6: layout: expected keep or hra-repo, found 'hra'",
        "7: seed: repeated; it is already on line 5",
    ]
