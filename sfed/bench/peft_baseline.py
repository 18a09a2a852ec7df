"""HF + PEFT as users write it: what the trainer is measured against, and so it knows PEFT too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from sfed.bench.steps import GAMMA, TRAIN, Contestant
from sfed.bench.workload import Workload
from sfed.lora.layout import Layout
from sfed.lora.peft_form import peft_alpha


def with_adapters(
    model: PreTrainedModel,
    names: Sequence[str],
    lora_rank: int,
    target_modules: tuple[str, ...] | str,
    autocast: bool = True,
) -> PeftModel:
    """The model with an adapter of each name; the first is active."""
    is_named = not isinstance(target_modules, str)
    settings = LoraConfig(
        r=lora_rank,
        lora_alpha=peft_alpha(GAMMA, lora_rank),
        target_modules=list(target_modules) if is_named else target_modules,
        task_type="CAUSAL_LM",
    )
    made: PeftModel = get_peft_model(model, settings, names[0], autocast_adapter_dtype=autocast)
    for name in names[1:]:
        made.add_adapter(name, settings, autocast_adapter_dtype=autocast)
    return made


class StockPeft(Contestant):
    """HF + PEFT as users write it: one model, an adapter per client, ``set_adapter`` between them.

    The loss comes from ``labels=``, the optimizer is torch.optim.AdamW as it is, one per client.
    ``use_cache`` is off and no attention mask is given, both in PEFT's favour.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        input_ids: torch.Tensor,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(workload, input_ids)
        self.num_turns = workload.num_clients
        names = [f"client-{client}" for client in range(workload.num_clients)]
        self._names = names
        adapted = (workload.lora_rank, workload.target_modules)
        self.model = with_adapters(model, names, *adapted, autocast_adapter_dtype)
        self._parameters = dict(self.model.named_parameters())
        self._optimizers = [self._make_optimizer(name) for name in names]
        self._turn = 0

    def _make_optimizer(self, name: str) -> torch.optim.AdamW:
        own = [weight for key, weight in self._parameters.items() if f".{name}." in key]
        for weight in own:  # set_adapter turns off all but its own
            weight.requires_grad_()
        return torch.optim.AdamW(own, lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)

    def start_from(self, layout: Layout, rows: torch.Tensor) -> None:
        """Take over the (clients, layout.size) factors that another contestant starts from."""
        with torch.no_grad():
            for client, row in enumerate(rows):
                for piece in layout.pieces:
                    factor = f"{piece.layer}.lora_{piece.factor}.client-{client}"
                    values = row[piece.start : piece.end].view(piece.shape)
                    self._parameters[f"base_model.model.{factor}.weight"].copy_(values)

    def enter(self, turn: int) -> None:
        """Activate this client's adapter."""
        self._turn = turn
        self.model.set_adapter(self._names[turn])

    def losses(self) -> torch.Tensor:
        """The loss that HF computes, one."""
        self._optimizers[self._turn].zero_grad()
        ids = self._rows_of(self._turn)
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss[None]

    def update(self) -> None:
        """torch.optim.AdamW."""
        self._optimizers[self._turn].step()

    def leave(self) -> None:
        """Drop the gradients: no other client needs them."""
        self._optimizers[self._turn].zero_grad()

    def frozen(self) -> Iterable[torch.Tensor]:
        """All parameters: factors are state."""
        return (*self.model.parameters(), *self.model.buffers())

    def state(self) -> Iterable[torch.Tensor]:
        """Factors, gradients while they are kept, moments."""
        for one in self._optimizers:
            for weight in one.param_groups[0]["params"]:
                yield weight
                if weight.grad is not None:
                    yield weight.grad
                yield from (v for v in one.state[weight].values() if isinstance(v, torch.Tensor))
