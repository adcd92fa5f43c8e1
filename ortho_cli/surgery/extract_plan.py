"""The plan of an extraction: at most what headers allow, then what the values of both checkpoints turned out to hold.

Which layers differ, and how, only reading tells. So the plan's files are an upper bound until it runs; an adapter is
small, and is held in memory from the pass over both checkpoints until it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli.checkpoints.layer_pool import LayerPool
from ortho_cli.checkpoints.output import check_output
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.errors import TargetError

from .extract_folders import RESIDUAL, ROTATION, Parts, extracted_folders, found_parts, most_parts
from .extract_layers import Extracted, ExtractWork, explained
from .extract_pairs import BLOCKS_READ, Pairs, TensorPair, same_values
from .fit import input_files
from .plan import Advance, Plan

__all__ = ["Extraction"]

LITTLE = 0.5  # of the change: what explains less is the wrong kind, or of too low a rank


@dataclass
class Extraction:
    """One extraction, decided but not begun; `plan` says what it may write.

    Attributes:
        base: the checkpoint that the adapter will sit on.
        tuned: the fine-tuned one.
        output: the folder to write.
        work: computes the layers.
        pairs: what is compared.
        metadata: of every file.
        workers: layers at a time.
        force: the output may be replaced.
    """

    base: Checkpoint
    tuned: Checkpoint
    output: Path
    work: ExtractWork
    pairs: Pairs
    metadata: dict[str, str]
    workers: int
    force: bool

    def plan(self) -> Plan:
        """Lay out the most that may be written."""
        plan = Plan("extract", [*input_files(self.base), *input_files(self.tuned)], self.output, [])
        plan.before = lambda advance: self._read(plan, advance)
        plan.extra_bytes = sum(pair.nbytes for pair in self.pairs.tensors)
        pool = LayerPool(self.work, workers=self.workers)
        pool.schedule({name: self.work.job_bytes(name) for name in self.work.pairs})
        plan.working_bytes = max(pool.needed, self.workers * BLOCKS_READ)
        pairs, ranks = self.work.pairs, self.work.ranks
        plan.layers, plan.notes = len(pairs), list(self._notes())
        parts = {name: Parts(pair) for name, pair in pairs.items()}
        if self.work.energy is None:
            parts = {name: most_parts(pair, self.work.kind, ranks[name]) for name, pair in pairs.items()}
            self._lay_out(plan, parts)
            plan.working_bytes += plan.bytes_out
        else:
            plan.notes.append("ranks, and so parameters and bytes, are known once the changes are read")
        plan.details = [self._detail(name, part) for name, part in parts.items()]
        plan.totals = {"kind": self.work.kind, "layers_compared": len(pairs)}
        plan.notes.append("layers and sizes are upper bounds: only reading tells which layers differ")
        return plan

    def _read(self, plan: Plan, advance: Advance) -> None:
        """Compare everything, extract what differs, and lay out what will really be written."""
        changed = self._changed(advance)
        pairs = {name: pair for name, pair in self.work.pairs.items() if pair.weights in changed}
        others = [pair for pair in self.pairs.others if pair in changed]
        if not pairs:
            raise _nothing(self.base, self.tuned, len(self.work.pairs), others)
        pool = LayerPool(self.work, workers=self.workers)
        found: dict[str, Extracted] = {}
        for name, result in zip(pairs, pool.map({name: self.work.job_bytes(name) for name in pairs}), strict=True):
            found[name] = result
            advance(pairs[name].weights.nbytes)
        parts = {name: found_parts(pairs[name], result) for name, result in found.items()}
        self._lay_out(plan, parts)
        plan.details = [{**self._detail(name, parts[name]), **found[name].figures} for name in parts]
        sums = [sum(getattr(result, key) for result in found.values()) for key in ("change", "turned", "missed")]
        shares = explained(self.work.kind, *sums)
        angles = [detail["largest_angle"] for detail in plan.details if "largest_angle" in detail]
        plan.totals = {
            "kind": self.work.kind, "layers_compared": len(self.work.pairs),
            "layers_equal": len(self.work.pairs) - len(pairs), **shares,
            **({"largest_angle": max(angles)} if angles else {}),
        }  # fmt: skip
        plan.notes += [*self._carried(parts, others), *self._advice(1 - sums[2] / (sums[0] or 1.0))]
        check_output(self.output, plan.inputs, plan.bytes_out, force=self.force)

    def _changed(self, advance: Advance) -> set[TensorPair]:
        """The tensors that differ; those that no job will read again are reported as read."""
        every = {pair.base.name: pair for pair in self.pairs.tensors}
        pool = LayerPool(lambda name: same_values(every[name]), workers=self.workers)
        changed = set()
        for pair, same in zip(every.values(), pool.map(dict.fromkeys(every, BLOCKS_READ)), strict=True):
            if not same:
                changed.add(pair)
            if same or pair.kind:
                advance(pair.nbytes)
        return changed

    def _lay_out(self, plan: Plan, parts: Mapping[str, Parts]) -> None:
        """Make the folders of these parts what the plan writes."""
        written = extracted_folders(parts, self.work.kind, self.base, self.tuned, self.metadata)
        plan.files, plan.texts = written.files, written.texts
        plan.layers, plan.parameters = len(parts), sum(part.parameters for part in parts.values())
        plan.notes = list(dict.fromkeys([*self._notes(), *written.notes]))

    def _detail(self, name: str, parts: Parts) -> dict[str, Any]:
        info = self.work.pairs[name].layer.info
        return {
            "name": name, "shape": list(info.shape), "dtype": info.dtype, "kind": self.work.kind,
            "rank": self.work.ranks.get(name), "parameters": parts.parameters,
        }  # fmt: skip

    def _notes(self) -> Iterator[str]:
        yield from (*self.base.notes, *self.tuned.notes, *self.pairs.notes)
        still = [pair for pair in self.work.pairs.values() if pair.still]
        if still:
            first = still[0]
            yield f"{len(still)} layers are taken as sums only, first {first.layer.name}, which {first.still}"

    def _carried(self, parts: Mapping[str, Parts], others: list[TensorPair]) -> Iterator[str]:
        """What of the change is not in the adapter, or not in its rotation."""
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(pair.kind for pair in others).items())
            yield f"tensors that differ and are not in the adapter: {kinds} (first {others[0].base.name})"
        turning = self.work.kind != "lora"
        unmoved = [name for name, part in parts.items() if part.vectors is None and not self.work.pairs[name].still]
        if turning and unmoved:
            yield f"{len(unmoved)} layers changed in no way that a rotation was found for, first {unmoved[0]}"

    def _advice(self, share: float) -> Iterator[str]:
        if share < LITTLE:
            other = "" if self.work.kind == "both" else ", or --kind both"
            yield f"the adapter explains {max(share, 0):.0%} of the change: raise --rank{other}"
        if self.work.kind == "both":
            name, base = self.output.name, self.base.root.name
            yield f"merge both, in this order: ortho merge {base} {name}/{ROTATION} {name}/{RESIDUAL} -o MERGED"


def _nothing(base: Checkpoint, tuned: Checkpoint, layers: int, others: list[TensorPair]) -> TargetError:
    if others:
        kinds = ", ".join(dict.fromkeys(pair.kind for pair in others))
        return TargetError(
            f"the {layers} layers compared are equal; only {len(others)} tensors differ, which no adapter carries "
            f"({kinds}; first {others[0].base.name})",
            hint=f"see them: ortho inspect {base.root.name} --diff {tuned.root.name}",
        )
    return TargetError(
        f"nothing differs between {base.root.name} and {tuned.root.name} in the {layers} layers compared",
        hint="give the fine-tuned checkpoint second: ortho extract BASE TUNED -o ADAPTER",
    )
