"""Which checkpoints make a series, in which order; which layers they share, however each of them stores these."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ortho_cli.checkpoints.factored import factored_config
from ortho_cli.checkpoints.hub_series import open_revisions
from ortho_cli.checkpoints.series import open_entry, open_series, step_in_name
from ortho_cli.checkpoints.series_layers import read_flat, series_layers
from ortho_cli.errors import CheckpointError, TargetError, UsageError
from ortho_cli.linalg.matricize import Matricization

Save = Callable[..., Path]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = {"fc.weight": gaussian(4, 3)}


def steps(sources: list[object]) -> list[int | None]:
    return [entry.step for entry in open_series([str(source) for source in sources])]


def test_numbers_in_names_are_numbers(tmp_path: Path, save: Save) -> None:
    for name in ("epoch_4", "epoch_124", "epoch_9"):
        save(tmp_path / f"net-v2-{name}.safetensors", WEIGHT)
    torch.save(WEIGHT, tmp_path / "epoch_60.pt")
    (tmp_path / "log.txt").write_text("not weights")
    (tmp_path / "figures").mkdir()
    assert steps([tmp_path]) == [4, 9, 60, 124]
    assert steps([tmp_path / "*epoch_?.safetensors"]) == [4, 9]
    assert steps([tmp_path / "epoch_60.pt", tmp_path / "net-v2-epoch_4.safetensors"]) == [4, 60]


def test_a_run_is_its_saved_states(tmp_path: Path, save: Save) -> None:
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        save(folder / "model.safetensors", WEIGHT)
        save(folder / "optimizer.safetensors", {"moment": gaussian(2, 2)})
        (folder / "state.json").write_text(json.dumps({"step": 7 * step}))
    save(tmp_path / "checkpoints" / "best" / "model.safetensors", WEIGHT)
    assert steps([tmp_path]) == [35, 70]
    assert [list(entry.checkpoint.tensors) for entry in open_series([str(tmp_path)])] == [["fc.weight"]] * 2
    assert [entry.name for entry in open_series([str(tmp_path)])] == ["step-000005", "step-000010"]
    assert steps([tmp_path / "checkpoints" / "step-*" / "model.safetensors"]) == [35, 70]


def test_folders_of_other_trainers(tmp_path: Path, save: Save) -> None:
    for step in (500, 1000):
        save(tmp_path / f"checkpoint-{step}" / "model.safetensors", WEIGHT)
        save(tmp_path / f"checkpoint-{step}" / "other.safetensors", WEIGHT)
    save(tmp_path / "checkpoint-20" / "anything.safetensors", WEIGHT)
    assert steps([tmp_path]) == [20, 500, 1000]


def test_refusals(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a" / "final.safetensors", WEIGHT)
    save(tmp_path / "b" / "step3.safetensors", WEIGHT)
    save(tmp_path / "c" / "step-3.safetensors", WEIGHT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no number in its name"):
        steps([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UsageError, match=r"step-3\.safetensors and step3\.safetensors are both of step 3"):
        steps([tmp_path / "b", tmp_path / "c"])
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        steps([tmp_path / "empty"])
    with pytest.raises(CheckpointError, match="nothing matches"):
        steps([tmp_path / "none-*"])
    (tmp_path / "b" / "step5.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        steps([tmp_path / "b"])


def entries(tmp_path: Path, save: Save, *checkpoints: dict[str, Tensor]) -> list[Any]:
    checkpoints = tuple({name: x.contiguous() for name, x in tensors.items()} for tensors in checkpoints)
    return [open_entry(save(tmp_path / f"step{n}.safetensors", tensors)) for n, tensors in enumerate(checkpoints)]


def test_what_is_looked_up_is_opt_in(tmp_path: Path, save: Save) -> None:
    model = {
        "blocks.10.attn.qkv.weight": gaussian(12, 4),
        "blocks.2.attn.in_proj_weight": gaussian(12, 4, seed=1),
        "blocks.2.attn.in_proj_bias": gaussian(12),
        "cls_token": gaussian(1, 1, 4),
        "conv1.weight": gaussian(6, 3, 2, 2),
        "embed_tokens.weight": gaussian(9, 4),
        "head.weight": gaussian(5, 4),
        "ids": torch.zeros(2, 2, dtype=torch.int64),
        "pos_embed": gaussian(1, 7, 4),
    }
    series = entries(tmp_path, save, model, model)
    chosen = series_layers(series).layers
    assert [(layer.name, layer.kind) for layer in chosen] == [
        ("conv1", "conv"), ("blocks.2.attn.in_proj", "linear"), ("blocks.10.attn.qkv", "linear"), ("head", "linear"),
    ]  # fmt: skip
    named = series_layers(series, ["pos_embed", "cls_token", "embed_tokens"]).layers
    assert {layer.name: layer.kind for layer in named} == {
        "pos_embed": "position", "cls_token": "row", "embed_tokens": "embedding",
    }  # fmt: skip
    assert [layer.name for layer in series_layers(series, ["blocks.**"], ["*.qkv"]).layers] == ["blocks.2.attn.in_proj"]
    with pytest.raises(TargetError, match="matched 0 of"):
        series_layers(series, ["nothing"])
    with pytest.raises(TargetError, match="no layers with a basis"):
        series_layers(entries(tmp_path, save, {"embed.weight": gaussian(9, 4)}))


def test_tied_weights_are_measured_once(tmp_path: Path, save: Save) -> None:
    shared, other, twice = gaussian(9, 4), gaussian(9, 4, seed=1), gaussian(6, 6, seed=2)

    def model(step: int) -> dict[str, Tensor]:
        return {
            "wte.weight": shared + step, "lm_head.weight": shared + step, "free.weight": other + step,
            "a.weight": twice + step, "b.weight": twice + step, "zero.weight": torch.zeros(9, 4),
            "nil.weight": torch.zeros(9, 4),
        }  # fmt: skip

    series = entries(tmp_path, save, model(0), model(1))
    found = series_layers(series)
    assert {layer.name for layer in found.layers} == {"free", "a", "zero", "nil"}  # the head is the embedding
    assert found.notes == ("b is a: measured once",)
    assert [layer.name for layer in series_layers(series, ["lm_head"]).layers] == ["lm_head"]
    parted = {**model(1), "b.weight": gaussian(6, 6, seed=3)}
    assert {x.name for x in series_layers(entries(tmp_path, save, model(0), parted)).layers} >= {"a", "b"}


def test_factors_stand_for_their_product(tmp_path: Path, save: Save) -> None:
    """What OIALR leaves on the way (`U M VT`, no table), FNL's factors with their table, and a weight: one layer."""
    weight, conv = gaussian(6, 8), gaussian(6, 4, 3, 3)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    flat = torch.linalg.svd(conv.reshape(6, 36), full_matrices=False)
    dense = {"fc.weight": weight, "conv.weight": conv}
    cored = {
        "fc.U": u, "fc.M": torch.diag(s), "fc.VT": vt, "conv.U": flat.U, "conv.M": torch.diag(flat.S),
        "conv.VT": flat.Vh,
    }  # fmt: skip
    view = Matricization("conv", (6, 4, 3, 3))
    tall = torch.linalg.svd(view.to_matrix(conv), full_matrices=False)
    save(
        tmp_path / "step2.safetensors",
        {"fc.U": (u * s).contiguous(), "fc.VT": vt.contiguous(), "conv.U": (tall.U * tall.S).contiguous(),
         "conv.VT": tall.Vh.contiguous()},
        **{"ortho.method": json.dumps(factored_config({
            "fc": (Matricization("linear", (6, 8)), 6), "conv": (view, len(tall.S)),
        }))},
    )  # fmt: skip
    series = [*entries(tmp_path, save, dense, cored), open_entry(tmp_path / "step2.safetensors")]
    found = {layer.name: layer for layer in series_layers(series).layers}
    assert found["conv"].shape == (6, 4, 3, 3) and set(found) == {"fc", "conv"}
    for place, entry in enumerate(series):
        assert torch.allclose(read_flat(found["fc"], place, entry), weight, atol=1e-5)
        assert torch.allclose(read_flat(found["conv"], place, entry), conv.reshape(6, 36), atol=1e-5)


