"""Made-up run folders: what a run writes, with numbers of known growth in N, r and rounds."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

# method -> exponents of gamma, whether A starts as a mean of independent draws
THEORY = {
    "sfed": ((0.5, -0.5), True),
    "fedsa": ((0.0, -1.0), False),
    "fedsa-rslora": ((0.0, -0.5), False),
    "local": ((0.0, -1.0), False),
}


def costs(*, is_trained: bool) -> dict[str, Any]:
    """What a round costs, in its event."""
    return {
        "comm/uploaded_bytes": 2**20,
        "comm/evaluation_bytes": 2**19,
        "time/round_seconds": 3.0,
        "time/local_seconds": 2.0,
        "time/aggregate_seconds": 0.25,
        "time/evaluate_seconds": 0.5,
        "time/tokens_per_second": 1000.0 if is_trained else None,
        "memory/peak_bytes": 2**30,
    }


def write_run(
    folder: Path,
    *,
    method: str = "sfed",
    num_clients: int = 4,
    rank: int = 8,
    seed: int = 0,
    rounds: int = 3,
    planned: int | None = None,
    scores: tuple[str, ...] = (),
    loss_unit: str = "token",
    optimizer: str = "sgd",
    samples: bool = False,
    growth: dict[str, tuple[float, float]] | None = None,
    task: str = "demo",
    settings: dict | None = None,
) -> Path:
    """A run folder; ``growth`` = exponents of N and r of the first gradient norm and of the output.

    The output's are those of its square.
    """
    (of_clients, of_rank), independent = THEORY[method]
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"name": "demo"},
        "data": {"task": task},
        "partition": {"kind": "dirichlet"},
        "lora": {"rank": rank},
        "federated": {
            "method": method,
            "num_clients": num_clients,
            "num_rounds": planned or rounds,
            "averaged": "auto",
        },
        "train": {"optimizer": optimizer, "max_grad_norm": None, "lr": 0.001},
        "output": {"name": folder.name},
        "resolved": {
            "num_clients": num_clients,
            "gamma": 2 * num_clients**of_clients * rank**of_rank,
            "scaling_exponents": [of_clients, of_rank],
            "independent_init": independent,
            "scores": list(scores),
            "loss_unit": loss_unit,
            "world_size": 1,
            "device": "cpu",
        },
    }
    for dotted, value in (settings or {}).items():
        section, _, key = dotted.partition(".")
        config[section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    labels = [{"yes": 60 + 5 * c, "no": 40} for c in range(num_clients)]
    parts = [
        {
            "client": c,
            "train": list(range(sum(counts.values()))),
            "eval": [],
            "labels": counts,
            "digest": f"{task}-{num_clients}-{seed}-{c}",
        }
        for c, counts in enumerate(labels)
    ]
    (folder / "partition.json").write_text(json.dumps({"clients": parts}))
    grown = {
        name: 1.5 * num_clients**n * rank**r
        for name, (n, r) in (growth or {"gradient": (0.0, 0.0), "output": (0.0, 0.0)}).items()
    }
    dice = random.Random(f"{method} {num_clients} {rank} {seed}")
    quality = 0.2 * (method == "sfed") + 0.02 * math.log(rank) - 0.02 * math.log(num_clients)
    events = []
    for number in range(rounds + 1):
        done = 1 - math.exp(-number / max(1, rounds) * 3)
        entries = [
            client_entry(c, number, done, quality, scores, dice, samples=samples)
            for c in range(num_clients)
        ]
        events.append(round_event(number, entries, scores, grown, loss_unit))
    write_events(folder, events)
    return folder


def write_events(folder: Path, events: list[dict]) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text)


def client_entry(
    client: int,
    number: int,
    done: float,
    quality: float,
    scores: tuple[str, ...],
    dice: random.Random,
    *,
    samples: bool,
) -> dict:
    loss = 2.5 - (1.4 + quality) * done + 0.05 * client % 0.3 + 0.02 * dice.random()
    entry = {
        "client": client,
        "examples": 100 + 5 * client,
        "train_loss": loss if number else None,
        "grad_norm": 0.3 + 0.1 * dice.random() if number else None,
        "personal_loss": loss,
        "global_loss": loss + 0.2 * done,
        "eval_loss": loss,
    }
    for place, score in enumerate(scores):
        value = 0.5 + (0.25 + quality / 2) * done - 0.05 * place - 0.01 * (client % 5)
        entry[f"personal_{score}"] = value
        entry[f"global_{score}"] = value - 0.04 * done
    if samples and number:
        entry["samples"] = [
            {"prompt": f"Question {k} of <{client}>?\n  indented", "answer": "12 & 13\nso 25",
             "expected": "25"}
            for k in range(3)
        ]  # fmt: skip
    return entry


def round_event(
    number: int,
    entries: list[dict],
    scores: tuple[str, ...],
    grown: dict[str, float],
    loss_unit: str,
) -> dict:
    wave = 1 + 0.15 * math.sin(number)
    trained = number > 0
    event = {
        "event": "round",
        "round": number,
        "train/loss": entries[0]["train_loss"],
        "adapter/grad_norm": grown["gradient"] * wave / (1 + 0.1 * number) if trained else None,
        "adapter/first_grad_norm": grown["gradient"] if trained else None,
        "adapter/output_rms": 0.1 * math.sqrt(grown["output"] * number),
        "adapter/a_similarity": 0.99 - 0.01 * number if trained else None,
        "adapter/b_similarity": 0.6 - 0.02 * number if trained else None,
        **costs(is_trained=bool(trained)),
        "clients": entries,
    }
    for kind in ("personal", "global"):
        for what in ("loss", *scores):
            mean = statistics.fmean(entry[f"{kind}_{what}"] for entry in entries)
            event[f"eval/{kind}_{what}"] = mean + 0.001
            event[f"eval/{kind}_{what}_unweighted"] = mean
            event[f"eval/{kind}_{what}_by_examples"] = mean + 0.002
    event["eval/loss"] = event["eval/personal_loss"]
    event["eval/perplexity"] = math.exp(event["eval/loss"]) if loss_unit == "token" else None
    return event
