"""What frozen networks make of pictures and words, kept on disk: latents and text embeddings, by their content.

The name of an entry is a hash of everything that decides it: the picture's bytes, its shape, whether it is mirrored,
and the network's weights. So one folder serves any number of runs, and nothing in it is ever out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ortho_cli.checkpoints.output import atomic
from ortho_cli.errors import CheckpointError
from ortho_cli.linalg.content import content_hash

__all__ = ["TensorCache"]

KEY = "value"


class TensorCache:
    """Tensors that one network makes, a file each.

    Args:
        folder: made where it is not there.
        network: frozen; its weights are part of each name.

    >>> import tempfile, torch
    >>> cache = TensorCache(tempfile.mkdtemp(), nn.Linear(2, 2))
    >>> made = [cache.get("a", lambda: torch.ones(3) / n) for n in (1, 2)]
    >>> torch.equal(made[0], made[1])
    True
    """

    def __init__(self, folder: str | Path, network: nn.Module) -> None:
        self.folder = Path(folder).expanduser()
        self.network = content_hash(dict(network.state_dict()))

    def get(self, identity: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of an identity: from its file, or made now and kept.

        Raises:
            CheckpointError: a file of the cache is damaged.
            OutputError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        name = hashlib.sha256(f"{self.network}:{identity}".encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        if path.is_file():
            try:
                return load_file(path)[KEY]
            except (SafetensorError, KeyError, OSError) as error:
                raise CheckpointError(
                    f"a kept tensor cannot be read: {str(error)[:200]}", hint="remove the file", where=str(path)
                ) from error
        value = make().detach().cpu().contiguous()
        with atomic(path) as partial:
            save_file({KEY: value}, partial)
        return value