def test_groups_and_factors_alone(tmp_path: Path, save: Save) -> None:
    view = Matricization("conv", (8, 2, 3, 3), groups=2, row_axes=0)
    conv = gaussian(8, 2, 3, 3)
    u, s, vt = torch.linalg.svd(view.to_matrix(conv), full_matrices=False)
    stacked = view.stack(u, vt)
    cored = {"c.U": stacked[0], "c.M": torch.diag_embed(s).reshape(-1, s.shape[-1]), "c.VT": stacked[1]}
    series = entries(tmp_path, save, {"c.weight": conv}, cored)
    (layer,) = series_layers(series).layers
    assert torch.allclose(read_flat(layer, 1, series[1]), conv.reshape(8, 18), atol=1e-5)
    alone = {"fc.U": gaussian(6, 2), "fc.VT": gaussian(2, 5)}
    series = entries(tmp_path, save, alone)
    (layer,) = series_layers(series).layers
    assert torch.allclose(read_flat(layer, 0, series[0]), alone["fc.U"] @ alone["fc.VT"], atol=1e-6)


def test_square_factors_are_turned_as_the_model_is(tmp_path: Path, save: Save) -> None:
    """GPT-2's square projection is a Conv1D, by its name; a transposed convolution, by those beside it."""
    conv1d = {"h.0.attn.c_attn": gaussian(6, 18), "h.0.attn.c_proj": gaussian(6, 6)}
    up = {"up.0": gaussian(4, 5, 2, 2), "up.1": gaussian(5, 5, 2, 2)}
    plain = {"conv.0": gaussian(4, 5, 2, 2, seed=1), "conv.1": gaussian(5, 5, 2, 2, seed=1), "q": gaussian(6, 6)}
    dense, cored = {"h.0.attn.c_attn.bias": gaussian(18)}, {}
    kinds = {"h": "conv1d", "up": "transposed", "conv": "conv", "q": "linear"}
    for name, weight in {**conv1d, **up, **plain}.items():
        view = Matricization(kinds[name.partition(".")[0]], tuple(weight.shape))
        dense[f"{name}.weight"] = weight
        u, s, cored[f"{name}.VT"] = torch.linalg.svd(view.to_matrix(weight), full_matrices=False)
        cored[f"{name}.U"] = u * s
    series = entries(tmp_path, save, dense, cored)
    for layer in series_layers(series).layers:
        weight = dense[f"{layer.name}.weight"]
        assert torch.allclose(read_flat(layer, 1, series[1]), weight.reshape(layer.flat_shape), atol=1e-5), layer.name


