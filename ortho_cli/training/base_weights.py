"""What a run need not save: frozen weights that still are those of the base it started from.

A run that adapts a model of 860 million weights trains a thousandth of them; the rest is in the base already. Left out
of a saved state is only what cannot have changed: the very parameter that was loaded, frozen, and never written to
since. The state says whose weights it leaves out, and what they hash to; going on, they must hash to the same again.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ortho_cli.errors import CheckpointError
from ortho_cli.linalg.content import content_hash

__all__ = ["BaseWeights"]


class BaseWeights:
    """The parameters of a model as it was loaded, before any method has touched it.

    Args:
        model: with the base's weights in it.
        source: what `model.base` says.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    >>> base = BaseWeights(model, "org/name")
    >>> _ = nn.init.zeros_(model[0].weight)
    >>> model[1].bias.requires_grad_(True), sorted(base.untouched(model))  # doctest: +ELLIPSIS
    (..., ['0.bias', '1.weight'])
    """

    def __init__(self, model: nn.Module, source: str) -> None:
        self.source = source
        self._loaded = {id(each): (weakref.ref(each), each._version) for each in model.parameters()}
        self._described: tuple[frozenset[str], dict[str, Any]] = (frozenset(), {})

    def untouched(self, model: nn.Module) -> set[str]:
        """The names, in the state dict, of frozen parameters that are as they were loaded."""
        return {
            name
            for name, each in model.named_parameters(remove_duplicate=False)
            if not each.requires_grad and self._is_as_loaded(each)
        }

    def without(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict without what the base has."""
        left_out = self.untouched(model)
        return {name: tensor for name, tensor in tensors.items() if name not in left_out}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """For the state's JSON: the base, the weights that are left out, and their hash, computed anew for others."""
        names = frozenset(self.untouched(model))
        if names != self._described[0]:
            said = {"source": self.source, "tensors": len(names), "hash": self._hash(model, names)}
            self._described = (names, said)
        return self._described[1]

    def check(self, model: nn.Module, found: Collection[str], said: Mapping[str, Any] | None) -> None:
        """Refuse a model whose weights are not those that a saved state left out.

        Args:
            model: rebuilt from the base.
            found: the tensors that the state has.
            said: what `describe` said when it was saved; None: nothing was left out.

        Raises:
            CheckpointError: the base has changed, or is another one.
        """
        lacking = [name for name in model.state_dict() if name not in found]
        if said is None or not lacking:
            return
        strange = sorted(set(lacking) - self.untouched(model))
        if strange:
            raise CheckpointError(f"the state lacks {len(strange)} weights that no base has, first {strange[0]}")
        if len(lacking) != said["tensors"] or self._hash(model, lacking) != said["hash"]:
            raise CheckpointError(
                f"model.base {self.source} is not what the run started from ({said['source']}): its weights differ",
                hint="put the base back as it was; a state holds only what the run itself has changed",
            )

    def _is_as_loaded(self, parameter: nn.Parameter) -> bool:
        known = self._loaded.get(id(parameter))
        return known is not None and known[0]() is parameter and known[1] == parameter._version

    @staticmethod
    def _hash(model: nn.Module, names: Iterable[str]) -> str:
        held = dict(model.named_parameters(remove_duplicate=False))
        return content_hash({name: held[name] for name in names})
