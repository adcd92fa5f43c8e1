"""`python full_size_step.py PRECISION`: two training steps of a full-size Stable Diffusion 1.5, and what they took.

Random weights, 64x64 latents, one sample, HRA on 144 layers. Prints the losses, the share of parameters that moved, and
the most memory that this process ever had, in GiB.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from ortho_cli.methods.add import insert_hra
from ortho_cli.recipe.data_captions import CaptionedPictures
from ortho_cli.recipe.models_diffusion import StableDiffusion
from ortho_cli.recipe.tasks_diffusion import TextToImage
from ortho_cli.tasks.diffusion_loss import diffusion_draws
from ortho_cli.tasks.text_to_image import TextToImageTask
from ortho_cli.training.session import shrink_frozen


def main(precision: str) -> None:
    torch.manual_seed(0)
    data = CaptionedPictures.model_validate({"name": "skimage-captions", "size": 512})
    task = TextToImageTask(TextToImage.model_validate({"name": "text_to_image"}), data, seed=0)
    model = task.build_model(StableDiffusion.model_validate({"name": "stable-diffusion"}))
    insert_hra(model, 8, "sd15-control")
    shrink_frozen(model, precision)
    trained = [each for each in model.parameters() if each.requires_grad]
    before = [each.detach().clone() for each in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for epoch in range(2):
        drawn = diffusion_draws(0, epoch, torch.tensor([0]), (4, 64, 64))
        batch = {**drawn, "moments": torch.randn(1, 2, 4, 64, 64), "tokens": torch.randint(0, 49000, (1, 77))}
        loss, _, _ = task.loss(model, batch, "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = sum(not torch.equal(old, new.detach()) for old, new in zip(before, trained, strict=True))
    found = {
        "losses": losses, "trained": sum(each.numel() for each in trained), "moved": moved, "layers": len(trained),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