def test_weights_that_are_no_plain_floats_are_named(tmp_path: Path, save: Save) -> None:
    model = {
        "a.weight": gaussian(4, 4).to(torch.float8_e4m3fn), "b.weight": gaussian(4, 4).to(torch.float8_e4m3fn),
        "ids": torch.zeros(2, 2, dtype=torch.int64), "c.weight": gaussian(4, 4), "d.qweight": torch.ones(4, 2).int(),
    }  # fmt: skip
    assert series_layers(entries(tmp_path, save, model, model)).notes == (
        "2 weights stored as F8_E4M3, first a.weight: not measured, dequantise them first",
        "1 weight stored as I32, first d.qweight: not measured, dequantise them first",
    )


def test_what_cannot_be_compared_is_named(tmp_path: Path, save: Save) -> None:
    first = {"head.weight": gaussian(5, 4), "fc.weight": gaussian(4, 4), "odd.weight": gaussian(6, 6)}
    second = {
        "head.weight": gaussian(7, 4),
        "new.weight": gaussian(4, 4),
        "odd.U": gaussian(9, 2),
        "odd.VT": gaussian(2, 6),
    }
    found = series_layers(entries(tmp_path, save, first, second))
    assert [layer.name for layer in found.layers] == ["fc", "new"]
    assert [[stored is not None for stored in layer.stored] for layer in found.layers] == [[True, False], [False, True]]
    assert found.notes == (
        "head is left out: its shape changes, (5, 4) and (7, 4)",
        "odd is left out: its factors (9, 2) and (2, 6) are not those of a weight (6, 6)",
    )


def test_revisions_of_the_cache(hub_home: Path, save: Save) -> None:
    model = hub_home / "models--org--name"
    for number, name in enumerate(("step1000", "step20", "main", "step3-ema")):
        commit = f"{number:040x}"
        save(model / "snapshots" / commit / "model.safetensors", {"fc.weight": gaussian(4, 3, seed=number)})
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    found = open_revisions("org/name", "step*")
    assert [(entry.step, entry.name) for entry in found] == [(3, "step3-ema"), (20, "step20"), (1000, "step1000")]
    assert torch.equal(found[1].read(found[1].checkpoint.tensors["fc.weight"]), gaussian(4, 3, seed=1))
    with pytest.raises(CheckpointError, match="holds 4 revisions of org/name, none of which fits epoch"):
        open_revisions("org/name", "epoch*")
    with pytest.raises(CheckpointError, match="holds 0 revisions of org/none"):
        open_revisions("org/none", "*")
    with pytest.raises(UsageError, match="revision main has no number"):
        open_revisions("org/name", "*")
    for source in ("folder", "org/name@main"):
        with pytest.raises(UsageError, match="asks for a repository"):
            open_revisions(source, "*")


