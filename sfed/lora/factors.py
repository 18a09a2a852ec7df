"""The factors of the clients of a pass: views of their flat rows, in the dtype of the pass.

Shape suffixes: C clients, R LoRA rank, I in, O out, N parameters of a row. Layers that read the
same input stand next to each other in a row, so that their A are one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import Variable

from sfed.lora.layout import Piece, zero_rows


class PassRows:
    """The clients' rows as passes read them.

    A pass in fp32 reads the rows themselves, and its gradients are added to theirs. Another reads a
    copy, which is made anew where the rows have changed since, and its gradients are collected in
    its own dtype and added to the fp32 ones at the end of the backward pass.
    """

    def __init__(
        self,
        values_CN: torch.Tensor,
        grads_CN: torch.Tensor | None,
        dtype: torch.dtype,
        gammas: Sequence[float] | None = None,
    ) -> None:
        self.gammas_C11: torch.Tensor | None = None
        """Each client's gamma, fp32; None where one number serves all."""
        if gammas is not None:
            gammas_C = torch.tensor(gammas, dtype=torch.float32, device=values_CN.device)
            self.gammas_C11 = gammas_C.view(-1, 1, 1)
        self._values_CN, self._grads_CN = values_CN, grads_CN
        self._is_copied = values_CN.dtype != dtype
        self._version = -1
        self._backward_pass = -1
        self.values_CN, self.grads_CN = values_CN, grads_CN
        if self._is_copied:
            num_clients, width = values_CN.shape
            self.values_CN = zero_rows(num_clients, width, values_CN.device, dtype)
            if grads_CN is not None:
                self.grads_CN = zero_rows(num_clients, width, values_CN.device, dtype)

    def refresh(self) -> None:
        """Before the values are read: make the copy anew where the rows have changed."""
        if self._is_copied and self._version != self._values_CN._version:
            with torch.no_grad():
                self.values_CN.copy_(self._values_CN)
            self._version = self._values_CN._version

    def collect(self) -> None:
        """Before a backward pass adds a gradient: see to it that it is delivered at the end."""
        backward_pass = torch._C._current_graph_task_id()
        if self._is_copied and self._backward_pass != backward_pass:
            self._backward_pass = backward_pass
            Variable._execution_engine.queue_callback(self._deliver)

    def _deliver(self) -> None:
        if self._grads_CN is not None and self.grads_CN is not None:
            self._grads_CN.add_(self.grads_CN)
            self.grads_CN.zero_()


@dataclass(frozen=True)
class Factors:
    """The factors of layers that read the same input, and where their gradients are added."""

    rows: PassRows
    a: torch.Tensor
    """(C, layers * R, I): the layers' A below one another."""
    b: tuple[torch.Tensor, ...]
    """Each layer's B, (C, O, R)."""
    grad_a: torch.Tensor | None = None
    """None where A does not train."""
    grad_b: tuple[torch.Tensor, ...] | None = None

    @staticmethod
    def of(
        rows: PassRows, a_pieces: Sequence[Piece], b_pieces: Sequence[Piece], trained: Sequence[str]
    ) -> Factors:
        """Those of some layers as views of the rows.

        Args:
            rows: of the clients.
            a_pieces: the layers' A, which follow one another in a row.
            b_pieces: their B.
            trained: the factors that get gradients, where the rows have any.
        """
        first, last = a_pieces[0], a_pieces[-1]
        lora_rank, in_features = first.shape
        joint = Piece(first.layer, "A", (len(a_pieces) * lora_rank, in_features), first.start)
        assert joint.end == last.end
        values_CN, grads_CN = rows.values_CN, rows.grads_CN
        grads_of_a = grads_CN if "A" in trained else None
        grads_of_b = grads_CN if "B" in trained else None
        return Factors(
            rows,
            joint.of(values_CN).detach().requires_grad_(grads_of_a is not None),
            tuple(
                b.of(values_CN).detach().requires_grad_(grads_of_b is not None) for b in b_pieces
            ),
            None if grads_of_a is None else joint.of(grads_of_a),
            None if grads_of_b is None else tuple(b.of(grads_of_b) for b in b_pieces),
        )

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A and the B as they are now; in the dtype of the pass they are not copied."""
        self.rows.refresh()
        return self.a.to(dtype), tuple(b_COR.to(dtype) for b_COR in self.b)

    def only(self, place: int) -> Factors:
        """The factors of one of the layers."""
        lora_rank = self.b[place].shape[2]
        own = slice(place * lora_rank, (place + 1) * lora_rank)
        a_CRI = self.a.detach()[:, own].requires_grad_(self.a.requires_grad)
        return Factors(
            self.rows,
            a_CRI,
            (self.b[place],),
            None if self.grad_a is None else self.grad_a[:, own],
            None if self.grad_b is None else (self.grad_b[place],),
        )
