"""Folders of a subject's pictures, judged as DreamBooth judges (arXiv:2208.12242): DINO, CLIP-I, CLIP-T and LPIPS.

The generated pictures of one subject stand against all its reference pictures, whatever their type. Prompts are those
of the manifest, picture by picture, so that no picture is scored against another's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .evaluation import Missing, Skipped
from .perceptual import load_lpips
from .picture_features import HubNetwork, as_unit, resized
from .picture_folder import PictureFolder
from .picture_metrics import PictureOptions
from .subject_metrics import pair_similarity, prompt_similarity

__all__ = ["clip_i_of_folders", "clip_t_of_folders", "dino_of_folders", "lpips_of_folders"]

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"  # those of the published figures
LPIPS_SIDE = 512


def dino_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, model: str = DINO
) -> dict[str, float] | Skipped:
    """The mean cosine of all pairs of a generated and a reference picture, by DINO's class token."""
    network = _network(model, options.device)
    module: Any = network.model

    def class_token(pictures: Tensor) -> Tensor:
        found: Tensor = module(pixel_values=network.normalized(pictures)).last_hidden_state[:, 0]
        return found

    return {"dino": _similarity(generated, reference, options, class_token)}


def clip_i_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, model: str = CLIP
) -> dict[str, float] | Skipped:
    """The mean cosine of all pairs of a generated and a reference picture, by CLIP's embeddings of pictures."""
    return {"clip_i": _similarity(generated, reference, options, _network(model, options.device))}


@torch.no_grad()
def clip_t_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, *, model: str = CLIP
) -> dict[str, float] | Skipped:
    """The mean cosine of each generated picture and its own prompt, by CLIP's embeddings."""
    prompts = generated.prompts()
    without = [name for name in generated.names if name not in prompts]
    if without:
        reason = f"no prompt is known for {len(without)} pictures, first {without[0]}"
        return Skipped("clip-t", reason, 'pictures of: ortho generate RUN --prompt "..." -o DIR have theirs')
    network = _network(model, options.device)
    tokenizer = _tokenizer(model)
    module: Any = network.model
    texts = sorted(set(prompts.values()))
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(options.device)
    found = module.get_text_features(**tokens)
    embedded = found if isinstance(found, Tensor) else found.pooler_output
    rows = [texts.index(prompts[name]) for name in generated.names]
    return {"clip_t": prompt_similarity(_features(generated, options, network), embedded[rows].float().cpu())}


@torch.no_grad()
def lpips_of_folders(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions
) -> dict[str, float] | Skipped:
    """The mean LPIPS distance (VGG, at 512 pixels) of all pairs of a generated and a reference picture.

    HRA's table takes more of it as better, for diversity.
    """
    distance = load_lpips(options.device, LPIPS_SIDE)
    references = [_signed(pictures.to(options.device)) for pictures in reference.batches(1)]
    total = 0.0
    for number, pictures in enumerate(generated.batches(1), start=1):
        picture = _signed(pictures.to(options.device))
        total += sum(float(distance(picture, other)) for other in references)
        options.say(f"lpips: {number:,} of {len(generated):,} pictures")
    return {"lpips": total / (len(generated) * len(references))}


def _similarity(
    generated: PictureFolder, reference: PictureFolder, options: PictureOptions, embed: Callable[[Tensor], Tensor]
) -> float:
    return pair_similarity(_features(generated, options, embed), _features(reference, options, embed))


@torch.no_grad()
def _features(folder: PictureFolder, options: PictureOptions, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """`(N, d)` float32 on the CPU, of the square in the middle of each picture."""
    return torch.cat(
        [embed(_middle(pictures).to(options.device)).float().cpu() for pictures in folder.batches(options.batch)]
    )


def _middle(pictures: Tensor) -> Tensor:
    """The largest square in the middle."""
    height, width = pictures.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[..., top : top + side, left : left + side]


def _signed(pictures: Tensor) -> Tensor:
    """In [-1, 1], as LPIPS takes them."""
    return 2 * resized(as_unit(_middle(pictures)), LPIPS_SIDE) - 1


@lru_cache(maxsize=1)
def _network(name: str, device: torch.device) -> HubNetwork:
    """The last network stays loaded: two metrics in a row have CLIP."""
    return HubNetwork(name, device)


def _tokenizer(name: str) -> Any:
    import transformers

    family: Any = transformers.AutoTokenizer
    try:
        return family.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Missing(
            f"{name} has no tokenizer here: {str(error).splitlines()[0][:120]}", f"hf download {name}"
        ) from error
