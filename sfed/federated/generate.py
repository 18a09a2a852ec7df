"""Answers that the adapters write: batched greedy generation, for exact match and for samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sfed.data import scores
from sfed.data.forms.text import TextForms
from sfed.data.tokenize import Row
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.federated.context import Group, Run
from sfed.federated.lockstep import Lockstep
from sfed.models.backbone import Backbone
from sfed.storage.adapter_folder import end_marks

_SAMPLES_PER_CLIENT = 2


@dataclass(frozen=True)
class Sample:
    """One answer beside what was expected."""

    prompt: str
    answer: str
    expected: str


def write_answers(
    run: Run, shared_row: torch.Tensor | None, outcomes_CE3: torch.Tensor, stop: StopRequest
) -> tuple[dict[int, list[Sample]], bool]:
    """Answer held-out prompts with every client's adapter, or with one for all. Collective.

    Tasks whose answers can be scored answer all of them, others only a few as samples. Under a
    sharded backbone all processes generate equally often, and for equally many tokens.

    Args:
        run: the run.
        shared_row: (1, layout.size) of one adapter for all; None = each client's own.
        outcomes_CE3: (own clients, examples, 3): prediction (1 right, 0 wrong), target (1, or NaN
            for what has no number) and part are filled in, for tasks that are scored.
        stop: asks before each batch whether to stop here.

    Returns:
        Samples by client, of all processes; whether this process was stopped.
    """
    own, size = run.clients.own, run.config.evaluation.batch_size
    samples: dict[int, list[Sample]] = {client: [] for client in own}
    groups = run.groups(run.evaluated)
    schedule = Lockstep(run, stop, "generation, batch", groups, partial(_batches, run))
    for group in schedule.groups:
        if shared_row is not None:
            run.adapters.bind(shared_row)
        else:
            run.bind(group, run.clients.load_values(group))
        for number in schedule.units(group):
            batch = slice(number * size, (number + 1) * size)
            places = [list(_places(run, client))[batch] for client in group]
            answers = _answer(run, group, places)
            for client, which, texts in zip(group, places, answers, strict=True):
                _note(run, client, which, texts, outcomes_CE3[run.clients.lines[client]])
                if number == 0:
                    samples[client] = _samples(run, client, which, texts)
    schedule.shadow(partial(_shadow_batch, run))
    shared = gather_json(
        run.world,
        "samples",
        [[client, [asdict(one) for one in some]] for client, some in samples.items()],
    )
    samples = {client: [Sample(**one) for one in some] for each in shared for client, some in each}
    return samples, schedule.is_stopped


def _places(run: Run, client: int) -> range:
    """Which of a client's held-out examples are answered; known to every process for all."""
    count = run.data.eval_counts[client]
    if run.task.scores:
        return range(count)
    # The longest come first: some from the middle.
    first = max(0, (count - _SAMPLES_PER_CLIENT) // 2)
    return range(first, min(count, first + _SAMPLES_PER_CLIENT))


def _batches(run: Run, group: Group) -> range:
    most = max(len(_places(run, client)) for client in group)
    return range(-(-most // run.config.evaluation.batch_size))


def _shadow_batch(run: Run) -> None:
    own = run.clients.own[:1]
    run.bind(own, run.clients.load_values(own))
    _generate(run, [[0]])


def _answer(run: Run, group: Group, places: list[list[int]]) -> list[list[str]]:
    """Return the answers of each client of the group to its examples at these places."""
    rows_per_client = max(map(len, places))
    prompts: list[list[int]] = []
    for client, which in zip(group, places, strict=True):
        examples = run.data.held_out[client]
        rows = [examples.row(place) for place in which]
        own = [row.ids[: max(1, row.answer.start)].tolist() for row in rows]
        prompts += own + [[0]] * (rows_per_client - len(own))
    texts = _generate(run, prompts)
    return [
        texts[i * rows_per_client : i * rows_per_client + len(which)]
        for i, which in enumerate(places)
    ]


def _generate(run: Run, prompts: list[list[int]]) -> list[str]:
    """Return the greedy continuation of each prompt up to its end mark."""
    section = run.config.data
    has_chat = section.is_text and TextForms.of(section).has_conversations(run.data.used_columns)
    marks = end_marks(run.config, run.tokenizer, has_chat=has_chat)
    writing = Writing(run.backbone, run.tokenizer, run.world, marks)
    return writing.texts(prompts, run.config.evaluation.max_new_tokens)


@dataclass(frozen=True)
class Writing:
    """A model with adapters bound that writes texts."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerFast
    world: World
    marks: Sequence[int]
    """The tokens that end a text."""

    def texts(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[str]:
        """Return the continuation of each prompt up to its end mark.

        Args:
            prompts: tokens, at least one each; as many for each bound adapter, in their order.
            max_new_tokens: most tokens of a text; fewer where the model's context ends before.
            temperature: of the drawn tokens; 0 = always the likeliest one.
        """
        longest, eos = max(map(len, prompts)), self.tokenizer.eos_token_id
        pad = eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # Padded at the left: what is written follows the prompt at once.
        ids = torch.tensor([[pad or 0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        room = max(1, self.backbone.context_tokens - longest)
        chance = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
        written = self.backbone.model.generate(
            input_ids=ids.to(self.world.device),
            attention_mask=mask.to(self.world.device),
            generation_config=GenerationConfig(
                do_sample=temperature > 0,
                max_new_tokens=min(max_new_tokens, room),
                eos_token_id=list(self.marks) or None,
                pad_token_id=pad or 0,
                **chance,
            ),
            synced_gpus=self.backbone.sharding.is_sharded and self.world.size > 1,
        )
        return [self._text(answer) for answer in written[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        """The text of some tokens up to the end mark, which need not be a special token."""
        ids = ids[: next((i for i, one in enumerate(ids) if one in self.marks), None)]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _note(
    run: Run, client: int, places: list[int], answers: list[str], outcomes_E3: torch.Tensor
) -> None:
    """Note which answers are right."""
    examples = run.data.held_out[client]
    for place, answer in zip(places, answers, strict=True) if run.task.scores else ():
        target = float(examples.targets[place])
        is_right = float(scores.matches(answer, target))
        has_number = 1.0 if target == target else torch.nan
        outcomes_E3[place] = torch.tensor([is_right, has_number, float(examples.parts[place])])


def _without_end(run: Run, row: Row) -> list[int]:
    """The tokens of what is to be written."""
    ids: list[int] = row.ids[row.answer].tolist()
    return ids[:-1] if ids[-1:] == [run.tokenizer.eos_token_id] else ids


def _samples(run: Run, client: int, places: list[int], answers: list[str]) -> list[Sample]:
    rows = [run.data.held_out[client].row(place) for place in places[:_SAMPLES_PER_CLIENT]]
    decode = run.tokenizer.decode
    return [
        Sample(
            decode(row.ids[: row.answer.start].tolist(), skip_special_tokens=True),
            answer.strip(),
            decode(_without_end(run, row), skip_special_tokens=True).strip(),
        )
        for row, answer in zip(rows, answers, strict=False)
    ]
