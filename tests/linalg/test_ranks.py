"""Rank rules against the numbers of FNL's code, and against counting by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_shapes import cifar_resnet, resnet32x2, vgg19, wide_resnet28x10
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.linalg.budget import budget_ranks
from ortho_cli.linalg.ranks import LayerSize, energy_rank, error_rank, scale_for_parameters, scaled_rank

quick = settings(deadline=None, max_examples=100)

NETWORKS = {
    "vgg19-c10": vgg19(10), "vgg19-c100": vgg19(100), "vgg19-tiny": vgg19(200),
    "resnet32x2-c10": resnet32x2(10), "resnet32x2-c100": resnet32x2(100), "resnet32x2-tiny": resnet32x2(200),
    "wrn-28-10": wide_resnet28x10(),
}  # fmt: skip
PARAMETERS = [20_035_018, 20_081_188, 20_132_488, 7_427_914, 7_451_044, 7_476_744, 36_479_194]
# network, target, rank scale, parameters: measured in FNL's code
SEARCHES = [
    ("vgg19-c10", 0.02, 0.009277344, 397_642),
    ("vgg19-c10", 0.05, 0.023681641, 992_650),
    ("vgg19-c10", 0.1, 0.047607422, 1_996_618),
    ("vgg19-c100", 0.02, 0.008300781, 412_900),
    ("vgg19-c100", 0.05, 0.022705078, 1_008_868),
    ("vgg19-c100", 0.1, 0.046875, 2_013_220),
    ("vgg19-tiny", 0.02, 0.007080078, 410_440),
    ("vgg19-tiny", 0.05, 0.021484375, 1_005_448),
    ("vgg19-tiny", 0.1, 0.045898438, 2_011_144),
    ("resnet32x2-c10", 0.02, 0.008789062, 150_090),
    ("resnet32x2-c10", 0.05, 0.023925781, 373_194),
    ("resnet32x2-c10", 0.1, 0.047851562, 743_370),
    ("resnet32x2-c100", 0.02, 0.007324219, 154_404),
    ("resnet32x2-c100", 0.05, 0.021972656, 370_020),
    ("resnet32x2-c100", 0.1, 0.046875, 751_524),
    ("resnet32x2-tiny", 0.05, 0.020507812, 380_360),
    ("resnet32x2-tiny", 0.1, 0.045410156, 754_760),
    ("resnet32x2-tiny", 0.15, 0.069335938, 1_117_448),
    ("wrn-28-10", 0.01667, 0.007568359, 610_282),
    ("wrn-28-10", 0.06667, 0.031982422, 2_435_034),
]


def rounds_to(value: float, published: str) -> bool:
    return f"{value:.{len(published.split('.')[1])}f}" == published


def test_dense_counts() -> None:
    assert [net.parameters for net in NETWORKS.values()] == PARAMETERS
    c10 = [cifar_resnet(depth, 10).parameters for depth in (20, 32, 44, 56, 110)]
    assert c10 == [269_722, 464_154, 658_586, 853_018, 1_727_962]
    c100 = [cifar_resnet(depth, 100).parameters for depth in (20, 32, 44, 56, 110)]
    assert c100 == [275_572, 470_004, 664_436, 858_868, 1_733_812]


@pytest.mark.parametrize(("name", "target", "scale", "parameters"), SEARCHES)
def test_the_papers_search_is_repeated_and_beaten(name: str, target: float, scale: float, parameters: int) -> None:
    net = NETWORKS[name]
    repeated = scale_for_parameters(net.sizes(), net.others, target, compat="bisection")
    assert repeated.scale == pytest.approx(scale, abs=5e-10)
    assert repeated.parameters == parameters
    exact = scale_for_parameters(net.sizes(), net.others, target)
    assert abs(exact.parameters - target * net.parameters) <= abs(parameters - target * net.parameters)


def test_ranks_that_the_search_gives() -> None:
    def ranks(name: str, target: float) -> dict[tuple[int, int, int], int | None]:
        net = NETWORKS[name]
        found = scale_for_parameters(net.sizes(), net.others, target, compat="bisection").ranks
        return dict(zip(net.convolutions, found, strict=True))

    vgg = ranks("vgg19-c10", 0.1)
    assert [vgg[width, width, 3] for width in (64, 128, 256, 512)] == [9, 18, 37, 73]
    resnet = ranks("resnet32x2-c10", 0.1)
    assert [resnet[width, width, 3] for width in (64, 128, 256)] == [9, 18, 37]
    assert [resnet[128, 64, 1], resnet[256, 128, 1]] == [6, 12]
    shortcuts = (160, 16, 1), (320, 160, 1), (640, 320, 1)
    assert [ranks("wrn-28-10", 0.01667)[shape] for shape in shortcuts] == [1, 2, 5]
    assert [ranks("wrn-28-10", 0.06667)[shape] for shape in shortcuts] == [5, 10, 20]


@pytest.mark.parametrize(
    ("depth", "classes", "scales", "square"),
    [
        (20, 10, "0.0871 0.2367 0.6982 2.076 6.211 18.61", "3.153"),
        (32, 10, "0.0840 0.2313 0.6856 2.042 6.113 18.32", "3.085"),
        (56, 10, "0.0820 0.2279 0.6777 2.021 6.051 18.14", "3.042"),
        (110, 10, "0.0808 0.2258 0.6729 2.008 6.013 18.03", "3.016"),
        (32, 100, "0.0954 0.2409 0.6895 2.029 6.049 18.11", "3.059"),
    ],
)
def test_compression_of_cifar_resnets(depth: int, classes: int, scales: str, square: str) -> None:
    net = cifar_resnet(depth, classes)

    def ratio(scale: float, square: bool = False) -> float:
        sizes = net.sizes(square)
        return (net.others + sum(size.factored(scaled_rank(size, scale)) for size in sizes)) / net.parameters

    for scale, published in zip((0.037, 0.111, 0.333, 1.0, 3.0, 9.0), scales.split(), strict=True):
        assert rounds_to(ratio(scale), published)
    assert rounds_to(ratio(1.0, square=True), square)


@pytest.mark.parametrize(
    ("scale", "ranks"), [(0.037, [2, 4, 7]), (0.111, [5, 11, 21]), (0.333, [16, 32, 64]), (1.0, [48, 96, 192]),
                         (3.0, [144, 288, 576])],
)  # fmt: skip
def test_ranks_of_cifar_resnets_by_stage(scale: float, ranks: list[int]) -> None:
    assert [scaled_rank(LayerSize(3 * width, 3 * width, True), scale) for width in (16, 32, 64)] == ranks


def test_transformer_small_counts() -> None:
    """FNL's translation model: feed-forward layers, embeddings, positions and the output layer, heads by floor."""

    def count(scale: float | None) -> int:
        def matrix(rows: int, cols: int) -> int:
            size = LayerSize(rows, cols)
            return size.dense if scale is None else size.factored(scaled_rank(size, scale))

        head = 256 if scale is None else int(scale * 256 / 4) * 4
        attention = 4 * 256 * head
        feed_forward = matrix(1024, 256) + matrix(256, 1024)
        norm = 2 * 256
        encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
        ends = 2 * (matrix(10_000, 256) + matrix(1024, 256)) + matrix(10_000, 256) + 10_000
        return ends + 2 * encoder + 2 * decoder + 2 * norm

    assert count(None) == 11_890_448
    assert count(0.5) == 6_379_280
    assert count(0.25) == 3_197_712


