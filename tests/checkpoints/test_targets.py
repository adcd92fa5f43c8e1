"""Patterns, values by layer, PEFT suffixes, and what each error says."""

from __future__ import annotations

import pytest
import sd15_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from language_model_shapes import deberta, llama
from sd15_shapes import Shapes, layers_of

from ortho_cli.checkpoints.layouts import component_name, from_canonical, to_canonical
from ortho_cli.checkpoints.targets import per_layer, select, suffixes
from ortho_cli.errors import TargetError, UsageError

LDM = layers_of(sd15_shapes.LDM)
UNET = layers_of(sd15_shapes.UNET)


class TestPatterns:
    def test_native_and_canonical_names_choose_the_same(self) -> None:
        native = select(["model.diffusion_model.input_blocks.1.1.**.attn1.*"], LDM, "sd15-ldm")
        canonical = select(["unet.down_blocks.0.attentions.0.**.attn1.*"], LDM, "sd15-ldm")
        assert native.layers == canonical.layers
        assert len(native.layers) == 3

    def test_a_union_in_file_order_with_a_count_for_each(self) -> None:
        selection = select(["attn2.to_v", "to_v", "attn1.to_q"], UNET, "sd15-unet")
        assert selection.counts == {"attn2.to_v": 16, "to_v": 32, "attn1.to_q": 16}
        assert list(selection.layers) == [n for n in UNET if n.endswith((".to_v", ".attn1.to_q"))]

    def test_exclusion(self) -> None:
        selection = select(["sd15-attention"], LDM, "sd15-ldm", exclude=["mid_block.**", "attn2.**"])
        assert selection.counts == {"sd15-attention": 15 * 4}
        assert not any("middle_block" in name or "attn2" in name for name in selection.layers)

    def test_nothing_is_silent(self) -> None:
        with pytest.raises(TargetError, match="pattern 'to_qq' matched 0 of 428 layers"):
            select(["to_q", "to_qq"], LDM, "sd15-ldm")
        with pytest.raises(TargetError, match="pattern 'to_qq' matched 0 of 428 layers"):
            select(["to_q"], LDM, "sd15-ldm", exclude=["to_qq"])
        with pytest.raises(TargetError, match=r"pattern 'attn1\.to_q' matched 16 of 428 layers, all of them excluded"):
            select(["to_v", "attn1.to_q"], LDM, "sd15-ldm", exclude=["to_q"])
        with pytest.raises(UsageError, match=r"has a '\{' without '\}'"):
            select(["to_{q"], LDM, "sd15-ldm")

    @pytest.mark.parametrize(
        ("pattern", "nearest"),
        [
            ("attn*.to_qq", "to_q, "),
            ("to_out.1", "to_out.0, "),
            ("**.atn2.**", "attn2, "),
            ("sd15-controll", "sd15-control; "),
            ("^conv_inn", "conv_in, "),
            ("TO_Q", None),
        ],
    )
    def test_the_hint_names_the_nearest(self, pattern: str, nearest: str | None) -> None:
        with pytest.raises(TargetError) as caught:
            select([pattern], LDM, "sd15-ldm")
        assert caught.value.message == f"pattern {pattern!r} matched 0 of 428 layers"
        listing = "list them with: ortho inspect CHECKPOINT --layers"
        assert caught.value.hint is not None and caught.value.hint.endswith(listing)
        assert caught.value.hint.startswith(f"nearest names: {nearest}" if nearest else listing)

    def test_from_the_root_in_either_naming(self) -> None:
        layers = {"conv1": (8, 3), "layer1.0.conv1": (8, 8), "fc": (2, 8)}
        assert select(["^conv1", "^{fc,x}"], layers, "plain").layers == ("conv1", "fc")
        assert select(["conv1"], layers, "plain", exclude=["^conv1"]).layers == ("layer1.0.conv1",)
        native = select(["^model.diffusion_model.middle_block.1.**.to_q"], LDM, "sd15-ldm").layers
        assert native == select(["^unet.mid_block.**.to_q"], LDM, "sd15-ldm").layers
        assert len(native) == 2

    def test_the_hint_says_what_matches_deeper(self) -> None:
        with pytest.raises(TargetError) as caught:
            select(["^to_q"], UNET, "sd15-unet")
        assert caught.value.message == f"pattern '^to_q' matched 0 of {len(UNET)} layers"
        first = next(name for name in UNET if name.endswith(".to_q"))
        expected = f"^ starts at the root; without it 32 match, first {first}; "
        assert caught.value.hint is not None and caught.value.hint.startswith(expected)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.sampled_from(sorted(LDM)), min_size=1, max_size=6, unique=True))
    def test_full_names_choose_themselves_in_either_naming(self, names: list[str]) -> None:
        expected = tuple(name for name in LDM if name in names)
        assert select(names, LDM, "sd15-ldm").layers == expected
        assert select([to_canonical(name, "sd15-ldm") for name in names], LDM, "sd15-ldm").layers == expected


