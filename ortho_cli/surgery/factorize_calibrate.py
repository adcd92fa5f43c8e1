"""What the layers of a transformers model see of some data, as Gram matrices of their inputs.

Samples pass the model again and again, each time with as many layers watched as memory allows, up to the last of
them; the matrices lie on disk until a layer is factored. Every fourth sample is held out, to judge the factors by.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.checkpoints.layouts import LayerIndex
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.errors import CheckpointError, TargetError, UsageError

from .factorize_layers import Grams
from .factorize_selection import FactorLayer

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Calibration", "calibration"]

HELD_OUT = 4  # one sample of as many
MAX_TOKENS = 512
BATCH = 8  # samples of one length
WATCHED_BYTES = 512 * 2**20  # of Gram matrices in memory


class _Stop(Exception):
    """The last layer that is watched has been reached."""


@dataclass
class Calibration:
    """Gram matrices of the layers' inputs; made when `prepare` is first called.

    Attributes:
        checkpoint: a transformers folder.
        layers: whose inputs are watched.
        samples: texts.
        source: name of their file.
    """

    checkpoint: Checkpoint
    layers: Sequence[FactorLayer]
    samples: Sequence[str]
    source: str
    _folder: Path | None = field(default=None, init=False)

    @property
    def note(self) -> str:
        """What the report says of it."""
        held_out = len(self.samples[HELD_OUT - 1 :: HELD_OUT])
        return (
            f"factors are fitted to {len(self.samples) - held_out} samples of {self.source}; "
            f"activation errors are those on {held_out} others"
        )

    def grams(self, layer: FactorLayer) -> Grams:
        """Both matrices of one layer, `(n, n)`, divided by the number of inputs."""
        from safetensors.torch import load_file

        assert self._folder is not None, "prepare() comes first"
        found = load_file(self._folder / f"{layer.name}.safetensors")
        return Grams(found["fit"], found["held_out"])

    def fit(self, layer: FactorLayer) -> Tensor:
        """The matrix that factors are fitted to."""
        return self.grams(layer).fit

    def prepare(self) -> None:
        """Run the samples through the model, once for each group of layers that memory holds.

        Raises:
            CheckpointError: transformers cannot read the folder.
            TargetError: a layer is no Linear of the model.
        """
        if self._folder is not None:
            return
        import torch

        folder = Path(tempfile.mkdtemp(prefix="ortho-grams-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        model, tokenizer = _load(self.checkpoint)
        modules = _modules(model, self.checkpoint, self.layers)
        batches = [list(_batches(tokenizer, part)) for part in _parts(self.samples)]
        with torch.inference_mode():
            for group in _groups(self.layers, modules):
                for name, grams in _watch(model, {name: modules[name] for name in group}, batches).items():
                    _save(folder / f"{name}.safetensors", grams)
        self._folder = folder


def calibration(checkpoint: Checkpoint, layers: Sequence[FactorLayer], data: str | Path, samples: int) -> Calibration:
    """Check that a checkpoint can be run on some data, before any work.

    Args:
        checkpoint: a transformers folder with configuration and tokenizer.
        layers: to watch; Linear layers.
        data: a text file with a sample a line, or `.jsonl` with the key `text`.
        samples: how many lines to take, from the first.

    Raises:
        UsageError: no transformers folder, too few samples, or transformers is not installed.
        CheckpointError: the data cannot be read.
        TargetError: a convolution or an embedding.
    """
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise UsageError("--calibrate needs transformers", hint="pip install 'ortho-cli[text]'")
    config = checkpoint.config
    if checkpoint.kind != "folder" or "model_type" not in config or config.get("is_encoder_decoder"):
        raise UsageError(
            f"--calibrate runs the model of a transformers folder (encoder or decoder); {checkpoint.root.name} is none",
            hint="give a folder with config.json and a tokenizer, or leave --calibrate out",
        )
    other = next((layer for layer in layers if layer.view.kind not in ("linear", "conv1d")), None)
    if other is not None:
        raise TargetError(
            f"--calibrate fits Linear layers, which {other.name} is not (it is of kind {other.view.kind})",
            hint=f"leave it out: --exclude {other.name}",
        )
    texts = _read(Path(data).expanduser(), samples)
    if len(texts) < HELD_OUT:
        raise UsageError(f"{len(texts)} samples are too few to fit and to judge by", hint=f"give at least {HELD_OUT}")
    return Calibration(checkpoint, layers, texts, Path(data).name)


def _read(path: Path, count: int) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--calibrate cannot be read: {str(error)[:120]}", where=str(path)) from error
    texts = []
    for number, line in enumerate(lines, 1):
        text: object = line
        if path.suffix == ".jsonl" and line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError('expected {"text": ...} on each line', where=f"{path}:{number}") from error
        if isinstance(text, str) and text.strip():
            texts.append(text.strip())
        if len(texts) == count:
            break
    return texts


def _load(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    import transformers

    automatic: Any = transformers
    try:
        tokenizer = automatic.AutoTokenizer.from_pretrained(checkpoint.root)
        model = automatic.AutoModel.from_pretrained(checkpoint.root)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot open {checkpoint.root.name}: {str(error).splitlines()[0][:200]}",
            hint="the folder needs config.json, the weights and a tokenizer",
            where=str(checkpoint.root),
        ) from error
    return model.float().eval(), tokenizer


def _modules(model: nn.Module, checkpoint: Checkpoint, layers: Sequence[FactorLayer]) -> dict[str, nn.Module]:
    """The modules of the layers, which transformers may call by other names."""
    index = LayerIndex(checkpoint.layers(), checkpoint.layout)
    wanted = {layer.name for layer in layers}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and (native := index.resolve(name)) in wanted:
            found[str(native)] = module
    missing = sorted(wanted - found.keys())
    if missing:
        raise TargetError(
            f"--calibrate: {len(missing)} layers, first {missing[0]}, are not in the {type(model).__name__} that "
            "transformers builds",
            hint=f"leave them out: --exclude {missing[0]}",
        )
    return found


def _parts(samples: Sequence[str]) -> tuple[list[str], list[str]]:
    """The samples to fit to, and those to judge by."""
    places = range(len(samples))
    held_out = [samples[place] for place in places if place % HELD_OUT == HELD_OUT - 1]
    return [samples[place] for place in places if place % HELD_OUT != HELD_OUT - 1], held_out


def _batches(tokenizer: Any, samples: Sequence[str]) -> Iterator[Tensor]:
    """Token numbers `(samples, length)`; samples of one length go together, so that nothing is padded."""
    import torch

    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    encoded = [tokenizer(sample, truncation=True, max_length=limit)["input_ids"] for sample in samples]
    by_length: dict[int, list[list[int]]] = {}
    for tokens in encoded:
        by_length.setdefault(len(tokens), []).append(tokens)
    for _, group in sorted(by_length.items()):
        for first in range(0, len(group), BATCH):
            yield torch.tensor(group[first : first + BATCH])


def _groups(layers: Sequence[FactorLayer], modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Names of layers in model order, in groups whose matrices fit into memory."""
    width = {layer.name: layer.size.cols for layer in layers}
    group: list[str] = []
    held = 0
    for name in modules:
        needed = 2 * 8 * width[name] ** 2
        if group and held + needed > WATCHED_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    yield group


