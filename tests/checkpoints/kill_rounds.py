"""Write an output again and again in child processes that are killed at random moments; run by test_kill.py.

A script of its own, without torch or threads, so that a child is one fork and a round takes as long as its writing.
Prints what was seen as JSON: how often the old or the new content was found, and how many partials were left.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.writer import computed, copied, write_file
from ortho_cli.surgery.plan import OutputFile, Plan, run

BLOCK = 2**20


def plan(base: Path, output: Path, folder: bool, size: int) -> Plan:
    """Half of the tensors copied from `base`, half computed; as one file, or as a folder with two files and a text."""
    fill = base.stem.encode()

    def blocks() -> Iterator[bytes]:
        for start in range(0, size // 2, BLOCK):
            yield fill * min(BLOCK, size // 2 - start)

    opened = open_checkpoint(base)
    made = computed("made", "U8", (size // 2,), blocks)
    taken = [copied(info) for info in opened.tensors.values()]
    if not folder:
        return Plan("test", [base], output, [OutputFile("", [*taken, made], {})])
    files = [OutputFile("model.safetensors", taken, {}), OutputFile("unet/model.safetensors", [made], {})]
    return Plan("test", [base], output, files, copies=[(base, "vae/vocab.json")], texts={"config.json": base.stem})


def digest(output: Path) -> str:
    """One hash over every name and byte of a file or folder."""
    found = hashlib.sha256()
    for path in [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file()):
        found.update(path.relative_to(output).as_posix().encode() + b"\0")
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def main(scratch: Path, folder: bool, size: int, kills: int) -> None:
    """Kill `kills` writers while they write; two outputs made in peace say what whole ones look like, and how long."""
    rng, output = random.Random(size), scratch / ("out" if folder else "out.safetensors")
    plans, whole, seconds = {}, {}, []
    for name in ("a", "b", "a", "b"):
        base, raw = scratch / f"{name}.safetensors", name.encode() * (size // 2)
        write_file(base, [computed("base", "U8", (size // 2,), lambda raw=raw: iter([raw]))], {})
        plans[name] = plan(base, output, folder, size)
        started = time.perf_counter()
        run(plans[name], force=True)
        seconds.append(time.perf_counter() - started)
        whole[name] = digest(output)
    assert whole["a"] != whole["b"]
    longest = min(seconds)
    now, seen, partials = "b", {"old": 0, "new": 0, "broken": 0}, 0
    for _ in range(10 * kills):
        other = "a" if now == "b" else "b"
        child = os.fork()
        if child == 0:
            run(plans[other], force=True)
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = {whole[now]: "old", whole[other]: "new"}.get(digest(output), "broken")
        now = other if found == "new" else now
        if os.WIFSIGNALED(status):
            seen[found] += 1
            partials += len(list(scratch.glob(".out*")))
        # Most signals should come while something happens, however busy the machine: sooner after a writer that was
        # done before its signal, later after one that was not.
        longest *= 1.1 if os.WIFSIGNALED(status) else 0.7
        if sum(seen.values()) == kills:
            break
    run(plans[now], force=True)
    left = sorted(path.name for path in scratch.iterdir())
    print(json.dumps({**seen, "partials": partials, "left": left, "same": digest(output) == whole[now]}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "folder", int(sys.argv[3]), int(sys.argv[4]))
