"""The DreamBooth protocol against the published lists."""

from __future__ import annotations

import json
from pathlib import Path

from ortho_cli.recipe.subjects import CLASS_PROMPT, INSTANCE_PROMPT, SUBJECTS, TOKEN, prompts

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "dreambooth_protocol.json").read_text("utf-8"))


def test_subjects_are_the_published_ones_in_their_order() -> None:
    published = [(each["name"], each["class"], each["live"]) for each in PUBLISHED["subjects"]]
    assert [(name, subject.class_name, subject.live) for name, subject in SUBJECTS.items()] == published


def test_prompts_are_the_published_ones_of_the_subjects_kind() -> None:
    for subject in SUBJECTS.values():
        texts = PUBLISHED["live_prompts" if subject.live else "object_prompts"]
        expected = tuple(text.format(**{"token": TOKEN, "class": subject.class_name}) for text in texts)
        assert prompts(subject) == expected


def test_training_prompts_are_the_published_ones() -> None:
    published = [PUBLISHED[key].replace("{class}", "{class_name}") for key in ("instance_prompt", "class_prompt")]
    assert published == [INSTANCE_PROMPT, CLASS_PROMPT]
    assert PUBLISHED["token"] == TOKEN