class TestPerLayer:
    def test_the_last_match_wins(self) -> None:
        chosen = {name: LDM[name] for name in select(["sd15-attention"], LDM, "sd15-ldm").layers}
        ranks = per_layer(["8", "**.attn2.**=16", "up_blocks.**.attn2.to_q=4"], chosen, "sd15-ldm")
        assert list(ranks) == list(chosen)
        for name, rank in ranks.items():
            up = "output_blocks" in name and name.endswith("attn2.to_q")
            assert rank == (4 if up else 16 if "attn2" in name else 8)
        assert set(per_layer(["**.attn2.**=16", "8"], chosen, "sd15-ldm").values()) == {8}

    def test_layers_without_a_value_are_left_out(self) -> None:
        assert per_layer(["a=0.5"], {"x.a": (2, 2), "x.b": (2, 2)}, "plain", float) == {"x.a": 0.5}

    def test_a_preset_is_a_pattern_too(self) -> None:
        values = per_layer(["1", "sd15-control=0.5"], UNET, "sd15-unet", float)
        assert sum(value == 0.5 for value in values.values()) == 144

    def test_errors(self) -> None:
        layers = {"x.a": (2, 2)}
        with pytest.raises(TargetError, match="pattern 'b' matched 0 of 1 layers"):
            per_layer(["8", "b=4"], layers, "plain")
        for value, message in (
            ("x", "'x' is not a whole number"),
            ("1.5", "'1.5' is not a whole number"),
            ("a=x", "'x' in 'a=x' is not a whole number"),
            ("a=", "'' in 'a=' is not a whole number"),
        ):
            with pytest.raises(UsageError) as caught:
                per_layer([value], layers, "plain")
            assert caught.value.message == message
            assert caught.value.hint == "write VALUE for all layers, or 'PATTERN=VALUE' for some"
        with pytest.raises(UsageError, match="'x' is not a number"):
            per_layer(["x"], layers, "plain", float)


def peft_matches(suffix_list: list[str], name: str) -> bool:
    """PEFT's rule for a list of target modules."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffix_list)


class TestSuffixes:
    @pytest.mark.parametrize(
        ("preset", "layers", "expected"),
        [
            ("sd15-control", UNET, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]),
            ("sd15-attention", UNET, ["to_q", "to_k", "to_v", "to_out.0"]),
            ("llama-qv", llama(2), ["q_proj", "v_proj"]),
            ("deberta-all", deberta(2), ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"]),
        ],
    )
    def test_presets_become_the_lists_one_would_write(self, preset: str, layers: Shapes, expected: list[str]) -> None:
        layout = "sd15-unet" if layers is UNET else "plain"
        chosen = suffixes(select([preset], layers, layout).layers, layers)
        assert chosen is not None
        assert sorted(chosen) == sorted(expected)

    def test_none_where_names_are_no_longer(self) -> None:
        layers = list(llama(2))
        assert suffixes(["model.layers.0.self_attn.q_proj"], layers) is None
        one_block = [name for name in layers if ".layers.0." in name]
        assert suffixes(one_block, layers) is None
        assert suffixes(["fc"], ["fc", "head.fc"]) is None  # PEFT would take both

    def test_modules_that_hold_layers_are_not_meant(self) -> None:
        layers = ["a.0.output", "a.1.output", "b.output.dense"]
        assert suffixes(layers[:2], layers) is None

    def test_blocks_of_one_component_in_a_whole_model(self) -> None:
        up = [name for name in UNET if name.startswith("up_blocks") and name.endswith(".attn1.to_q")]
        chosen = suffixes(up, UNET)
        assert chosen is not None
        assert len(chosen) == 7  # only the up blocks have an `attentions.2`, so that one suffix serves three layers
        assert {name for name in UNET if peft_matches(chosen, name)} == set(up)
        assert suffixes([name for name in UNET if name.endswith(".attn1.to_q")], UNET) == ["attn1.to_q"]

    NAMES = st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), min_size=1, unique=True
    )

    @settings(deadline=None, max_examples=400)
    @given(NAMES, st.data())
    def test_what_peft_chooses_by_them_is_the_selection(self, names: list[str], data: st.DataObject) -> None:
        selected = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        chosen = suffixes(selected, names)
        if chosen is not None:
            assert len(chosen) < len(selected)
            modules = {name[:i] for name in names for i, char in enumerate(name) if char == "."} | set(names)
            assert {name for name in modules if peft_matches(chosen, name)} == set(selected)


def test_canonical_names_of_a_layout_go_back_to_the_component() -> None:
    # What add-hra does for `target_modules`: canonical, then the component's own names.
    chosen = select(["sd15-control"], LDM, "sd15-ldm").layers
    local = [component_name(to_canonical(name, "sd15-ldm"))[1] for name in chosen]
    unet = [from_canonical(to_canonical(name, "sd15-ldm"), "sd15-unet") for name in LDM]
    chosen_suffixes = suffixes(local, [name for name in unet if name is not None])
    assert chosen_suffixes is not None
    assert sorted(chosen_suffixes) == ["ff.net.0.proj", "to_k", "to_out.0", "to_q", "to_v"]
