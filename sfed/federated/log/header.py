"""What a run says of itself when it starts: its header, and what ``config.json`` keeps."""

from __future__ import annotations

import json
from typing import Any

from sfed.config import own_method
from sfed.data.assignment.placement import by_number
from sfed.federated.context import RoundPlan, Run
from sfed.federated.evaluate import score_names
from sfed.lora.frozen import fp8, quantized
from sfed.lora.targets import last_parts
from sfed.methods import aggregation
from sfed.methods.server_optimizer import ServerOptimizer
from sfed.models.hf_config import dtype_name
from sfed.utils import versions
from sfed.utils.text import counted, printable

_MOST_NAMED = 8


def header(run: Run) -> list[str]:
    """What this run is, in plain words, a line each."""
    method, layout, world = run.method, run.clients.layout, run.world
    plan = run.plan(0)
    return [
        f"{_method_name(run)}: {run.num_clients} clients on {world.size} "
        f"process{'es' if world.size > 1 else ''} ({world.device.type}), "
        f"{sum(run.data.train_counts):,} training and {sum(run.data.eval_counts):,} held-out "
        "examples",
        *run.data.lines,
        *_start(run),
        *_settings(run),
        f"adapter: {'up to ' if run.has_mixed_ranks else ''}{layout.size:,} parameters per client "
        f"on {_adapted(run)}; a round sends {' and '.join(plan.averaged) or 'nothing'}"
        f"{', and changes of the frozen weights' if run.method.changes_base else ''} "
        f"({run.message_bytes(plan):,} bytes)",
        *([run.privacy.line(run.config, method)] if run.privacy and run.privacy.secret else []),
        *_terms(run, plan),
        f"backbone: {run.backbone.sharding.kind} ({run.backbone.sharding.reason})",
        *filter(None, [quantized.summary(run.backbone.model, run.config.model.quantization)]),
        *filter(None, [fp8.summary(run.backbone.model)]),
        f"attention: {_attention(run)}",
        *_kernels(run),
        *_placement(run),
        f"rows: {_rows(run)}",
        *_passes(run),
        *_classes(run),
        *filter(None, [run.course.line(run.config.train)]),
        *_sample(run),
        f"losses: {run.task.loss_in_words}; personal = each client's adapter on its own held-out "
        "data" + ("" if method.is_alone else ", global = A with the mean of B on everybody's"),
    ]


def _terms(run: Run, plan: RoundPlan) -> list[str]:
    """The lines about what joins the clients' losses, and about the server's optimizer."""
    lines, mu = [], run.config.federated.prox_mu
    if mu > 0:
        of = " and ".join(plan.received) or "nothing"
        lines.append(f"loss: {mu:g} / 2 * ||w - w_received||^2 over {of} is added (FedProx)")
    if run.method.local_term is not None:
        lines.append(f"loss: the local term of {run.method.name} is added")
    if run.config.federated.scaffold:
        of = " and ".join(plan.received) or "nothing"
        lines.append(f"gradients: of {of} corrected by control variates, which are sent (SCAFFOLD)")
    if optimizer := ServerOptimizer.of(run.config.federated):
        lines.append(optimizer.line)
    return lines


def _gamma(run: Run) -> str:
    """gamma, and gamma of each LoRA rank where there are several."""
    alpha, (of_clients, of_rank) = run.method.alpha, run.method.exponents
    layout = run.clients.layout
    if not run.has_mixed_ranks:
        return (
            f"gamma = {alpha:g} * N^{of_clients:g} * r^{of_rank:g} = {run.gammas[0]:.4g} with "
            f"N = {run.num_clients}, r = {layout.lora_rank}"
        )
    gammas = dict(sorted(zip(layout.ranks, run.gammas, strict=True)))
    told = [
        f"{gamma:.4g} (r = {lora_rank}, {counted(layout.ranks.count(lora_rank), 'client')})"
        for lora_rank, gamma in gammas.items()
    ]
    more = f" and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    formula = "alpha / sqrt(sum over rows of 1/N_row)" if of_clients else f"alpha * r^{of_rank:g}"
    return f"gamma = {formula} with alpha = {alpha:g}: {', '.join(told[:_MOST_NAMED])}{more}"


def _settings(run: Run) -> list[str]:
    """The line about clients that train with other settings than the rest."""
    own = list(run.config.clients)
    more = f" and {len(own) - _MOST_NAMED} more" if len(own) > _MOST_NAMED else ""
    named = ", ".join(printable(name) for name in own[:_MOST_NAMED])
    return [f"settings of their own (clients): {named}{more}"] if own else []


def _method_name(run: Run) -> str:
    """The method; one of the user's with where it is from."""
    name = run.config.federated.method
    if not own_method.is_own(name):
        return name
    return f"{run.method.name} ({name}, source {own_method.OwnMethod.parse(name).digest()})"


def _start(run: Run) -> list[str]:
    """The lines about gamma and about what A and B start from."""
    if run.origin is not None:
        loaded = " and ".join(run.origin.factors)
        return [
            run.origin.line,
            f"gamma = {run.gammas[0]:.4g} of the adapters, r = {run.clients.layout.lora_rank}; "
            f"loaded: {loaded}; no mean before the first step",
        ]
    is_shared = not run.method.independent_init
    start = "shared" if is_shared else "independent, averaged before the first step"
    return [f"{_gamma(run)}; A starts {start}"]


def _adapted(run: Run) -> str:
    """The layers that are adapted, by the names that they have in their parents."""
    layers = run.adapters.layers
    return f"{counted(len(layers), 'layer')} ({', '.join(sorted(last_parts(layers)))})"


def _attention(run: Run) -> str:
    """The attention that is used, and why where the model left no choice."""
    used, kind = run.backbone.attention, type(run.backbone.model).__name__
    is_forced = run.config.model.attention == "auto" and used != "sdpa"
    return f"{used} ({kind} has no sdpa in transformers)" if is_forced else used


def _kernels(run: Run) -> list[str]:
    """The line about kernels, where there was a choice: on a CPU there is none."""
    has_choice = run.world.device.type != "cpu" or run.config.train.kernels != "auto"
    return [f"kernels: {run.backbone.kernels.line}"] if has_choice else []


def _rows(run: Run) -> str:
    """Whether sequences share rows, and what attention needs for that."""
    if run.why_padded:
        return f"padded ({run.why_padded})"
    masked = run.backbone.why_masked
    apart = f"kept apart by a mask ({masked})" if masked else "attention needs no mask for that"
    return f"short sequences share one where that is cheaper; {apart}"


def _placement(run: Run) -> list[str]:
    """The line about which process holds which client, where that is not by number."""
    placed = run.data.placement
    if placed == by_number(run.num_clients, run.world.size):
        return []
    counts = ", ".join(str(len(own)) for own in placed.clients[:_MOST_NAMED])
    more = ", ..." if len(placed.clients) > _MOST_NAMED else ""
    return [f"clients: {counts}{more} on each process, dealt {placed.reason}"]


def _passes(run: Run) -> list[str]:
    """The line about clients per pass, where it was chosen or not all of a process share one."""
    widest = max(run.placement, key=len)
    sharing = run.sharing.of(widest)
    is_chosen = run.config.federated.clients_per_pass == "auto" and len(widest) > 1  # noqa: S105
    if sharing == len(widest) and not is_chosen:
        return []
    of_all = f"{sharing} of a process's {len(widest)} clients"
    return [f"passes: {of_all} share one: {run.sharing.reason}"]


def _sample(run: Run) -> list[str]:
    """The line about the clients that are evaluated, where that is a sample."""
    sample = run.sample
    if sample is None:
        return []
    more = f" and {len(sample) - _MOST_NAMED} more" if len(sample) > _MOST_NAMED else ""
    return [
        f"evaluation: a sample of {len(sample):,} of {run.num_clients:,} clients, drawn from the "
        f"seed: {', '.join(map(str, sample[:_MOST_NAMED]))}{more}"
    ]


def _classes(run: Run) -> list[str]:
    """The line about the classes of own texts, with their training examples and weights."""
    if run.task.labels is None:
        return []
    names, counts = run.task.classes or (), run.data.class_counts
    weights = [""] * len(names)
    if run.class_weights is not None:
        weights = [f", weight {weight:.4g}" for weight in run.class_weights.tolist()]
    told = [
        f"{name} ({count:,}{weight})"
        for name, count, weight in zip(names, counts, weights, strict=True)
    ]
    more = f" and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    return [f"classes and training examples: {', '.join(told[:_MOST_NAMED])}{more}"]


def describe_run(run: Run) -> dict[str, Any]:
    """What ``config.json`` keeps: the resolved configuration and all it was run with."""
    return {
        **json.loads(run.config.model_dump_json()),
        "resolved": {
            "num_clients": run.num_clients,
            "gamma": run.gamma,
            "ranks": [one.lora_rank for one in run.data.settings],
            **_start_as_data(run),
            "method": own_method.identity(run.config.federated.method),
            "scores": list(score_names(run)),
            "classes": list(run.task.classes) if run.task.classes else None,
            "labels": list(run.task.labels) if run.task.labels else None,
            "class_weights": None if run.class_weights is None else run.class_weights.tolist(),
            "loss_unit": run.task.loss_unit,
            "dtype": dtype_name(run.config, run.world),
            "attention": run.backbone.attention,
            "kernels": run.backbone.kernels.by_name,
            "kernels_reason": run.backbone.kernels.reason,
            "sharding": run.backbone.sharding.kind,
            "sharding_reason": run.backbone.sharding.reason,
            "backbone_digest": run.backbone.weights_digest,
            "placement": [list(own) for own in run.placement],
            "placement_reason": run.data.placement.reason,
            "evaluated_clients": run.sample,
            "left_out_clients": list(run.data.left_out),
            "clients_per_pass": run.clients.clients_per_pass,
            "clients_per_pass_reason": run.sharing.reason,
            "padded_reason": run.why_padded,
            "schedule_rounds": [
                {"from_round": first + 1, "rounds": total} for first, total in run.course.parts
            ],
            "adapter_parameters": run.clients.layout.size,
            "own_parameters": {
                factor: aggregation.message_bytes(run.clients.layout, (factor,)) // 4
                for factor in run.own_factors(run.config.federated.num_rounds)
            },
            "world_size": run.world.size,
            "device": str(run.world.device.type),
            "privacy": None if run.privacy is None else run.privacy.guarantee.facts,
        },
        "versions": versions.of_libraries(*versions.RECORDED),
    }


def _start_as_data(run: Run) -> dict[str, Any]:
    """What gamma follows from, and what A and B started from."""
    if run.origin is not None:
        nothing = dict.fromkeys(("alpha", "scaling_exponents", "independent_init"))
        return {**nothing, "origin": run.origin.as_record()}
    return {
        "alpha": run.method.alpha,
        "scaling_exponents": list(run.method.exponents),
        "independent_init": run.method.independent_init,
        "origin": None,
    }
