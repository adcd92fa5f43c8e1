"""The DreamBooth protocol: 30 subjects, and 25 prompts for each, of which ten suit things and ten others pets.

Sentences and names are those of the data set google/dreambooth (CC BY 4.0; arXiv:2208.12242).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLASS_PROMPT", "INSTANCE_PROMPT", "SUBJECTS", "TOKEN", "Subject", "prompts"]

TOKEN = "qwe"  # a word that means nothing to the text encoder
INSTANCE_PROMPT = "a photo of {token} {class_name}"
CLASS_PROMPT = "a photo of {class_name}"


@dataclass(frozen=True)
class Subject:
    """What the pictures of one folder show: a word for it, and whether it is alive."""

    class_name: str
    live: bool


def _kinds(live: bool, **classes: str) -> dict[str, Subject]:
    return {name: Subject(word, live) for name, word in classes.items()}


SUBJECTS: dict[str, Subject] = {
    **_kinds(False, backpack="backpack", backpack_dog="backpack", bear_plushie="stuffed animal", berry_bowl="bowl"),
    **_kinds(False, can="can", candle="candle"),
    **_kinds(True, cat="cat", cat2="cat"),
    **_kinds(False, clock="clock", colorful_sneaker="sneaker"),
    **_kinds(True, dog="dog", dog2="dog", dog3="dog", dog5="dog", dog6="dog", dog7="dog", dog8="dog"),
    **_kinds(False, duck_toy="toy", fancy_boot="boot", grey_sloth_plushie="stuffed animal", monster_toy="toy"),
    **_kinds(False, pink_sunglasses="glasses", poop_emoji="toy", rc_car="toy", red_cartoon="cartoon", robot_toy="toy"),
    **_kinds(False, shiny_sneaker="sneaker", teapot="teapot", vase="vase", wolf_plushie="stuffed animal"),
}
"""By the name of their folder, in the published order."""

_PLACES = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
_THINGS = (
    "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road",
    "a {} on top of a white rug",
)  # fmt: skip
_PETS = (
    "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
)  # fmt: skip
_LOOKS = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")


def prompts(subject: Subject, token: str = TOKEN) -> tuple[str, ...]:
    """The 25 sentences that a subject is judged by.

    Args:
        subject: its class names it, and whether it lives chooses the ten in the middle.
        token: the word that stands for it; empty: none, as for a model that does not know it.

    >>> prompts(SUBJECTS["cat"])[10], prompts(SUBJECTS["vase"], "sks")[13]
    ('a qwe cat wearing a red hat', 'a sks vase floating on top of water')
    """
    name = f"{token} {subject.class_name}".strip()
    return tuple(prompt.format(name) for prompt in (*_PLACES, *(_PETS if subject.live else _THINGS), *_LOOKS))
