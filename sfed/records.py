"""From the sums of a round to the event that ``metrics.jsonl`` keeps of it."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

import torch

from sfed import metrics
from sfed.evaluate import Evaluation
from sfed.local import FIRST_NORM, IS_BAD, LOSS_SUM, NORM_SUM, STEPS, SUPERVISED, TOKENS, Ledger
from sfed.run import Run


@dataclass
class Timing:
    """Seconds of the parts of a round, on this process."""

    local_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    round_seconds: float = 0.0


def round_event(
    run: Run,
    finished_rounds: int,
    ledger: Ledger | None,
    evaluation: Evaluation | None,
    uploaded_bytes: int,
    timing: Timing,
) -> dict[str, Any]:
    """Build the event of a round; ``finished_rounds`` 0 is the state before any training.

    Values that were not measured in this round are None. Losses are nats per supervised token.
    """
    event: dict[str, Any] = {"event": "round", "round": finished_rounds}
    event.update(_training(run, ledger))
    event.update(_held_out(run, evaluation))
    event[metrics.UPLOADED_BYTES] = uploaded_bytes
    event[metrics.EVALUATION_BYTES] = evaluation.communicated_bytes if evaluation else 0
    event[metrics.ROUND_SECONDS] = timing.round_seconds
    event[metrics.LOCAL_SECONDS] = timing.local_seconds
    event[metrics.AGGREGATE_SECONDS] = timing.aggregate_seconds
    event[metrics.EVALUATE_SECONDS] = timing.evaluate_seconds
    tokens = 0.0 if ledger is None else float(ledger[:, TOKENS].sum())
    speed = tokens / timing.local_seconds if timing.local_seconds else None
    event[metrics.TOKENS_PER_SECOND] = speed
    event[metrics.PEAK_BYTES] = peak_bytes(run.world.device)
    event["clients"] = [
        _client(run, client, ledger, evaluation) for client in range(run.num_clients)
    ]
    return event


def _training(run: Run, ledger: Ledger | None) -> dict[str, Any]:
    if ledger is None:
        return {metrics.TRAIN_LOSS: None, metrics.GRAD_NORM: None, "adapter/first_grad_norm": None}
    good = ledger[ledger[:, IS_BAD] == 0]
    good = good[good[:, STEPS] > 0]
    sums = good.sum(axis=0)
    num = max(1, len(good))
    return {
        metrics.TRAIN_LOSS: float(sums[LOSS_SUM] / sums[SUPERVISED]) if sums[SUPERVISED] else None,
        metrics.GRAD_NORM: float(sums[NORM_SUM] / sums[STEPS]) if sums[STEPS] else None,
        "adapter/first_grad_norm": float(sums[FIRST_NORM] / num) if len(good) else None,
    }


def _held_out(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Means over clients by tokens, unweighted and by training examples, for each adapter kind."""
    event: dict[str, Any] = {metrics.EVAL_LOSS: None, metrics.EVAL_PERPLEXITY: None}
    if evaluation is None:
        return event
    for kind in evaluation.sums:
        pairs = [
            (loss, float(run.data.train_counts[client]))
            for client in range(run.num_clients)
            if (loss := evaluation.client_loss(kind, client)) is not None
        ]
        losses, examples = [loss for loss, _ in pairs], [count for _, count in pairs]
        event[f"eval/{kind}_loss"] = evaluation.loss(kind)
        event[f"eval/{kind}_loss_unweighted"] = metrics.mean(losses)
        event[f"eval/{kind}_loss_by_examples"] = metrics.mean(losses, examples)
    main = next(iter(evaluation.sums), None)
    if main is not None:
        event[metrics.EVAL_LOSS] = evaluation.loss(main)
        event[metrics.EVAL_PERPLEXITY] = metrics.perplexity(event[metrics.EVAL_LOSS])
    return event


def _client(
    run: Run, client: int, ledger: Ledger | None, evaluation: Evaluation | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "client": client,
        "train_loss": None,
        "eval_loss": None,
        "examples": run.data.train_counts[client],
    }
    if ledger is not None and ledger[client, STEPS] > 0:
        sums = ledger[client]
        entry["steps"] = int(sums[STEPS])
        entry["excluded"] = bool(sums[IS_BAD])
        if sums[SUPERVISED] and not sums[IS_BAD]:
            entry["train_loss"] = float(sums[LOSS_SUM] / sums[SUPERVISED])
            entry["grad_norm"] = float(sums[NORM_SUM] / sums[STEPS])
    if evaluation is not None:
        for kind in evaluation.sums:
            entry[f"{kind}_loss"] = evaluation.client_loss(kind, client)
        entry["eval_loss"] = entry.get("personal_loss", entry.get("global_loss"))
    return entry


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
