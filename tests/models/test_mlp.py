"""The MLP is Linear layers with ReLU between them, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ortho_cli.models.mlp import MLP, build
from ortho_cli.recipe.models import MLP as Config


def test_it_computes_what_it_says() -> None:
    model = MLP(4, [3, 5], 2)
    images = torch.randn(6, 1, 2, 2)
    hidden = images.view(6, 4)
    for layer in model.layers:
        hidden = F.linear(hidden, layer.weight, layer.bias).clamp(min=0)  # type: ignore[arg-type]
    torch.testing.assert_close(model(images), F.linear(hidden, model.head.weight, model.head.bias))


def test_without_hidden_layers_it_is_linear() -> None:
    assert [name for name, _ in MLP(4, [], 2).named_parameters()] == ["head.weight", "head.bias"]


def test_a_recipe_gives_the_sizes() -> None:
    model = build(Config.model_validate({"name": "mlp", "hidden": (7,)}), 10, 3, 4)
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 48), (7,), (10, 7), (10,)]
