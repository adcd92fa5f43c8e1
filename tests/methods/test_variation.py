"""`vp`: the generator's gradient, the classifier's own learning, several processes as one."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli.errors import TargetError
from ortho_cli.methods import variation
from ortho_cli.methods.method import Context
from ortho_cli.methods.variation import VPMethod, moved_codes, variation_classifier
from ortho_cli.models.gan_simple import SimpleGenerator
from ortho_cli.recipe.methods_gan import VP

CONTEXT = Context(0, 10, "gan", None)
WORLD = 2


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = SimpleGenerator(5, 1, [8, 4, 4])
        self.discriminator = nn.Conv2d(1, 1, 1)


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


def prepared(model: nn.Module, penalty: float = 0.5) -> VPMethod:
    method = VPMethod(VP(name="vp", penalty=penalty))
    method.prepare(model, CONTEXT)
    return method


def outputs(first: int = 0, count: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    noise, drawn = torch.randn(8, 5, generator=generator), torch.rand(8, 2, generator=generator, dtype=torch.float64)
    return {"noise": noise[first : first + count], "uniform": lambda columns: drawn[first : first + count, :columns]}


def test_the_release_s_classifier_at_128_pixels_and_one_for_every_other_side() -> None:
    released = variation_classifier(3, 128, 30, 4)
    assert sum(each.numel() for each in released.parameters()) == 196 + 4 * 264 + 1040 + 510
    assert sum(isinstance(each, nn.Conv2d) for each in released) == 5
    for side in (8, 16, 64, 128):
        assert variation_classifier(1, side, 6, 4)(torch.zeros(2, 1, side, side)).shape == (2, 6)


def test_one_coordinate_moves_by_a_normal_amount() -> None:
    code = torch.randn(4000, 6)
    moved, which = moved_codes(code, torch.rand(4000, 2, dtype=torch.float64), 4)
    change = moved - code
    assert int((change != 0).sum()) == 4000
    assert torch.equal(change.abs().argmax(1), which)
    assert torch.bincount(which).tolist() == pytest.approx([1000] * 4, rel=0.15)
    assert float(change.sum(1).std()) == pytest.approx(1, rel=0.1)


def test_the_generator_gets_the_weighted_gradient_and_the_classifier_the_whole_of_its_own() -> None:
    """As the release has it, but for the penalty's weight, which is no part of what the classifier learns."""
    model, given = pair(), outputs()
    method = prepared(model, 0.01)
    reference = prepared(model).classifier  # the same start: the context's seed decides it
    value = method.penalty(model, {}, given, "generator")
    assert value is not None
    value.backward()
    found = [each.grad.clone() for each in model.generator.parameters() if each.grad is not None]
    assert all(each.grad is None for each in method.classifier.parameters())
    model.zero_grad()
    moved, which = moved_codes(given["noise"], given["uniform"](2), 5)
    logits = reference(model.generator(given["noise"]) - model.generator(moved))
    loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(which, 5).float())
    loss.backward()
    for mine, theirs in zip(found, model.generator.parameters(), strict=True):
        assert torch.allclose(mine, 0.01 * theirs.grad, rtol=1e-4, atol=1e-9)
    rate = torch.optim.SGD(model.generator.parameters(), 3e-3)
    adam = torch.optim.Adam(reference.parameters(), 3e-3, betas=(0.5, 0.999))
    adam.step()
    method.after_step(model, rate, 0, "discriminator")
    method.after_step(model, rate, 0, "generator")
    for mine, theirs in zip(method.classifier.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert method.scalars() == {"accuracy": float((logits.argmax(1) == which).float().mean())}
    assert method.penalty(model, {}, given, "discriminator") is None


def test_parts_of_a_batch_and_the_whole_teach_the_same() -> None:
    model = pair()
    whole, parts = prepared(model), prepared(model)
    rate = torch.optim.SGD(model.generator.parameters(), 1e-2)
    whole.penalty(model, {}, outputs(), "generator")
    for first, count in ((0, 5), (5, 3)):
        parts.penalty(model, {}, outputs(first, count), "generator")
    for method in (whole, parts):
        method.after_step(model, rate, 0, "generator")
    for mine, theirs in zip(whole.classifier.parameters(), parts.classifier.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_it_learns_to_tell_coordinates_that_can_be_told() -> None:
    class Corners(nn.Module):
        latents, noise_dim = ("a", "b", "c", "d"), 4

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, code: Tensor) -> Tensor:
            return self.gain * code.view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)

    model = nn.Module()
    model.generator = Corners()
    method = prepared(model)
    rate = torch.optim.SGD(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    told = []
    for step in range(120):
        drawn = torch.rand(64, 2, generator=generator, dtype=torch.float64)
        given = {"noise": torch.zeros(64, 4), "uniform": lambda columns, drawn=drawn: drawn}
        method.penalty(model, {}, given, "generator")
        method.after_step(model, rate, step, "generator")
        told.append(method.scalars()["accuracy"])
    assert told[0] < 0.6
    assert min(told[-5:]) > 0.75


def test_what_has_no_generator_is_refused() -> None:
    with pytest.raises(TargetError, match="task classify has none"):
        VPMethod(VP(name="vp")).prepare(nn.Linear(2, 2), Context(0, 1, "classify", None))


def test_its_state_goes_round_bit_for_bit() -> None:
    model = pair()
    first, second = prepared(model), prepared(model)
    rate = torch.optim.SGD(model.generator.parameters(), 1e-2)

    def learn(method: VPMethod, times: int) -> None:
        for _ in range(times):
            method.penalty(model, {}, outputs(), "generator")
            method.after_step(model, rate, 0, "generator")

    learn(first, 2)
    second.load_state({"tensors": {name: value.clone() for name, value in first.state()["tensors"].items()}})
    for method in (first, second):
        learn(method, 2)
    mine, theirs = first.state()["tensors"], second.state()["tensors"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert sum(name.endswith("exp_avg_sq") for name in mine) == len(list(first.classifier.parameters()))
    fresh = prepared(model)
    fresh.load_state({"tensors": {}})  # a published run has no optimizer's file
    assert not any(name.startswith("adam/") for name in fresh.state()["tensors"])


def taught(rank: int, world: int) -> dict[str, Tensor]:
    model = pair()
    method = prepared(model)
    rate = torch.optim.SGD(model.generator.parameters(), 1e-2)
    for step in range(3):
        method.penalty(model, {}, outputs(rank * 8 // world, 8 // world), "generator")
        method.after_step(model, rate, step, "generator")
    return {**method.classifier.state_dict(), "accuracy": torch.tensor(method.scalars()["accuracy"])}


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(taught(rank, WORLD), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_teach_as_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    expected = taught(0, 1)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=1e-5), key


def test_examples_run() -> None:
    found = doctest.testmod(variation)
    assert found.attempted > 0
    assert found.failed == 0
