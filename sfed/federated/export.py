"""Write the adapters of a finished run as PEFT folders, with how the model is to be prompted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from sfed.distributed.sync import gather_json
from sfed.federated.context import Run
from sfed.files.names import CLIENT_FILE, GLOBAL, adapter_folder
from sfed.methods import aggregation
from sfed.observability.metrics import free_name
from sfed.storage import card_facts
from sfed.storage.adapter_folder import Described, FolderWriter, Trained
from sfed.utils.errors import UserError
from sfed.utils.text import size_text


def export_adapters(run: Run, folder: Path) -> str:
    """Write every client's adapter, and the global one where it was asked for. Collective.

    Where the method has changed frozen weights, an adapter holds the change too, so that it is
    loaded on the original backbone.

    Returns:
        What there is to say of their size, a line; "" where they are as large as those that train.
    """
    row_of_all, data = None, run.data
    changes = {} if run.changed is None else run.changed.factors()
    writer = replace(writer_of(run, _privacy(run)), changes=changes)
    if "global" in run.config.evaluation.adapters and run.method.has_global_adapter:
        weights = run.weights(run.everyone)
        own = run.own_factors(run.config.federated.num_rounds)
        row_of_all = aggregation.global_row(run.world, run.clients, weights, own, run.gammas)
    taken = set(data.adapter_folders)
    try:
        for client in run.clients.own:
            path = folder / "adapters" / data.adapter_folders[client]
            name = data.names[client]
            facts = card_facts.of_client(client, name, data.train_counts[client])
            described = Described(data.columns_of(client), facts, client, name)
            writer.write(path, run.clients.row(client), described)
            if (former := adapter_folder(client)) not in taken:
                _remove_former(folder / "adapters" / former)
        if row_of_all is not None and run.world.is_main:
            described = Described(data.used_columns, card_facts.of_global(data.train_counts))
            writer.write(folder / "adapters" / GLOBAL, row_of_all, described)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output.dir: the adapters cannot be written below {folder} ({error}); make room, "
            "then start again: the run is whole in its last checkpoint"
        ) from None
    first = run.data.adapter_folders[run.clients.own[0]]
    return _size_of(folder / "adapters" / first) if changes else ""


def set_aside_former(folders: Sequence[str], run_folder: Path) -> str:
    """Move the adapters of clients that are no longer called so out of the way of the present ones.

    That is: folders with a ``client.json`` that no client has, as where a file of
    ``partition.kind=by_file`` is renamed before a run goes on.

    Args:
        folders: of the adapters of all clients.
        run_folder: of the run.

    Returns:
        Where they are kept, a line; "" where there are none.

    Raises:
        UserError: where they cannot be moved.
    """
    adapters = run_folder / "adapters"
    known = {*folders, GLOBAL}
    try:
        former = [
            path.parent
            for path in sorted(adapters.glob(f"*/{CLIENT_FILE}"))
            if path.parent.name not in known
        ]
        if not former:
            return ""
        aside = free_name(run_folder / "set-aside") / "adapters"
        aside.mkdir(parents=True)
        for path in former:
            path.rename(aside / path.name)
    except OSError as error:
        raise UserError(
            f"output.dir: former adapters below {adapters} cannot be moved ({error.strerror})"
        ) from None
    names = ", ".join(path.name for path in former)
    return f"adapters of clients that are no longer called so, kept in {aside}: {names}"


def _size_of(adapter: Path) -> str:
    """Rank and size of an adapter that holds a change of the frozen weights."""
    facts = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {facts["r"], *facts["rank_pattern"].values()}
    told = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)}))
    size = (adapter / "adapter_model.safetensors").stat().st_size
    return (
        "each adapter holds the change of the frozen weights, for the original backbone: rank "
        f"{told}, {size_text(size)}"
    )


def _privacy(run: Run) -> str:
    """The guarantee of what was sent, which process 0 knows; empty without. Collective."""
    if run.privacy is None:
        return ""
    facts = {"resolved": {"privacy": run.privacy.guarantee.facts}}
    told = card_facts.privacy_of(facts, run.privacy.spent(run.clients))
    return str(gather_json(run.world, "the privacy of the adapters", told)[0])


def writer_of(run: Run, privacy: str = "") -> FolderWriter:
    """What writes the folders of a run's adapters.

    Args:
        run: the run.
        privacy: what it guarantees; empty for nothing.
    """
    data = run.config.data
    if run.task.labels is not None:
        data = data.model_copy(update={"labels": tuple(run.task.labels)})
    trained = Trained(
        run.config.model_copy(update={"data": data}),
        run.tokenizer,
        run.backbone.model.config,
        str(run.backbone.model.dtype).removeprefix("torch."),
    )
    done = run.config.federated.num_rounds
    origin = "" if run.origin is None else run.origin.name
    course = card_facts.Course(run.method.name, run.num_clients, done, origin, privacy)
    return FolderWriter(run.adapters, trained, card_facts.of_run(run.config, course))


def _remove_former(folder: Path) -> None:
    """Remove what an older version, which knew no names, has written of a client that has one."""
    if folder.is_dir():
        shutil.rmtree(folder)
