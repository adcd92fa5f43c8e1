"""Tiny models and the adapters PEFT writes for them; shared by the tests of PEFT's dialect."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ortho_cli.checkpoints.adapters import Adapter, read_adapter
from ortho_cli.checkpoints.reading import TensorReader

# What PEFT says of its own accord while it injects and saves; nothing of ours is silenced.
PEFT_SPEAKS = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "The symmetric initialization can NOT be performed when r is odd",
        "Invalid `oft_block_size`",
        "Setting `save_embedding_layers` to `True`",
        "Could not identify embedding layer",
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
        ".*LoRA tensor.s. have invalid shape.*",  # it takes the bias of lora_B for a matrix
    )
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 20)
        self.wide = nn.Linear(20, 48)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 8, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(48)
        self.classifier = nn.Linear(48, 3)


def base_model() -> Model:
    torch.manual_seed(0)
    return Model()


def trained(
    folder: Path, config: Any, model: nn.Module | None = None
) -> tuple[Adapter, dict[str, torch.Tensor], nn.Module]:
    """Inject with PEFT, move every trainable number, save, and merge with PEFT; the adapter, merged weights, base."""
    import peft

    base = base_model() if model is None else model
    untouched = copy.deepcopy(base)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload()
    return read_adapter(folder), dict(merged.state_dict()), untouched


def merged_here(adapter: Adapter, base: nn.Module) -> dict[str, torch.Tensor]:
    """The whole merge by the rules in `Adapter`'s docstring."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with TensorReader() as reader:
        for name, info in adapter.replacements.items():
            assert name in state
            state[name] = reader.read_copy(info)
        for name, (rows, info) in adapter.row_replacements.items():
            state[name][list(rows)] = reader.read_copy(info)
        for layer in adapter.layers:
            weight = state[f"{layer}.weight"]
            assert adapter.layers[layer].expects(weight.shape) is None
            operator = adapter.operator(layer)
            state[f"{layer}.weight"] = operator.apply(weight.reshape(weight.shape[0], -1)).reshape(weight.shape)
        for name, addition in adapter.additions.items():
            state[name] = state[name] + addition.scale * reader.read_copy(addition.tensor)
    return state


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: nn.Module) -> None:
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, expected in theirs.items():
        error = torch.linalg.vector_norm((ours[name] - expected).double())
        assert error <= 1e-5 * torch.linalg.vector_norm(expected.double()), (name, float(error))
        changed += not torch.equal(expected, base.state_dict()[name])
    assert changed, "the adapter changed nothing: the comparison is empty"


EVERYWHERE = ["q", "wide", "conv", "point"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "hra": ("HRA", {"r": 4}),
    "hra odd": ("HRA", {"r": 5}),
    "hra gram-schmidt": ("HRA", {"r": 4, "apply_GS": True, "init_weights": False}),
    "hra biases": ("HRA", {"r": 2, "bias": "hra_only"}),
    "hra all biases, saved module": ("HRA", {"r": 2, "bias": "all", "modules_to_save": ["classifier"]}),
    "lora": ("Lora", {"r": 4, "lora_alpha": 6, "modules_to_save": ["classifier"]}),
    "lora own biases": ("Lora", {"r": 4, "lora_alpha": 6, "lora_bias": True, "init_lora_weights": False}),
    "lora saved biases": ("Lora", {"r": 4, "lora_alpha": 6, "bias": "lora_only"}),
    "rslora with patterns": (
        "Lora",
        {
            "r": 4, "lora_alpha": 6, "use_rslora": True,
            "rank_pattern": {"layers.0.q": 2, "wi.e": 3}, "alpha_pattern": {"layers.1.*": 5},
        },
    ),
    "dora": ("Lora", {"r": 4, "use_dora": True}),
    "lora on embedding": ("Lora", {"r": 2, "target_modules": ["embed_tokens", "q"]}),
    "dora on embedding": ("Lora", {"r": 2, "target_modules": ["embed_tokens", "q"], "use_dora": True}),
    "lora with token rows": ("Lora", {"r": 2, "trainable_token_indices": {"embed_tokens": [1, 7, 4]}}),
    "loha": ("LoHa", {"r": 3, "alpha": 5, "init_weights": False, "rank_pattern": {"q": 2}}),
    "loha tucker": ("LoHa", {"r": 3, "alpha": 5, "init_weights": False, "use_effective_conv2d": True}),
    "lokr": ("LoKr", {"r": 2, "alpha": 3, "init_weights": False}),
    "lokr tucker": (
        "LoKr", {"r": 1, "alpha": 3, "init_weights": False, "decompose_both": True, "use_effective_conv2d": True},
    ),
    "lokr whole factors": ("LoKr", {"r": 32, "alpha": 3, "init_weights": False}),
    "oft exact": (
        "OFT",
        {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": [*EVERYWHERE, "embed_tokens"]},
    ),
    "oft neumann": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": True}),
    "oft neumann, number of blocks": ("OFT", {"oft_block_size": 0, "r": 3, "target_modules": ["q", "conv"]}),
    "oft neumann, three terms": ("OFT", {"oft_block_size": 2, "num_cayley_neumann_terms": 3}),
    "oft shared": ("OFT", {"oft_block_size": 2, "block_share": True, "use_cayley_neumann": False}),
    "oft constrained": ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.1, "use_cayley_neumann": False}),
    "boft": ("BOFT", {"boft_block_size": 2}),
}  # fmt: skip


def make_config(name: str) -> Any:
    import peft

    kind, options = CONFIGS[name]
    return getattr(peft, f"{kind}Config")(**{"target_modules": EVERYWHERE, **options})


def edit(folder: Path, tensors: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
    """Change a saved adapter: its tensors in place, its configuration by keyword (None removes a key)."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    if tensors is not None:
        content = load_file(path)
        tensors(content)
        save_file(content, path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= config
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder
