"""Two halves of a task, an adapter each, one adapter of both: every mode of `ortho combine` against task arithmetic.

    python tests/benchmarks/combine_digits.py [SEEDS]                   # the table in README
    python tests/benchmarks/combine_digits.py --picture STRENGTH.png    # the picture: one adapter's strength

A small vision transformer has seen ten pictures of each digit. From there, its head frozen, one HRA adapter learns the
digits 0 to 4 and another 5 to 9, and all is judged among all ten. Neither has seen the other's digits, so each gives up
the other half: that is what combining has to mend. Task arithmetic, `W + s (W_A - W) + s (W_B - W)`, is `combine --mode
linear` of the adapters as LoRAs. Accuracies are of the 359 evaluation images. Chosen strengths and weights
are the best, over all seeds together, on a fifth of the training images, from which nothing else is learnt.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.analysis.matplotlib_figure import STYLE
from ortho_cli.analysis.style import DOTS_PER_INCH, INK, color
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.models.vit import VisionTransformer
from ortho_cli.recipe.data import Images
from ortho_cli.tasks.image_data import load_images
from ortho_cli.tasks.image_samples import ImageSamples
from ortho_cli.tasks.image_set import ImageSet, stratified
from ortho_cli.tasks.image_specs import SPECS

HALVES = {"0-4": (0, 1, 2, 3, 4), "5-9": (5, 6, 7, 8, 9)}
ALL = {**HALVES, "0-9": tuple(range(10))}
TARGETS = ["blocks.**"]
SHOWN_EACH, STEPS, BATCH, RANK = 10, 200, 64, 4
BASE_RATE, ADAPTER_RATE = 3e-3, 1e-2
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SUMS, MEANS = ("linear", "ties"), ("mean", "log-mean", "orthomerge", "slerp")
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
GRID = [index / 20 for index in range(31)]  # of the picture, 0 to 1.5

Part = tuple[Tensor, Tensor]  # pictures (N, 1, 8, 8), labels (N,)
Accuracies = tuple[float, float, float]  # per cent of the first half, the second, and all


def parts() -> tuple[Part, Part, Part]:
    """Digits to train on, to choose on (a fifth of the training images) and to report."""
    train, judged = (load_images(Images(name="digits"), split) for split in ("train", "eval"))
    labels = train.labels.tolist()
    return (
        _tensors(train.select(stratified(labels, "train"))),
        _tensors(train.select(stratified(labels, "eval"))),
        _tensors(judged),
    )


def _tensors(images: ImageSet) -> Part:
    spec = SPECS["digits"]
    batch = ImageSamples(images, spec, spec.size, (), 0).fetch(0, torch.arange(len(images)))
    return batch["image"], batch["label"]


def only(part: Part, classes: Sequence[int]) -> Part:
    kept = torch.isin(part[1], torch.tensor(classes))
    return part[0][kept], part[1][kept]


def few(part: Part, seed: int) -> Part:
    """The same number of pictures of each class, drawn by seed."""
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(seed))
    places = torch.cat([order[part[1][order] == label][:SHOWN_EACH] for label in range(10)])
    return part[0][places], part[1][places]


def fit(model: nn.Module, part: Part, *, rate: float, decay: float, seed: int) -> nn.Module:
    """Train what is trainable, with cross-entropy over all ten classes."""
    images, labels = part
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-STEPS * BATCH // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    for places in order[: STEPS * BATCH].split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[places]), labels[places]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: nn.Module, part: Part) -> Accuracies:
    right = model(part[0]).argmax(1) == part[1]
    halves = [torch.isin(part[1], torch.tensor(classes)) for classes in HALVES.values()]
    first, second, whole = (100 * float(chosen.float().mean()) for chosen in (*(right[half] for half in halves), right))
    return first, second, whole


class Trained:
    """One seed's base and adapters, as the files that the verbs work on: `base`, `0-4`, `5-9`, `0-9`, and LoRAs."""

    def __init__(self, folder: Path, train: Part, seed: int) -> None:
        self.folder = folder
        folder.mkdir()
        torch.manual_seed(seed)
        model = VisionTransformer(10, 1, 8, patch=4, depth=4, heads=4, dim=64)
        self.base = fit(model, few(train, seed), rate=BASE_RATE, decay=0.05, seed=seed)
        base = folder / "base.safetensors"
        save_file(self.base.state_dict(), base)
        for place, (name, classes) in enumerate(ALL.items()):
            adapted = ortho.add_adapter(copy.deepcopy(self.base), rank=RANK, targets=TARGETS, seed=3 * seed + place)
            fit(adapted, only(train, classes), rate=ADAPTER_RATE, decay=0.0, seed=seed)
            ortho.save_adapter(adapted, folder / name)
            # Exactly the same change of the weights; sums of these are task arithmetic.
            ortho.convert(folder / name, folder / f"{name}-lora", "peft-lora", base=base)

    def with_adapter(self, name: str) -> nn.Module:
        return ortho.load_adapter(copy.deepcopy(self.base), self.folder / name).eval()

    def combined(self, mode: str, weights: tuple[float, float], *, restore: bool = False) -> nn.Module:
        form = "-lora" if mode in SUMS else ""
        adapters = [(self.folder / f"{name}{form}", weight) for name, weight in zip(HALVES, weights, strict=True)]
        ortho.combine(adapters, self.folder / "combined", mode=mode, restore_angles=restore, force=True)
        return self.with_adapter("combined")


# Of each row the settings to choose from: a mode and the weights of both adapters.
Setting = tuple[str, tuple[float, float]]


def rows() -> dict[str, list[Setting]]:
    found: dict[str, list[Setting]] = {}
    for mode, title in (("linear", "task arithmetic"), ("ties", "ties"), ("compose", "compose")):
        for strength in (0.5, 1.0):
            found[f"{title}, {strength:g} each"] = [(mode, (strength, strength))]
        found[f"{title}, strength chosen"] = [(mode, (strength, strength)) for strength in STRENGTHS]
    for mode in ("mean", "log-mean", "orthomerge"):
        found[mode] = [(mode, (0.5, 0.5))]
    for share in (0.25, 0.75):
        found[f"slerp, {1 - share:g} and {share:g}"] = [("slerp", (1 - share, share))]
    found["slerp, weights chosen"] = [("slerp", (1 - share, share)) for share in SHARES]
    return found


def chosen(trained: Sequence[Trained], held: Part, settings: Sequence[Setting]) -> Setting:
    """The setting that is best on the held-out images, over all seeds."""
    if len(settings) == 1:
        return settings[0]
    return max(settings, key=lambda setting: sum(judge(each.combined(*setting), held)[-1] for each in trained))


def table(seeds: int) -> None:
    train, held, judged = parts()
    print("| | digits 0-4 % | digits 5-9 % | all % | all %, `--restore-angles` |\n|---|---|---|---|---|")

    def show(title: str, models: Iterable[nn.Module], restored: Iterable[nn.Module] = ()) -> None:
        columns = [*zip(*(judge(model, judged) for model in models), strict=True)]
        turned = [judge(model, judged)[-1] for model in restored]
        cells = [f"{mean(column):.1f} ± {stdev(column):.1f}" for column in (*columns, turned) if column]
        print(f"| {' | '.join([title, *cells, *[''] * (4 - len(cells))])} |", flush=True)

    with tempfile.TemporaryDirectory() as work:
        trained = [Trained(Path(work) / str(seed), train, seed) for seed in range(seeds)]
        show("base", (each.base for each in trained))
        for name in ALL:
            show(f"adapter of {name}", (each.with_adapter(name) for each in trained))
        for title, settings in rows().items():
            mode, weights = chosen(trained, held, settings)
            if len(settings) > 1:
                title += f": {' and '.join(f'{weight:g}' for weight in dict.fromkeys(weights))}"
            models = (each.combined(mode, weights) for each in trained)
            turns = trained if mode in MEANS else ()
            show(title, models, (each.combined(mode, weights, restore=True) for each in turns))


def slide(model: nn.Module, judged: Part) -> tuple[list[Accuracies], list[Tensor]]:
    """At each strength of `GRID` the accuracies, and all singular values of the adapted weights over the base's."""
    accuracies, ratios = [], []
    before = {name: _singular(layer.fixed_linear.weight) for name, layer in adapter_layers(model).items()}
    for strength in GRID:
        ortho.set_strength(model, strength)
        accuracies.append(judge(model, judged))
        after = {name: _singular(layer.merged_weight()) for name, layer in adapter_layers(model).items()}
        ratios.append(torch.cat([after[name] / before[name] for name in before]))
    return accuracies, ratios


def _singular(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.detach().double())


def picture(path: Path) -> None:
    """The adapter of 0-4 slid from nothing to beyond itself, on the geodesic and by interpolating weights."""
    import matplotlib.pyplot as plt

    train, _, judged = parts()
    with tempfile.TemporaryDirectory() as work, plt.rc_context(STYLE):
        trained = Trained(Path(work) / "0", train, 0)
        canvas, axes = plt.subplots(1, 2, figsize=(7.6, 3.1), layout="constrained")
        left, right = axes
        for place, (name, line) in enumerate({"0-4": "-", "0-4-lora": (0, (4, 1.5))}.items()):
            accuracies, ratios = slide(trained.with_adapter(name), judged)
            drawn = {"color": color(place), "linestyle": line}
            for half in range(2):
                left.plot(GRID, [each[half] for each in accuracies], **drawn)
            low, high = ([float(end(each)) for each in ratios] for end in (torch.min, torch.max))
            right.fill_between(GRID, low, high, color=color(place), alpha=0.2, linewidth=0)
            right.plot(GRID, [float(each.mean()) for each in ratios], **drawn)
        left.set_title("Accuracy among all ten digits, %")
        left.set_ylim(0, 103)
        left.text(0.04, 84.5, "digits 0 to 4, which it learnt", fontsize=8.5)
        left.text(0.04, 62, "digits 5 to 9", fontsize=8.5)
        left.text(0.04, 14, "geodesic", color=color(0))
        left.text(0.04, 5, "linear", color=color(1))
        right.set_title("Singular values, over the base's")
        right.text(0.04, 1.02, "geodesic: kept", color=color(0))
        right.text(0.04, 1.40, "linear: shrunk in between,\nstretched beyond", color=color(1))
        right.text(0.04, 1.34, "mean, smallest and largest of all layers", color=INK["light"]["faint"], fontsize=8)
        for each in axes:
            each.margins(x=0.01)
            each.set_xticks([0, 0.5, 1, 1.5], ["0\nbase", "0.5", "1\nas trained", "1.5"])
            each.set_xlabel("strength")
            each.axvline(1, color=INK["light"]["grid"], linewidth=0.8, zorder=0)
        canvas.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="?", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table(given.seeds) if given.picture is None else picture(given.picture)


if __name__ == "__main__":
    main()
