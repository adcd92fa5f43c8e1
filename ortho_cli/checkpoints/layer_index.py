"""Which layer of a checkpoint a name means, whoever gave the name: an adapter, a pattern, a person."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from ortho_cli.errors import TargetError

from .names import component_name, filed_name, modern_name, to_canonical
from .sd15 import ldm_to_canonical

__all__ = ["LayerIndex"]

# `model.language_model.` is the longest wrapper in use; more would be another model, not a wrapper.
_WRAPPER_DEPTH = 3


class LayerIndex:
    """All names under which the layers of one checkpoint can be asked for.

    Args:
        layers: the layers as the checkpoint names them (tensor names without `.weight`).
        layout: the checkpoint's layout.
    """

    def __init__(self, layers: Iterable[str], layout: str) -> None:
        self.layers = tuple(layers)
        self.layout = layout
        self._canonical = {layer: to_canonical(layer, layout) for layer in self.layers}
        # Tables in the order they are asked: an exact name is never ambiguous because of a shortened one.
        native: dict[str, list[str]] = {layer: [layer] for layer in self.layers}
        canonical: dict[str, list[str]] = {}
        short: dict[str, list[str]] = {}
        filed: dict[str, list[str]] = {}
        self._in_pipeline = False
        for layer, name in self._canonical.items():
            canonical.setdefault(name, []).append(layer)
            filed.setdefault(filed_name(name), []).append(layer)
            component, local = component_name(name)
            self._in_pipeline |= component != ""
            for shortened in {name.removeprefix(component + "."), local}:
                short.setdefault(shortened, []).append(layer)
        self._tables = (native, canonical, short, filed)

    def canonical(self, native: str) -> str:
        """The canonical name of one of the layers."""
        return self._canonical[native]

    def resolve(self, name: str) -> str | None:
        """The layer that `name` means, or None.

        Understood are the checkpoint's own name, the canonical one, that of any SD1.x layout, those without the
        component, transformers' names in memory, and each of them with one wrapper more or less in front
        (`bert.encoder...` for `encoder...`).

        Raises:
            TargetError: it could mean two layers.
        """
        found = self._find(name)
        if found is not None:
            return found
        meant = {layer for shift in self._shifts(name) if (layer := self._shifted(name, *shift)) is not None}
        if len(meant) > 1:
            raise self._ambiguous(name, meant)
        return meant.pop() if meant else None

    def resolve_all(self, names: Iterable[str]) -> dict[str, str]:
        """Find the layer of every name of an adapter: name -> layer.

        As :meth:`resolve`, but a wrapper in front must be the same for all names.

        Raises:
            TargetError: a name fits no layer (the message says which, the hint what comes nearest), a name or the
                wrapper is ambiguous, or two names mean one layer.
        """
        names = tuple(dict.fromkeys(names))
        best = {name: self._find(name) for name in names}
        missing = [name for name in names if best[name] is None]
        if missing:
            # A shift that serves all names serves the first missing one, so its shifts are all there are.
            readings = [{name: self._shifted(name, *shift) for name in names} for shift in self._shifts(missing[0])]
            whole = {tuple(reading.items()): reading for reading in readings if None not in reading.values()}
            if len(whole) > 1:
                raise self._ambiguous(missing[0], {str(reading[missing[0]]) for reading in whole.values()})
            best = max([best, *readings], key=lambda reading: sum(layer is not None for layer in reading.values()))
        resolved = {name: layer for name, layer in best.items() if layer is not None}
        if len(resolved) < len(names):
            raise self._unresolved([name for name in names if name not in resolved], len(names))
        owner: dict[str, str] = {}
        for name, layer in resolved.items():
            if owner.setdefault(layer, name) != name:
                raise TargetError(f"{owner[layer]!r} and {name!r} are both layer {layer!r} of the checkpoint")
        return resolved

    def nearest(self, name: str, n: int = 3) -> list[str]:
        """Up to `n` names of layers that look like `name`, the most alike first; for messages."""
        known = dict.fromkeys(known for table in self._tables[:2] for known in table)
        return difflib.get_close_matches(name, known, n)

    def _find(self, name: str) -> str | None:
        for spelling in dict.fromkeys((name, ldm_to_canonical(name) or name, modern_name(name), filed_name(name))):
            for table in self._tables:
                if meant := table.get(spelling):
                    if len(meant) > 1:
                        raise self._ambiguous(name, meant)
                    return meant[0]
        return None

    def _shifts(self, name: str) -> Iterator[tuple[str, str]]:
        """Every (prefix to strip, prefix to add) that could make `name` a layer of the checkpoint."""
        if self._in_pipeline and component_name(name)[0]:
            return  # `text_encoder_2.` is no wrapper around what `text_encoder.` holds
        for prefix in _wrappers(name):
            yield prefix, ""
        for spelling in dict.fromkeys((name, filed_name(name))):
            cut = -len(spelling)
            known = {known for table in self._tables for known in table if known.endswith("." + spelling)}
            for prefix in sorted({other[:cut] for other in known if other[:cut] in _wrappers(other)}):
                yield "", prefix

    def _shifted(self, name: str, strip: str, add: str) -> str | None:
        return self._find(add + name[len(strip) :]) if name.startswith(strip) else None

    def _ambiguous(self, name: str, meant: Iterable[str]) -> TargetError:
        fits = ", ".join(repr(layer) for layer in sorted(meant)[:3])
        return TargetError(f"layer name {name!r} fits more than one layer: {fits}", hint="give the full name")

    def _unresolved(self, missing: list[str], total: int) -> TargetError:
        shown = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        near = dict.fromkeys(known for name in missing[:3] for known in self.nearest(name, 2))
        return TargetError(
            f"{len(missing)} of {total} layer names fit no layer of the checkpoint: {shown}",
            hint=(f"nearest names: {', '.join(near)}; " if near else "")
            + "list them with: ortho inspect CHECKPOINT --layers",
        )


def _wrappers(name: str) -> list[str]:
    """The prefixes of a name that can be wrappers: few components, none of them an index."""
    parts = name.split(".")[:-1]
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return [".".join(parts[:k]) + "." for k in range(1, min(depth, _WRAPPER_DEPTH) + 1)]
