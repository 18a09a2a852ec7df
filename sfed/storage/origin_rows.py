"""The adapters that a run starts from, on the clients: they are compared with the model and read.

``origin`` says what is on disk; this file needs the model's adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from sfed.clients.store import ClientStore
from sfed.data.splits import Data
from sfed.distributed import consistency
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World
from sfed.files.peft_folders import PeftFolder, factor_of
from sfed.lora.adapters import Adapters
from sfed.storage.origin import JOIN, Origin, Source
from sfed.utils.errors import ConfigError
from sfed.utils.text import one_line

_MOST_NAMED = 4


def look(
    found: Source, factors: Sequence[str], adapters: Adapters, data: Data, world: World
) -> Origin:
    """Compare what is to be loaded with the model, and describe it. Collective.

    Args:
        found: the folder.
        factors: what is loaded: some of A, B and head.
        adapters: of the model.
        data: whose clients are to start from it.
        world: the processes.

    Raises:
        ConfigError: on every process, where an adapter is missing or does not fit.
    """
    with raise_everywhere(world, "reading the adapters to start from"):
        of_clients = found.of_clients(data.names, data.adapter_folders)
        own = {client: of_clients[client] for client in data.placement.clients[world.rank]}
        distinct = {one.path: one for one in own.values()}
        facts = {path: _facts(found, one, factors, adapters) for path, one in distinct.items()}
    told = gather_json(
        world,
        "digests of the adapters to start from",
        {str(client): facts[one.path] for client, one in own.items()},
    )
    by_client = {int(client): pair for one in told for client, pair in one.items()}
    files = [by_client[client][0] for client in sorted(by_client)]
    return Origin(
        named_by=found.key,
        path=found.path,
        digest=files[0] if found.is_for_all else consistency.digest("\n".join(files)),
        gamma=found.gamma,
        is_for_all=found.is_for_all,
        has_common_a=len({a for _, a in by_client.values()}) == 1,
        factors=tuple(factors),
        base_name=found.adapters[0].base_name,
        own=own,
        own_digests={client: facts[one.path][0] for client, one in own.items()},
    )


def _facts(
    found: Source, one: PeftFolder, factors: Sequence[str], adapters: Adapters
) -> tuple[str, str]:
    """The digests of an adapter's files, and of its A."""
    _check_fits(found, one, factors, adapters)
    with _readable(found.said, one):
        a = adapters.peft_form.read_factors(one.path, factors)["A"]
        of_a = hashlib.blake2b(a.numpy().tobytes(), digest_size=16).hexdigest()
        return one.digest(), of_a


def _check_fits(found: Source, one: PeftFolder, factors: Sequence[str], adapters: Adapters) -> None:
    """Refuse an adapter of other layers or shapes than those of the model."""
    layers = set(adapters.layers)
    if others := sorted(layers ^ set(one.layers)):
        where = "the model has no adapters on" if others[0] not in layers else "it has none for"
        some = ", ".join(others[:_MOST_NAMED]) + (", ..." if len(others) > _MOST_NAMED else "")
        raise ConfigError(
            f"{found.said}: {one.path.name} is not for the layers that lora.target_modules names: "
            f"{where} {some}. Leave lora.target_modules out to follow the adapter; where "
            "that does not help, it is of another model than model.name"
        )
    wanted = adapters.peft_form.tensor_shapes(factors)
    held = {name: s for name, s in one.shapes.items() if factor_of(name) in factors}
    for name in sorted(wanted.keys() | held.keys()):
        here, there = _form(wanted.get(name)), _form(held.get(name))
        if here != there:
            raise ConfigError(
                f"{found.said}: {name} is {there} in {one.path.name} and {here} in the model; the "
                "adapter is of another model, or of other classes"
            )


def _form(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


@contextmanager
def _readable(said: str, one: PeftFolder) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{said}: {one.path.name} cannot be read ({one_line(error)})") from None


def start(origin: Origin, clients: ClientStore, adapters: Adapters, world: World) -> None:
    """Give each client of this process what it starts from. Collective.

    What is one adapter's, or the same A, is shared; nothing is averaged.

    Raises:
        ConfigError: on every process, where a file cannot be read any more.
    """
    with raise_everywhere(world, "loading the adapters to start from"):
        if adapters.head is not None and "head" not in origin.factors:
            clients.set_shared("head", adapters.initial_head())
        for client in clients.own[:1] if origin.is_for_all else clients.own:
            one = origin.own[client]
            with _readable(f"{origin.named_by} = {origin.path!r}", one):
                if one.digest() != origin.own_digests[client]:
                    raise ValueError("it was changed since this start looked at it")
                values = adapters.peft_form.read_factors(one.path, origin.factors)
            _give(origin, clients, client, values)


def _give(
    origin: Origin, clients: ClientStore, client: int, values: Mapping[str, torch.Tensor]
) -> None:
    apart = {}
    for factor, value in values.items():
        if origin.is_for_all or (factor == "A" and origin.has_common_a):
            clients.set_shared(factor, value)
        else:
            apart[factor.lower()] = value
    if apart:
        clients.set_own(client, apart)


def check_backbone(found: Source, weights_digest: str) -> None:
    """Refuse to join a run of another backbone.

    Raises:
        ConfigError: where the digests differ.
    """
    if found.key != JOIN or found.run is None or found.run_config is None:
        return
    known = found.run.resolved.get("backbone_digest")
    if known == weights_digest:
        return
    raise ConfigError(
        f"{found.said}: the backbone is another one: {found.run_config.model.name!r} "
        f"({found.run.resolved.get('dtype')}, digest {known}) there, digest {weights_digest} here; "
        "set model.name and model.dtype to those of the run"
    )