def _watch(
    model: nn.Module, watched: Mapping[str, nn.Module], batches: Sequence[Sequence[Tensor]]
) -> dict[str, list[Tensor]]:
    """The Gram matrices of the inputs of some layers, one for each part of the samples.

    A pass ends at the last of them, unless the first, whole pass found layers that run several times (ALBERT's).
    """
    import torch

    found: dict[str, list[Tensor]] = {name: [] for name in watched}
    counts = dict.fromkeys(watched, 0)
    passed: Counter[str] = Counter()  # runs of each layer in the current pass
    stops = False

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            found[name][-1].addmm_(rows.T, rows)
            counts[name] += len(rows)
            passed[name] += 1
            if stops and len(passed) == len(watched):
                raise _Stop

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in watched.items()]
    try:
        for part in batches:
            for name in watched:
                size = _inputs(watched[name])
                found[name].append(torch.zeros(size, size, dtype=torch.float64))
                counts[name] = 0
            for tokens in part:
                passed.clear()
                with suppress(_Stop):
                    model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                    stops = max(passed.values(), default=0) == 1
            for name in watched:
                found[name][-1] /= max(counts[name], 1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _inputs(module: nn.Module) -> int:
    """Width of what a Linear, or transformers' Conv1D, reads."""
    size = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if not isinstance(size, int):
        raise TargetError(f"--calibrate fits Linear layers, not a {type(module).__name__}")
    return size


def _save(path: Path, grams: Sequence[Tensor]) -> None:
    from safetensors.torch import save_file

    fit, held_out = grams
    save_file({"fit": fit.float(), "held_out": held_out.float()}, path)