def test_revisions_are_ordered_by_their_steps(hub_home: Path, save: Save) -> None:
    """As OLMo names them: with the tokens behind the steps, and in stages that begin anew."""
    model = hub_home / "models--org--name"
    names = ("step1000-tokens4B", "step500-tokens20B", "stage1-step7-tokens1B", "stage2-step7-tokens1B", "step-07")
    for number, name in enumerate(names):
        commit = f"{number:040x}"
        save(model / "snapshots" / commit / "model.safetensors", WEIGHT)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    assert [entry.step for entry in open_revisions("org/name", "step?*-tokens*")] == [500, 1000]
    with pytest.raises(UsageError, match="stage1-step7-tokens1B and stage2-step7-tokens1B are both of step 7"):
        open_revisions("org/name", "stage*")
    steps = {"epoch_3-step_20": 20, "iter_0001000-v2": 1000, "multistep2-ep50": 50, "checkpoint-30-ema2": 30}
    assert {name: step_in_name(name) for name in steps} == steps


class Hub(ThreadingHTTPServer):
    """As much of the hub as a series asks for: branches, lists of files, ranges of bytes; and what was asked."""

    def __init__(self, revisions: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits = {f"{number:040x}": name for number, name in enumerate(revisions, 1)}
        self.revisions, self.ranges = revisions, list[tuple[int, int]]()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if path.endswith("/refs"):
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for c, n in hub.commits.items()]
            return self.answer(200, json.dumps({"branches": refs, "converts": [], "tags": []}).encode())
        if match := re.fullmatch(r"/api/models/org/name/tree/(\w+)", path):
            size = hub.revisions[hub.commits[match[1]]].stat().st_size
            listed = [{"type": "file", "path": "model.safetensors", "size": size, "oid": "0" * 40}]
            return self.answer(200, json.dumps(listed).encode())
        if match := re.fullmatch(r"/api/models/org/name/revision/(\w+)", path):
            content = {"id": "org/name", "sha": match[1], "siblings": [], "private": False, "downloads": 0, "tags": []}
            return self.answer(200, json.dumps(content).encode())
        match = re.fullmatch(r"/org/name/resolve/(\w+)/model\.safetensors", path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or asked is None:
            return self.answer(404, b"{}")
        data = hub.revisions[hub.commits[match[1]]].read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        hub.ranges.append((first, last))
        return self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")


@pytest.fixture
def hub(tmp_path: Path, save: Save) -> Iterator[Hub]:
    revisions = {}
    for step in (0, 10, 200):
        tensors = {
            "q_proj.weight": gaussian(40, 30) + 0.01 * step,
            "embed_tokens.weight": gaussian(9000, 30, seed=step),
        }
        revisions[f"step{step}"] = save(tmp_path / "hub" / f"{step}.safetensors", tensors)
    server = Hub({**revisions, "main": revisions["step200"]})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_revisions_on_the_hub_only_what_is_needed_is_read(hub: Hub, tmp_path: Path) -> None:
    place = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    words = [
        "analyze",
        "stability",
        "org/name",
        "--revisions",
        "step*",
        "-o",
        str(tmp_path / "r"),
        "--no-cache",
        "--json",
    ]
    command = [sys.executable, "-m", "ortho_cli", *words, "--format", "csv"]
    done = subprocess.run(
        command, env={**os.environ, **place}, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(each["layer"], each["reference_step"], each["step"]) for each in found["changes"]] == [
        ("q_proj", 0, 10), ("q_proj", 10, 200),
    ]  # fmt: skip
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    lengths = [last - first + 1 for first, last in hub.ranges]
    assert sum(length == 4 * 40 * 30 for length in lengths) == 3  # each weight once
    assert sum(lengths) < 3 * (4 * 40 * 30 + 1000)  # and beside it the headers, of 3.3 MB in all
