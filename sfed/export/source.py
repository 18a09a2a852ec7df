"""What an export needs of a run folder: a checkpoint, and the adapters' places on their base model.

Neither the data of the run nor the weights of the base model are read, and no process group is
made: the base model stands on torch's meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.export.checkpoint_rows import CheckpointRows
from sfed.federated.build import model_folder, spec_of
from sfed.files.names import adapter_folder
from sfed.lora import adapters
from sfed.lora.adapters import Adapters
from sfed.methods import method as methods
from sfed.methods.method import Method
from sfed.models import heads
from sfed.models.hf_config import DTYPES, MetaModel
from sfed.models.tokenizer import load_tokenizer
from sfed.storage import card_facts
from sfed.storage.adapter_folder import FolderWriter, Trained
from sfed.storage.adapter_source import config_of
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.storage.run_record import Event, RunRecord, look
from sfed.utils.errors import CheckpointError
from sfed.utils.redaction import mask


@dataclass(frozen=True)
class Source:
    """A run, one of its checkpoints, and what writes its adapters."""

    record: RunRecord
    config: Config
    """Of the run, with the labels of its classes."""
    method: Method
    base: str
    """Hub id or folder of the base model."""
    tokenizer: PreTrainedTokenizerFast
    rows: CheckpointRows
    writer: FolderWriter

    @property
    def finished_rounds(self) -> int:
        """Rounds after which the checkpoint was written."""
        return int(self.rows.found.metadata["finished_rounds"])

    @property
    def num_clients(self) -> int:
        """N."""
        return int(self.rows.found.metadata["num_clients"])

    @property
    def event(self) -> Event | None:
        """What was measured of the round; None where nothing was."""
        found = [event for event in self.record.rounds if event["round"] == self.finished_rounds]
        return found[-1] if found else None

    @property
    def train_counts(self) -> list[int]:
        """Training examples of each client."""
        return [self.record.sizes.get(client, 0) for client in range(self.num_clients)]

    def folder_of(self, client: int) -> str:
        """The name of the folder of a client's adapter."""
        return self.record.adapter_folders.get(client) or adapter_folder(client)


def read(record: RunRecord, found: CheckpointRef) -> Source:
    """Read what an export needs.

    Args:
        record: of a run that is finished, was stopped, or still trains.
        found: one of its checkpoints.

    Raises:
        CheckpointError: where the checkpoint cannot be exported, or is of another model.
        UserError: where the base model is not found.
    """
    config = config_of(record)
    if config.data.is_text and not record.columns:
        raise CheckpointError(
            f"{record.folder}: an older version of sfed wrote it, and partition.json does not say "
            "which columns were read; continue the run with this version (sfed train with the same "
            "arguments and a larger federated.num_rounds), or use the adapters that it wrote"
        )
    base = model_folder(config)
    tokenizer, _ = load_tokenizer(config, base)
    method = methods.resolve(config)
    attached, meta = _attached(config, method, base, found)
    trained = Trained(
        config,
        tokenizer,
        meta.config,
        str(DTYPES.get(str(look(record.config, "resolved.dtype")), "auto")).removeprefix("torch."),
    )
    facts = found.metadata
    if method.changes_base:
        raise CheckpointError(
            f"{record.folder}: {method.name} has changed frozen weights, which sfed export does "
            "not read from checkpoints; use the adapters that the run writes at its end below "
            f"{record.folder / 'adapters'}, which hold the changes. PEFT merges one into the base "
            "model: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
        )
    course = card_facts.Course(
        method.name,
        facts["num_clients"],
        facts["finished_rounds"],
        record.started_from,
        card_facts.privacy_of(record.config, _event_of(record, facts["finished_rounds"])),
    )
    writer = FolderWriter(attached, trained, card_facts.of_run(config, course))
    rows = CheckpointRows(found, attached.layout, attached.peft_form.gammas)
    return Source(record, config, method, base, tokenizer, rows, writer)


def _event_of(record: RunRecord, finished_rounds: int) -> Event | None:
    found = (event for event in record.rounds if event["round"] == finished_rounds)
    return next(found, None)


def _ranks_and_gammas(config: Config, found: CheckpointRef) -> tuple[list[int], list[float]]:
    """LoRA rank and gamma of each client; the one of all where an earlier version wrote it.

    Raises:
        CheckpointError: where the checkpoint does not say them.
    """
    facts = found.metadata
    ranks, gammas = facts.get("ranks"), facts["gamma"]
    if ranks is None:
        ranks, num_clients = [config.lora.rank], 1
    else:
        num_clients = facts["num_clients"]
    are_ranks = isinstance(ranks, list) and all(type(one) is int and one > 0 for one in ranks)
    gammas = gammas if isinstance(gammas, list) else [gammas] * len(ranks) if are_ranks else []
    are_gammas = all(type(one) in (int, float) and 0 < one < math.inf for one in gammas)
    if not (are_ranks and are_gammas and len(ranks) == len(gammas) == num_clients):
        raise CheckpointError(f"{found.folder} does not say the LoRA rank and gamma of each client")
    return ranks, [float(one) for one in gammas]


def _attached(
    config: Config, method: Method, base: str, found: CheckpointRef
) -> tuple[Adapters, MetaModel]:
    """The adapters on the base model without weights, as the checkpoint has them.

    Whether the base model has a pooler of its own shows in the size of the adapters alone.
    """
    size, sizes = found.metadata["layout_size"], list[int]()
    spec = spec_of(config, method, *_ranks_and_gammas(config, found), mask(base))
    for with_new_layers in (False, True):
        meta = MetaModel.read(config, base)
        head = heads.outline_head(config, meta.model, with_new_layers=with_new_layers)
        attached = adapters.attach(meta.model, spec, head)
        if attached.layout.size == size:
            return attached, meta
        sizes.append(attached.layout.size)
    raise CheckpointError(
        f"{found.folder} holds adapters of {size} numbers and those of {config.model.name!r} have "
        f"{sizes[0]}; the base model is another one than the run was trained on"
    )
