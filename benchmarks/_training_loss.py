"""Peak memory of the loss above its inputs; every measurement is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._results import figure

HIDDEN, VOCAB = 1024, 151_936
MIB = 2**20
LOSSES = ("cakld", "forward_kl", "reverse_kl", "jsd")


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and teacher's hidden states, the frozen head that both share, labels."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, HIDDEN, generator=generator)
    teacher = student + 0.3 * torch.randn(tokens, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    return student.requires_grad_(), teacher, head, labels


def ours(loss_type: str, student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> None:
    """The fused loss, forward and backward."""
    from bitdistiller_peft.losses import Objective, distillation_loss

    goal = Objective(loss_type, gamma=0.4 if loss_type == "cakld" else None)
    distillation_loss(student, head, teacher, head, labels, objective=goal).loss_sum.backward()


def naive(loss_type: str, student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> None:
    """CAKLD as the formula has it: whole logits of both sides, both divergences, autograd."""
    log_s, log_t = (F.log_softmax(hidden @ head.T, -1) for hidden in (student, teacher))
    forward_kl = (log_t.exp() * (log_t - log_s)).sum()
    reverse_kl = (log_s.exp() * (log_s - log_t)).sum()
    (0.4 * reverse_kl + 0.6 * forward_kl).backward()


def trl(loss_type: str, student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> None:
    """TRL's chunked divergence in torch; it knows no CAKLD, so its Jensen-Shannon divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(student, head, None, teacher, head, None, 0.5)
    values.sum().backward()


KINDS: dict[str, Callable[..., None]] = {"ours": ours, "naive": naive, "trl": trl}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(kind: str, loss_type: str, tokens: int) -> dict[str, float]:
    """Peak resident memory above what is there before the call, sampled, and its CPU time."""
    torch.set_num_threads(1)
    small = tuple(t[:2] if t.shape[0] == tokens else t for t in inputs(tokens))
    KINDS[kind](loss_type, small[0].detach().clone().requires_grad_(), *small[1:])  # libraries and buffers of theirs
    arguments = inputs(tokens)
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    KINDS[kind](loss_type, *arguments)
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    return {"peak_mib": (peak[0] - before) / MIB, "cpu_seconds": seconds}


def measured(kind: str, loss_type: str, tokens: int) -> dict[str, Any]:
    """`peak_of` in a fresh process."""
    call = f"peak_of({kind!r}, {loss_type!r}, {tokens})"
    code = f"import json; from benchmarks._training_loss import peak_of; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row = {"kind": kind, "loss": loss_type, "tokens": tokens, **json.loads(done.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def run(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """What is not measured yet, row by row."""
    wanted = [("ours", "cakld", 1024), ("trl", "jsd", 1024), ("naive", "cakld", 1024), ("ours", "cakld", 4096)]
    wanted += [("ours", loss_type, 1024) for loss_type in LOSSES[1:]] + [("ours", "cakld", 2048)]
    there = {(row["kind"], row["loss"], row["tokens"]) for row in rows}
    for case in wanted:
        if case not in there:
            yield [measured(*case)]


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was asked, as far as it is measured."""
    peaks = {(row["kind"], row["loss"], row["tokens"]): row["peak_mib"] for row in rows}
    found = {}
    formula, base = peaks.get(("naive", "cakld", 1024)), peaks.get(("ours", "cakld", 1024))
    for name in LOSSES:
        if formula is not None and ("ours", name, 1024) in peaks:
            ratio = peaks["ours", name, 1024] / formula
            found[f"memory of {name} over the naive formula's"] = figure(ratio, "", at_most=0.05)
    if base is not None and ("ours", "cakld", 4096) in peaks:
        # flat but for the gradient itself and the accumulated one: the size of the hidden states
        more = 2 * 3 * 1024 * HIDDEN * 4 / MIB
        growth = peaks["ours", "cakld", 4096] - base - more
        found["growth from 1,024 to 4,096 tokens beyond the gradients"] = figure(growth, "MiB", at_most=0.1 * base)
    if base is not None and ("trl", "jsd", 1024) in peaks:
        found["memory over TRL's chunked kernel"] = figure(base / peaks["trl", "jsd", 1024], "", at_most=1.0)
    return found
