"""Keys of rank_pattern and alpha_pattern: PEFT's meaning for what PEFT users write, a refusal for what could hang."""

from __future__ import annotations

import re
import time

import pytest

from ortho_cli.checkpoints.dialects.layer_patterns import compiled, is_plain, names_end
from ortho_cli.checkpoints.dialects.peft_config import layer_value
from ortho_cli.errors import CheckpointError

LAYERS = [
    "q", "layers.0.q", "layers.10.attn.to_q", "layersX0Xq", "blocks.1.attn.to_k", "my_q", "", "a.layers.0.q",
    "layers.0.attn.to_out.0",
]  # fmt: skip
KEYS = [
    "q", "layers.0.q", "layers.0", ".*q", r"layers\.\d+\.q", "^layers.0.q$", "attn.*to_(q|k)",
    "(layers.0|a.layers.0).q", "layers.[0-9]+.attn.*", "(?:q|to_q)", ".*?to_[qk]", "layers.\\d{1,2}.+", "q|my_q",
    "to_out.0", ".", "..q",
    "((layers|blocks).\\d.q|x)", r"\w+_q?",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_as_peft_matches(key: str) -> None:
    for layer in LAYERS:
        wanted = 7 if re.match(rf"(.*\.)?({key})$", layer) else 3
        assert layer_value({"rank_pattern": {key: 7}}, "rank_pattern", layer, 3, "") == wanted, layer


@pytest.mark.parametrize(
    "key",
    [
        "(a|aa)+$", "(a+)+b", "(a*)*", "(?:a|a){1,30}b", "a?" * 30 + "b", "(a|a)" * 30 + "b", ".*.*.*.*.*x",
        "a*" * 9 + "b", "a{0,20}" * 9 + "b", "a" * 501 + "*", r"(a)\1", "(?=a)", "(?i)a", "a++", "a{99999999999}", "*a",
        "[", "(", ")",
        "a)(", "a|a)(a|a", "a{3,1}b", "[z-a]", "(?P<x>a)", "a*??", "a\\Z",
    ],
)  # fmt: skip
def test_what_could_hang_is_refused_at_once(key: str) -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="alpha_pattern: ") as caught:
        layer_value({"alpha_pattern": {key: 7}}, "alpha_pattern", "a" * 120, 3, "adapter_config.json")
    assert printable_start(key) in str(caught.value)
    assert caught.value.exit_code == 4
    assert time.perf_counter() - started < 1


def printable_start(key: str) -> str:
    return repr(key[:80])


def test_long_names_and_many_keys_are_refused() -> None:
    with pytest.raises(CheckpointError, match="too long to be matched"):
        compiled(".*q", "rank_pattern", "a" * 513, "")
    many = {f"x.*{number}": 1 for number in range(65)}
    with pytest.raises(CheckpointError, match="rank_pattern holds over 64 regular expressions"):
        layer_value({"rank_pattern": many}, "rank_pattern", "q", 3, "")
    plain = {f"layers.{number}.q": number for number in range(5000)}
    assert layer_value({"rank_pattern": plain}, "rank_pattern", "m.layers.4999.q", 3, "") == 4999


def test_what_is_allowed_is_quick() -> None:
    """The worst that the limit lets through."""
    started = time.perf_counter()
    for key in (".*.*.*x", ".*.*" + "b?" * 4 + "x", "a?" * 17 + "x"):
        assert compiled(key, "rank_pattern", "a." * 50, "").match("a." * 50) is None
    assert time.perf_counter() - started < 1


def test_plain_keys() -> None:
    assert is_plain("model.layers.0.self-attn.q_proj") and not is_plain("q.*") and not is_plain("")
    assert names_end("a.q", "a.q") and names_end("b.a.q", "a.q") and not names_end("ba.q", "a.q")
