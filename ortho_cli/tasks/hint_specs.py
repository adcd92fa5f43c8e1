"""The published sets of pictures with hints, as OFT's and HRA's authors laid them out, and how to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SPECS", "HintSpec"]

_LINES = '{"source": "source/<n>.png", "target": "target/<n>.png", "prompt": "..."} a line'
_PAIRS = "{split}/color", "{split}/{hint}"
_KEEPER = "https://keeper.mpdl.mpg.de/f"


@dataclass(frozen=True)
class HintSpec:
    """One set: its folders of pictures and of each kind of hint, how a copy looks, and where it can be had."""

    name: str
    title: str
    pictures: str
    hints: Mapping[str, str]
    tree: tuple[str, ...]
    fetch: tuple[str, ...]


def _paired(name: str, title: str, hints: tuple[str, ...], fetch: tuple[str, ...]) -> HintSpec:
    tree = (
        f"FOLDER/{{train,val}}/{{color,{','.join(hints)}}}/<n>.png",
        f"FOLDER/prompt_train_blip.json, prompt_val_blip[_full].json: {_LINES}",
    )
    return HintSpec(name, title, _PAIRS[0], {hint: _PAIRS[1] for hint in (*hints, "canny")}, tree, fetch)


SPECS: dict[str, HintSpec] = {
    spec.name: spec
    for spec in (
        _paired(
            "ade20k-hints", "ADE20K, 512 pixels, with colour maps of its segments; 22,244 to train and 2,000 to judge",
            ("segm",), (f"curl -LO {_KEEPER}/80b2fc97ffc3430c98de/?dl=1   (the zip of OFT's authors)",),
        ),
        _paired(
            "coco-hints", "COCO, 512 pixels; canny hints are made of the pictures", ("canny", "depth", "sketch"),
            ("nobody ships this one: COCO 2017 cut to squares of 512 pixels, with a caption each",),
        ),
        _paired(
            "deepfashion-hints", "DeepFashion, with dense poses; 1,001 to judge", ("densepose",),
            (f"curl -LO {_KEEPER}/e3d1e4294b3f49a5aff0/?dl=1   (the zip of OFT's authors)",),
        ),
        HintSpec(
            "celebahq-hints", "CelebA-HQ, with pictures of 68 landmarks; 27,000 to train and 2,987 to judge",
            "celeba-hq-img",
            {"landmark": "celeba-hq-landmark2d_cond_512", "canny": "canny"},
            (
                "FOLDER/celeba-hq-img/<id>.jpg",
                "FOLDER/celeba-hq-landmark2d_cond_512/<id>.png",
                'FOLDER/prompt_train_blip.json, prompt_val_blip[_full].json: [{"image": "<id>.jpg", "prompt": "..."}]',
            ),
            (f"curl -LO {_KEEPER}/72c34a6017cb40b896e9/?dl=1   (the zip of OFT's authors)",),
        ),
        HintSpec(
            "skimage-hints", "12 pictures of scikit-image, each named by what it shows", "", {},
            (), ("pip install scikit-image",),
        ),
        HintSpec(
            "hint-folder", "your own pictures and hints", "", {},
            (
                "FOLDER/{train,val}/metadata.jsonl   (or without train and val: every fifth sample is to judge by)",
                '  {"file_name": "a.png", "hint_file_name": "a-hint.png", "text": "..."} a line',
                "  hint_file_name may be left out for canny hints",
                f"or FOLDER/prompt.json: {_LINES}",
            ),
            ("any pictures of yours",),
        ),
    )
}  # fmt: skip
