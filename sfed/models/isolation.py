"""Whether the clients of a pass leave each other alone, tried on a few tokens before training.

The trainer assumes of a backbone that

- an adapted layer is called on the rows of a batch, in the order of the clients;
- the rows of one client, and one row of a client, do not change another row;
- nothing in it is random, and a pass leaves nothing behind;
- in a language model, a token does not see the tokens after it.

All of this holds for LLaMA and its relatives. It does not hold for relative position embeddings
with projections of their own, for experts that are called on the tokens routed to them, for rotary
embeddings that follow the longest row, or for an encoder. So each start compares passes of two
clients with plain passes of one row: losses, and the gradients of every adapter. Where a pass of
several clients is wrong and a pass of one is right, a pass holds one client. Where that is wrong
too, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from sfed.data.packing import Packing, round_down, round_up
from sfed.distributed.consistency import bit_sum
from sfed.kernels.plain.quantise import CODES as FP8
from sfed.lora.packed_attention import is_installed
from sfed.models.trial_passes import (
    Case,
    Numbers,
    PlainPasses,
    Subject,
    Traced,
    View,
    first_difference,
    learned,
    long_losses,
    random_adapter,
    read_only,
    together,
    tracing,
)
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

Result = TypeVar("Result")
Agree = Callable[[str | None], str | None]

_SHORT_TOKENS, _LONG_TOKENS = 3, 7
_SEED = 20260308


@dataclass(frozen=True)
class _Tolerance:
    """Relative differences that are round-off."""

    loss: float
    gradient: float
    """Relative tolerance of the gradient of each factor of each layer."""
    floor: float
    """A gradient below this share of the largest one is compared with that share."""

    def is_near(self, loss: float, other: float) -> bool:
        """Whether two losses are the same up to round-off."""
        return abs(loss - other) <= self.loss * max(1.0, abs(other))


# Passes of equal shapes give a row the same bits, or nearly, whatever the others are; bf16 is
# coarse where shapes differ, the more so the deeper a model is (a random one of 32 layers: 0.3).
_SAME_SHAPES = {
    torch.float32: _Tolerance(1e-4, 1e-4, 0.01),
    torch.bfloat16: _Tolerance(0.01, 0.05, 0.05),
    FP8: _Tolerance(0.01, 0.05, 0.05),
}
_OTHER_SHAPES = {
    torch.float32: _Tolerance(3e-4, 3e-4, 0.01),
    torch.bfloat16: _Tolerance(0.05, 0.5, 1.0),
    FP8: _Tolerance(0.1, 0.7, 1.0),
}

_OTHER_MODEL = "choose another model, or leave the layer out of lora.target_modules"
_RANDOM = "the same row gives other numbers each time: it is random"
_DOCUMENTS_MIX = "documents in one row change each other"
# What a pass raises where a model cannot make it.
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class Isolation:
    """What holds for a backbone with its adapters."""

    clients_share_passes: bool
    documents_share_rows: bool
    reason: str = ""
    """Why clients do not share a pass, where that was asked for."""
    packing_reason: str = ""
    """Why documents do not share a row, where that was asked for."""


def check(subject: Subject, agree: Agree, *, shares_passes: bool) -> Isolation:
    """Find out what holds. Collective: every process makes the same passes.

    Args:
        subject: what is tried.
        agree: returns the reason of any process that has one, the same on all.
        shares_passes: whether several clients are to share a pass; otherwise that is not tried.

    Raises:
        UserError: on every process, where not even a pass of one client is right.
    """
    trial = _Trial(subject)
    subject.backbone.training()
    subject.adapters.context.token_keys = None
    try:
        before = trial.buffers()
        _refuse(agree(trial.refusal_of_a_row_alone()))
        reason = agree(trial.why_wrong(2)) if shares_passes else None
        if reason or not shares_passes:
            wrong = agree(trial.why_wrong(1))
            _refuse(agree(wrong and trial.refusal(trial.why_random() or wrong)))
        packing_reason = None
        if subject.packing is not None:
            num_clients = 2 if shares_passes and not reason else 1
            packing_reason = agree(trial.why_not_packed(num_clients))
        _refuse(agree(trial.refusal_of_long_rows()))
        _refuse(agree(trial.refusal_of_leftovers(before)))
    finally:
        subject.backbone.release()
    return Isolation(
        clients_share_passes=shares_passes and not reason,
        documents_share_rows=subject.packing is not None and not packing_reason,
        reason=reason or "",
        packing_reason=packing_reason or "",
    )


def _refuse(reason: str | None) -> None:
    if reason:
        raise UserError(reason)


class _FailedPassError(Exception):
    """The model cannot make a pass; the text says where and why."""


class _Trial:
    """The rows and adapters of a trial, and what their passes say."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._same_shapes = _SAME_SHAPES[subject.precision]
        self._other_shapes = _OTHER_SHAPES[subject.precision]
        generator = torch.Generator().manual_seed(_SEED)
        self._adapters = [random_adapter(subject, generator) for _ in range(4)]
        drawn = np.random.default_rng(_SEED).choice(
            np.asarray(subject.tokens), (2, 6, _LONG_TOKENS)
        )
        targets = (0.0, 1.0) if subject.has_targets else (None, None)
        # First by client: what is learned, and its company. Last by turn: how it is at first, and
        # how it is when it has changed.
        self._learned = [
            [learned(turn[0, :_SHORT_TOKENS], targets[0]) for turn in drawn],
            [learned(turn[1], targets[1]) for turn in drawn],
        ]
        self._company = [
            [[read_only(turn[2]), read_only(turn[3, :_SHORT_TOKENS])] for turn in drawn],
            [[read_only(turn[n, :_SHORT_TOKENS]) for n in (4, 5)] for turn in drawn],
        ]
        far = subject.widest_row - round_up(_LONG_TOKENS)  # the end of the padding
        self._far = far if subject.takes_positions and far > 0 else None
        # Equal shapes tell more than other shapes do only where numbers are coarse.
        self._is_coarse = subject.precision != torch.float32
        self._plain = PlainPasses(subject)
        self._expected: list[Numbers] = []
        self._follows_length = False

    # --- a row alone -------------------------------------------------------------------------

    def refusal_of_a_row_alone(self) -> str | None:
        """Why the model is refused whatever shares a pass; None where it is not.

        It makes the reference of all other comparisons.
        """
        for layer in self._subject.adapters.layers.values():
            layer.weight_reads = 0
        try:
            self._expected = [self._alone(client) for client in (0, 1)]
            if names := self._layers_without_calls():
                return self._refusal_of_targets(names)
            if not self._subject.has_targets and self._sees_later_tokens():
                return self.refusal(
                    self.why_random() or "a token sees the tokens after it, as in an encoder",
                    "choose a causal language model, or a classification task (data.task=glue)",
                )
        except _FailedPassError as failure:
            return self.refusal(str(failure))
        return None

    def why_random(self) -> str | None:
        """Whether chance is why something is wrong: a row alone, once more."""
        if self._is_same(self._alone(1), self._expected[1], self._same_shapes):
            return None
        return _RANDOM

    def _alone(self, client: int) -> Numbers:
        return self._made(lambda: self._plain_numbers(client))

    def _sees_later_tokens(self) -> bool:
        """Whether the logits of the first half of a row change with its second half."""
        ids, half = self._learned[1][0].ids.tolist(), _LONG_TOKENS // 2
        others = self._company[0][0][0].ids.tolist()
        one, other = (
            self._plain.logits(ids[:half] + behind[half:], self._adapters[1])[:half]
            for behind in (ids, others)
        )
        return not bool((one - other).norm() <= self._same_shapes.gradient * one.norm())

    def _layers_without_calls(self) -> list[str]:
        """Adapted layers whose weight the model reads, and which it does not call."""
        layers = self._subject.adapters.layers.items()
        return [name for name, one in layers if one.weight_reads and not self._plain.calls[name]]

    def _refusal_of_targets(self, names: list[str]) -> str:
        leaves = {name.rpartition(".")[2] for name in names}
        others = {name.rpartition(".")[2] for name in self._subject.adapters.layers} - leaves
        return (
            f"lora.target_modules: {type(self._subject.model).__name__} reads the weight of "
            f"{names[0]} and never calls the layer, so an adapter on it has no effect; name the "
            f"layers without {', '.join(sorted(leaves))}: [{', '.join(sorted(others))}]"
        )

    # --- rows in company ---------------------------------------------------------------------

    def why_wrong(self, num_clients: int) -> str | None:
        """Why passes of so many clients are wrong; None where they are right.

        A pass gives each client the numbers of its row alone, and these stay as they are where
        everything else in the pass changes. Two clients have a row each; a client alone has others
        of its own.
        """
        try:
            for clients in [(0, 1)] if num_clients == 2 else [(0,), (1,)]:
                found = self._together(self._case(clients))
                for client, numbers in zip(clients, found, strict=True):
                    if not self._is_same(numbers, self._expected[client], self._other_shapes):
                        return self._told_difference(clients, client, numbers)
                    if wrong := self._dependence(clients, client, numbers):
                        return wrong
        except _FailedPassError as failure:
            return str(failure)
        return None

    def refusal_of_long_rows(self) -> str | None:
        """Why the model is refused with rows as long as the run's, where short ones are right.

        Attention in blocks or by hashes begins at some length, and forward passes show it.
        """
        longest = self._subject.longest_row
        if longest <= round_up(_LONG_TOKENS) or is_installed(self._subject.model):
            return None  # these families are known to do the same at every length
        tried = (self._subject, self._learned[0][0], self._adapters[0])
        try:
            [alone], [again], [beside, of_short] = self._made(lambda: long_losses(*tried))
        except _FailedPassError as failure:
            return self.refusal(str(failure))
        if not self._same_shapes.is_near(again, alone):
            return self.refusal(_RANDOM)
        pairs = (beside, alone), (of_short, self._expected[0].loss)
        if all(self._other_shapes.is_near(*pair) for pair in pairs):
            return None
        return self.refusal(f"a row's numbers change with other rows, of up to {longest} tokens")

    def why_not_packed(self, num_clients: int) -> str | None:
        """Why rows of several documents are wrong; None where they are right.

        The learned document of client 0 lies behind another one in its row.
        """
        assert self._subject.packing is not None
        # All of them, whatever is found: a pass may be collective.
        reasons = [self._why_mixed(one, num_clients) for one in self._subject.packing.all_in_one()]
        return next(filter(None, reasons), None)

    def _why_mixed(self, packing: Packing, num_clients: int) -> str | None:
        """The same of one way to keep documents apart."""
        clients = (0, 1)[:num_clients]

        def found(kept: int | None) -> list[Numbers]:
            return self._together(self._case(clients, kept, has_company=True), packing)

        try:
            numbers = found(None)
            if not all(
                self._is_same(numbers[client], self._expected[client], self._other_shapes)
                for client in clients
            ):
                return _DOCUMENTS_MIX
            if self._is_coarse and not self._is_same(found(0)[0], numbers[0], self._same_shapes):
                return _DOCUMENTS_MIX
        except _FailedPassError as failure:
            return str(failure)
        return None

    def _case(
        self,
        clients: Sequence[int],
        kept: int | None = None,
        far: int | None = None,
        *,
        has_company: bool | None = None,
    ) -> Case:
        """The batch of some clients.

        Args:
            clients: 0, 1 or both; the learned row of 0 is its first, that of 1 its last.
            kept: everything but the learned row and the adapter of this client has changed; None =
                nothing has.
            far: position where the rows that have changed begin; None = positions are not told.
            has_company: whether a client has other rows too; None = where it is the only one.
        """
        rows, adapters, positions = [], [], []
        for client in clients:
            turn, own_turn = int(kept is not None), int(kept not in (None, client))
            of_client, begins = [self._learned[client][own_turn]], [(far or 0) * own_turn]
            if len(clients) == 1 if has_company is None else has_company:
                others = self._company[client][turn]
                of_client, begins = of_client + others, begins + [(far or 0) * turn] * len(others)
            order = slice(None, None, 1 if client == 0 else -1)
            rows.append(of_client[order])
            positions.append(begins[order])
            adapters.append(self._adapters[client + 2 * own_turn])
        return Case(rows, torch.stack(adapters), None if far is None else positions)

    def _dependence(self, clients: Sequence[int], client: int, found: Numbers) -> str | None:
        """Why a client's numbers change with everything else in the pass; None where they do not.

        The rest is moved far behind too, to the positions of the longest row of the run, since some
        rotary embeddings follow the largest position of a batch.
        """

        def numbers(far: int | None) -> Numbers:
            return self._together(self._case(clients, client, far))[clients.index(client)]

        moved = None
        if self._far is not None and client == clients[0]:
            moved = numbers(self._far)
            if self._is_same(moved, found, self._same_shapes):
                return None
        if self._is_coarse or moved is not None:
            changed = numbers(None)
            if not self._is_same(changed, found, self._same_shapes):
                return self._told_dependence(clients, client, (found, changed))
        if moved is not None and not self._is_same(numbers(0), moved, self._same_shapes):
            self._follows_length = True
            return self._told_length()
        return None

    # --- what is told ------------------------------------------------------------------------

    def _told_dependence(
        self, clients: Sequence[int], client: int, found: tuple[Numbers, Numbers]
    ) -> str:
        first, changed = self._case(clients), self._case(clients, client)
        before = self._trace(lambda: together(self._subject, first))
        after = self._trace(lambda: together(self._subject, changed))
        view = self._view(first, clients, client)
        module = first_difference((after, view), (before, view), self._same_shapes.gradient)
        module = module or self._worst_layer(found[1], found[0])
        others = "other clients" if len(clients) > 1 else "other rows of the batch"
        return f"a row's numbers change with {others}, first in {self._named(module)}"

    def _told_difference(self, clients: Sequence[int], client: int, found: Numbers) -> str:
        case, length = self._case(clients), len(self._learned[client][0].ids)
        ours = self._trace(lambda: together(self._subject, case))
        plain = self._trace(lambda: self._plain_numbers(client))
        view = self._view(case, clients, client)
        alone = View(1, length, 0, length)
        module = first_difference((ours, view), (plain, alone), self._other_shapes.gradient)
        module = module or self._worst_layer(found, self._expected[client])
        return f"a row's numbers in a batch are not those of the row alone ({self._named(module)})"

    def _told_length(self) -> str:
        text, longest = self._subject.model.config.get_text_config(), self._subject.longest_row
        rope = getattr(text, "rope_parameters", None) or {}
        return (
            f"a row's numbers change with the longest row of its batch ({rope.get('rope_type')} "
            f"positions; the longest row has {longest} tokens, those of written answers included)"
        )

    def _view(self, case: Case, clients: Sequence[int], client: int) -> View:
        """Where the learned row of a client is in a batch."""
        of_client, width = case.most_rows, round_up(_LONG_TOKENS)
        row = clients.index(client) * of_client + (of_client - 1) * client
        length = len(self._learned[client][0].ids)
        return View(len(clients) * of_client, width, row, length)

    def _worst_layer(self, one: Numbers, other: Numbers) -> str:
        """The adapted layer whose gradients differ most."""
        apart, allowed = self._distances(one, other, self._other_shapes.floor)
        return self._subject.adapters.layout.pieces[int((apart / allowed).argmax())].layer

    def _named(self, module: str | None) -> str:
        """A module with its class, by the name it has without adapters."""
        if module is None:
            return "a backward pass"
        if module in self._subject.adapters.layers:
            module = f"{module}.base_layer"
        kind = type(self._subject.model.get_submodule(module)).__name__
        return f"{module.removesuffix('.base_layer') or 'the model'} ({kind})"

    def refusal(self, reason: str, remedy: str | None = None) -> str:
        """The message of a model that cannot be trained.

        Args:
            reason: what would be wrong.
            remedy: None = the usual one.
        """
        model = self._subject.model
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        bound = rope.get("original_max_position_embeddings")
        if self._follows_length and bound:
            remedy = f"set data.max_tokens to at most {round_down(bound)}"
        return (
            f"model.name = {model.name_or_path!r} ({type(model).__name__}) would be trained with "
            f"wrong numbers: {reason}; {remedy or _OTHER_MODEL}"
        )

    # --- passes and numbers ------------------------------------------------------------------

    def _together(self, case: Case, packing: Packing | None = None) -> list[Numbers]:
        return self._made(lambda: together(self._subject, case, packing))

    def _plain_numbers(self, client: int) -> Numbers:
        return self._plain.numbers(self._learned[client][0], self._adapters[client])

    def _made(self, make: Callable[[], Result]) -> Result:
        """Make a pass.

        Raises:
            _FailedPassError: saying in which module it fails, and why.
        """
        try:
            return make()
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            reason = one_line(error, 200)
            self._subject.backbone.release()
            place = self._named(self._trace(make).failed_in)
            raise _FailedPassError(f"a pass fails in {place}: {reason}") from None

    def _trace(self, make: Callable[[], object]) -> Traced:
        """Make a pass once more, and record what its modules give out until it fails."""
        with tracing(self._subject.model) as traced, suppress(*_FAILURES):
            make()
        self._subject.backbone.release()
        return traced

    def _is_same(self, one: Numbers, other: Numbers, tolerance: _Tolerance) -> bool:
        """Whether losses and the gradients of each layer are the same up to round-off."""
        if not tolerance.is_near(one.loss, other.loss):
            return False
        apart, size = self._distances(one, other, tolerance.floor)
        return bool((apart <= tolerance.gradient * size).all())

    def _distances(
        self, one: Numbers, other: Numbers, floor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the gradients of each factor are apart, and how large they are."""
        pieces = self._subject.adapters.layout.pieces
        apart, size = (
            torch.stack([values_N[piece.start : piece.end].norm() for piece in pieces])
            for values_N in (one.gradient - other.gradient, other.gradient)
        )
        return apart, size.clamp(min=floor * float(size.max()))

    def buffers(self) -> dict[str, int]:
        """A digest of each buffer of the model."""
        return {name: bit_sum(buffer) for name, buffer in self._subject.model.named_buffers()}

    def refusal_of_leftovers(self, before: Mapping[str, int]) -> str | None:
        """Why the model is refused where passes have left something in a buffer."""
        changed = sorted(
            name for name, digest in self.buffers().items() if digest != before.get(name)
        )
        if not changed:
            return None
        return self.refusal(f"a pass changes {changed[0]}, so the next one gives other numbers")