@quick
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 300),
    st.floats(0.01, 1),
)
def test_no_scale_comes_nearer_than_the_exact_search(
    shapes: list[tuple[int, int, bool, bool]], others: int, target: float
) -> None:
    layers = [LayerSize(rows, cols, conv, square=square) for rows, cols, conv, square in shapes]
    total = others + sum(size.dense for size in layers)

    def parameters(scale: float) -> int:
        ranks = [scaled_rank(size, scale) for size in layers]
        return others + sum(min(size.factored(r), size.dense) for size, r in zip(layers, ranks, strict=True))

    if parameters(0) > target * total:
        with pytest.raises(UsageError, match="cannot be reached"):
            scale_for_parameters(layers, others, target)
        return
    found = scale_for_parameters(layers, others, target)
    assert found.parameters == parameters(found.scale)
    best = min(abs(parameters(step / 1000) - target * total) for step in range(1001))
    assert abs(found.parameters - target * total) <= best
    for size, rank in zip(layers, found.ranks, strict=True):
        assert rank is None or size.factored(rank) < size.dense


@quick
@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(1, 3))
def test_the_saving_rank_is_the_last_that_saves(rows: int, cols: int, square: bool, batch: int) -> None:
    size = LayerSize(rows, cols, square=square, batch=batch)
    saving = [rank for rank in range(1, 62) if size.factored(rank) < size.dense]
    assert size.saving_rank == max(saving, default=0)


