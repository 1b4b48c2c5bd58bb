"""Edge ablations of the paper's transformer for addition modulo 113, in this version and another, in turn.

    LIB_REFERENCE_DIR=... python -m tests.benchmarks.two_versions FOLDER    # a checkout of the other version

All three sections of the first published network are searched by bisection, on all of its test pairs, with one thread.
The processes never compute at the same time, and their CPU time is measured, so that both see the same machine, and
what else runs there counts for little. With ``--write`` the measurements are kept in ``two_versions.json``, which
docs/ablations.md quotes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "two_versions.json"


def serve(basis: str, dtype: str) -> None:
    """Count the edges required once for each line that is read, and write seconds, counts and scores."""
    import torch

    from lib_lightning.ablation import accuracy, edges_required
    from tests.test_published import graph_of, published_model

    torch.set_num_threads(1)
    reference = Path(os.environ["LIB_REFERENCE_DIR"])
    model, data = published_model(reference, 0)
    graph = graph_of(reference, 0, basis)
    tokens, answers = data.tokens[data.n_train :], data.answers[data.n_train :]
    batches = list(zip(tokens.split(1000), answers.split(1000), strict=True))
    options = {} if dtype == "default" else {"dtype": getattr(torch, dtype)}
    for _ in sys.stdin:
        start = time.process_time()
        found = edges_required(model, batches, graph, accuracy, 1e-3, search="bisection", **options)
        result = {
            "seconds": time.process_time() - start,
            "counts": [one.count for one in found.values()],
            "scores": [sorted(one.curve.items()) for one in found.values()],
        }
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def started(root: Path, basis: str, dtype: str) -> subprocess.Popen[str]:
    """A process with the code of a checkout, which waits; it takes ``serve`` from this file."""
    program = Path(__file__).resolve()
    return subprocess.Popen(
        [sys.executable, str(program), "--serve", "--basis", basis, "--dtype", dtype],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Let a process count once."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("other", type=Path, nargs="?", help="checkout of the other version")
    parser.add_argument("--basis", default="lib", choices=("lib", "pca"))
    parser.add_argument("--dtype", default="default", help="float32, float64, or what each version does by default")
    parser.add_argument("--pairs", type=int, default=2, help="how often each version counts")
    parser.add_argument("--write", action="store_true", help=f"keep the measurements in {RESULTS.name}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.basis, options.dtype)
        return
    if options.other is None:
        parser.error("the folder of the other version is missing")
    if "LIB_REFERENCE_DIR" not in os.environ:
        parser.error("LIB_REFERENCE_DIR is not set: the folder with the published networks")
    other, this = (started(root.resolve(), options.basis, options.dtype) for root in (options.other, HERE))
    pairs = []
    for _ in range(options.pairs):
        before, now = ask(other), ask(this)
        is_same = before["scores"] == now["scores"]
        seconds = [round(one["seconds"], 1) for one in (before, now)]
        pairs.append({"before": seconds[0], "now": seconds[1], "counts": now["counts"], "same scores": is_same})
        sys.stdout.write(
            f"{before['seconds']:.1f} and {now['seconds']:.1f} CPU s: {before['seconds'] / now['seconds']:.2f} times; "
            f"edges required {now['counts']}, {'the same scores' if is_same else 'OTHER SCORES'}\n"
        )
        sys.stdout.flush()
    for process in (other, this):
        process.terminate()
    if options.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        key = f"{options.basis}, {options.dtype}"
        kept = known | {key: known.get(key, []) + pairs}
        lines = [
            f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, of)) + "\n ]" for name, of in kept.items()
        ]
        RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
