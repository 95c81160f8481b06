"""Peak memory of a training step whose model has 128k words: whole logits, and chunks of rows.

    python benchmarks/chunked.py > benchmarks/results/chunked.md

Each way runs in a process of its own. The peak is that of the process, minus what it held before the step. On
a CPU; the tensors are those of a GPU.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from mtl_dist import Balancer, SharedLayerProbe
from mtl_dist.losses import cross_entropy_in_chunks
from mtl_dist.weighting import InverseGradNorm, TokenShare

WORDS, WIDTH, TOKENS, CHUNK = 131072, 512, 2048, 128
TASKS = ("a", "b", "c", "d")
WAYS = {
    "plain": "the mean over all tokens, without a balancer",
    "logits": "`InverseGradNorm` at the logits",
    "head": "`InverseGradNorm`, `SharedLayerProbe` at the head, kernel form",
    "chunks": f"`InverseGradNorm` at the head's input, chunks of {CHUNK}",
    "share": f"`TokenShare`, chunks of {CHUNK}",
}


def megabytes() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(way: str) -> None:
    """Prints what one step takes: MB and seconds."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)
    labels, ids = torch.randint(WORDS, (TOKENS,)), torch.randint(4, (TOKENS,))

    def whole(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def chunked(hidden: torch.Tensor) -> torch.Tensor:
        return cross_entropy_in_chunks(hidden, head.weight, labels, chunk=CHUNK)

    before, start = megabytes(), time.perf_counter()
    if way == "plain":
        loss = F.cross_entropy(head(hidden), labels)
    elif way == "logits":
        loss = Balancer(TASKS, InverseGradNorm())(head(hidden), whole, task_ids=ids)
    elif way == "head":
        probe = SharedLayerProbe(form="kernel")
        loss = Balancer(TASKS, InverseGradNorm(), probe=probe)(hidden, whole, layer=head, task_ids=ids)
    elif way == "chunks":
        loss = Balancer(TASKS, InverseGradNorm())(hidden, chunked, task_ids=ids)
    else:
        loss = Balancer(TASKS, TokenShare())(chunked(hidden), task_ids=ids)
    loss.backward()
    print(megabytes() - before, time.perf_counter() - start)


def main() -> None:
    if len(sys.argv) > 1:
        step(sys.argv[1])
        return
    rows = {}
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
        rows[way] = [float(word) for word in done.stdout.split()]
    base = rows["plain"]
    print("# Memory of a large vocabulary\n")
    print("`python benchmarks/chunked.py`: the output head alone, without the trunk, in float32.")
    logits = TOKENS * WORDS * 4 / 2**20
    print(f"{WORDS} words, width {WIDTH}, {TOKENS} tokens: logits are {logits:.0f} MB.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; times on a shared machine.\n")
    print("| step | peak MB over what was held before | of plain | seconds |\n|---|---|---|---|")
    for way, (size, seconds) in rows.items():
        print(f"| {WAYS[way]} | {size:.0f} | {size / base[0]:.2f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