@quick
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.001, 1))
def test_energy_and_error_take_the_fewest_components(values: list[float], share: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = spectrum.square().sum()

    def lost(rank: int) -> float:
        return float(spectrum[rank:].square().sum())

    rank = energy_rank(spectrum, share)
    assert lost(rank) <= (1 - share) * total * (1 + 1e-12)
    assert rank == 1 or lost(rank - 1) > (1 - share) * total * (1 - 1e-12)
    rank = error_rank(spectrum, 1 - share)
    assert lost(rank) <= (1 - share) ** 2 * total * (1 + 1e-12)
    assert rank == 1 or lost(rank - 1) > (1 - share) ** 2 * total * (1 - 1e-12)


def test_all_energy_is_told_from_almost_all() -> None:
    spectrum = torch.tensor([1.0, 1e-7, 0.0], dtype=torch.float64)
    assert energy_rank(spectrum, 1.0) == 2 and error_rank(spectrum, 0.0) == 2
    assert error_rank(spectrum, 1.1e-7) == 1
    assert energy_rank(torch.zeros(3), 0.5) == 1


def test_matrices_that_share_a_rank_share_the_count() -> None:
    assert energy_rank(torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), 0.9) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: energy_rank(torch.ones(2), 0.0),
        lambda: energy_rank(torch.ones(2), 1.5),
        lambda: error_rank(torch.ones(2), 1.0),
        lambda: scale_for_parameters([LayerSize(4, 4)], 0, 0.0),
        lambda: scale_for_parameters([], 10, 0.5),
        lambda: budget_ranks([torch.ones(2)], [4], [100], 3),
    ],
)
def test_what_cannot_be_met_is_refused(call: object) -> None:
    with pytest.raises(UsageError):
        call()  # type: ignore[operator]


def total_error(spectra: list[Tensor], ranks: list[int | None]) -> float:
    return sum(float(s[r:].square().sum()) for s, r in zip(spectra, ranks, strict=True) if r is not None)


def cost(ranks: list[int | None], per_rank: list[int], dense: list[int]) -> int:
    return sum(d if r is None else c * r for r, c, d in zip(ranks, per_rank, dense, strict=True))


spectra_lists = st.lists(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(
        lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    ),
    min_size=1,
    max_size=3,
)


def best_by_trial(spectra: list[Tensor], per_rank: list[int], dense: list[int], budget: float) -> float:
    choices = [[*range(1, len(s) + 1), None] for s in spectra]
    allowed = [r for r in itertools.product(*choices) if cost(list(r), per_rank, dense) <= budget]
    return min(total_error(spectra, list(ranks)) for ranks in allowed)


@quick
@given(spectra_lists, st.integers(1, 20), st.data())
def test_a_budget_of_equal_costs_is_spent_optimally(spectra: list[Tensor], price: int, data: st.DataObject) -> None:
    per_rank, dense = [price] * len(spectra), [100 * price] * len(spectra)
    budget = data.draw(st.integers(price * len(spectra), price * 20))
    ranks = budget_ranks(spectra, per_rank, dense, budget)
    assert cost(ranks, per_rank, dense) <= budget
    assert total_error(spectra, ranks) == pytest.approx(best_by_trial(spectra, per_rank, dense, budget), abs=1e-9)


@quick
@given(spectra_lists, st.data())
def test_a_budget_is_kept_and_spent_to_within_one_step(spectra: list[Tensor], data: st.DataObject) -> None:
    per_rank = [data.draw(st.integers(1, 9)) for _ in spectra]
    dense = [data.draw(st.integers(1, 60)) for _ in spectra]
    least = sum(map(min, per_rank, dense))
    budget = data.draw(st.integers(least, least + 60))
    ranks = budget_ranks(spectra, per_rank, dense, budget)
    spent = cost(ranks, per_rank, dense)
    assert spent <= budget
    for index, (rank, spectrum) in enumerate(zip(ranks, spectra, strict=True)):
        if rank is None:
            continue
        assert per_rank[index] * rank < dense[index]  # a layer whose factors save nothing stays dense
        if rank < len(spectrum):  # and what is left buys no further step
            onward = min(per_rank[index], dense[index] - per_rank[index] * rank)
            assert onward > budget - spent
    # One step more than the budget would reach the relaxed optimum, which no choice beats.
    largest = max(max([float(s[0].square()), float(s[1:].square().sum())]) for s in spectra)
    assert total_error(spectra, ranks) <= best_by_trial(spectra, per_rank, dense, budget) + largest + 1e-9


def test_a_budget_of_everything_leaves_everything_dense_that_is_full() -> None:
    flat = torch.ones(8)
    assert budget_ranks([flat, flat], [16, 16], [64, 64], 128) == [None, None]
    assert budget_ranks([flat, flat], [16, 16], [64, 64], 96) == [None, 2]


def test_components_without_energy_are_not_bought() -> None:
    assert budget_ranks([torch.tensor([2.0, 1.0, 0.0, 0.0])], [2], [100], 100) == [2]


def test_a_budget_beats_one_scale_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = [
        torch.linspace(1, 2, 96).pow(-power).double() * 10 * torch.rand(1, generator=generator).double()
        for power in (0.5, 3.0, 8.0, 1.0)
    ]
    sizes = [LayerSize(96, cols) for cols in (96, 192, 384, 768)]
    per_rank, dense = [96 + size.cols for size in sizes], [size.dense for size in sizes]
    for scale in (0.1, 0.3, 0.5):
        uniform: list[int | None] = [scaled_rank(size, scale) for size in sizes]
        chosen = budget_ranks(spectra, per_rank, dense, cost(uniform, per_rank, dense))
        assert total_error(spectra, chosen) < total_error(spectra, uniform)
