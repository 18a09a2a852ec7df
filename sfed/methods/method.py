"""The federated LoRA methods as data. Nothing outside this file asks for a method by name.

========== =========================== ================ ================= ============
name       trained                     averaged         gamma             init of A
========== =========================== ================ ================= ============
sfed       A, B                        A                alpha*sqrt(N/r)   independent
fedsa      A, B                        A                alpha/r           shared
fedsa-rs.. A, B                        A                alpha/sqrt(r)     shared
rolora     B, then A, in turns         what was trained alpha/r           shared
ffa        B                           B                alpha/r           shared
fedit      A, B                        A, B             alpha/r           shared
local      A, B                        nothing          alpha/r           shared
========== =========================== ================ ================= ============

SFed-LoRA arXiv 2603.08058; FedSA-LoRA 2410.01463; RoLoRA 2502.01755; FFA-LoRA 2403.12313;
FedIT 2305.05644. Exact definitions in the tests. A method of one's own is such a record in a file
of one's own: ``federated.method = FILE.py:NAME``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sfed.config.own_method import is_own
from sfed.config.schema import Config
from sfed.methods.own import load_own
from sfed.methods.scaling import EXPONENTS, client_scalings
from sfed.methods.server import ServerStep
from sfed.utils.errors import ConfigError, UserError

Factor = Literal["A", "B"]
Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class Method:
    """What a method trains and averages in a round, and how its adapters start and scale."""

    name: str
    trained: tuple[Factors, ...]
    """Factors that train, one entry per round in turn."""
    averaged: tuple[Factors, ...]
    """Factors that are sent and then the same on all clients, one entry per round in turn: their
    weighted mean, or what ``server_step`` makes of them."""
    exponents: tuple[float, float]
    """gamma = alpha * N**exponents[0] * r**exponents[1]."""
    independent_init: bool
    """Each client draws its own A and all of them are averaged before the first step."""
    alpha: float
    """LoRA alpha in this method's own formula."""
    server_step: ServerStep | None = None
    """What becomes of the sent factors of a layer; None = their weighted mean over the clients."""
    keeps_moments: bool = True
    """Whether the optimizer's moments survive the server step. They do not where it rotates or
    redraws the factors: they belong to a basis that is gone."""
    mixed_ranks: bool = False
    """Whether the server step takes clients of different LoRA ranks, with zeros beyond them. The
    weighted mean does."""

    def trained_in(self, round_index: int) -> Factors:
        """Factors that train in this 0-based round."""
        return self.trained[round_index % len(self.trained)]

    def averaged_in(self, round_index: int) -> Factors:
        """Factors that are averaged at the end of this 0-based round."""
        return self.averaged[round_index % len(self.averaged)]

    def keeps_apart(self, factor: Factor) -> bool:
        """Whether clients hold a factor of their own between rounds.

        A factor is the same on all of them where it is averaged in every round that trains it, and
        started the same.
        """
        if factor == "A" and self.independent_init and not self.averages_a_at_start:
            return True
        in_turns = range(len(self.trained) * len(self.averaged))
        return any(
            factor in self.trained_in(i) and factor not in self.averaged_in(i) for i in in_turns
        )

    def gammas(self, ranks: Sequence[int], client_weights: Sequence[float]) -> tuple[float, ...]:
        """Gamma of each client.

        Args:
            ranks: (N,) LoRA rank of each client.
            client_weights: (N,) of the mean over all of them.

        Raises:
            ConfigError: where the ranks differ and the method does not say what follows.
        """
        if len(set(ranks)) > 1 and self.server_step is not None and not self.mixed_ranks:
            raise ConfigError(
                f"federated.method = {self.name!r}: its server step does not say that it takes "
                "clients of different LoRA ranks (Method.mixed_ranks); set one rank for all clients"
            )
        return client_scalings(self.alpha, ranks, client_weights, self.exponents)

    @property
    def averages_a_at_start(self) -> bool:
        """Whether the clients' independent A's are averaged before the first step ("round 0")."""
        return self.independent_init and self.has_global_adapter

    @property
    def has_global_adapter(self) -> bool:
        """Whether (A, mean B) means something: A is the same on all clients between rounds."""
        return any("A" in factors for factors in self.averaged) or not any(
            "A" in factors for factors in self.trained
        )


_AB: Factors = ("A", "B")
_LORA, _RSLORA, _SFED = EXPONENTS["lora"], EXPONENTS["rslora"], EXPONENTS["sfed"]

# Alpha is what each method's own formula makes of it: at r = 8 these give gamma = 2, 1.4 and,
# with N = 8, 2. RoLoRA begins with B: while B = 0 the gradient of A is zero.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sfed", (_AB,), (("A",),), _SFED, independent_init=True, alpha=2.0),
        Method("fedsa", (_AB,), (("A",),), _LORA, independent_init=False, alpha=16.0),
        Method("fedsa-rslora", (_AB,), (("A",),), _RSLORA, independent_init=False, alpha=4.0),
        Method("rolora", (("B",), ("A",)), (("B",), ("A",)), _LORA, False, alpha=16.0),
        Method("ffa", (("B",),), (("B",),), _LORA, independent_init=False, alpha=16.0),
        Method("fedit", (_AB,), (_AB,), _LORA, independent_init=False, alpha=16.0),
        Method("local", (_AB,), ((),), _LORA, independent_init=False, alpha=16.0),
    )
}
"""The methods by name, as ``federated.method`` takes them."""


def _named(name: str) -> Method:
    """A method of the table, or one of the user's."""
    if not is_own(name):
        return METHODS[name]
    method = load_own(name)
    if not isinstance(method, Method):
        raise ConfigError(
            f"federated.method = {name!r}: it is a {type(method).__name__}, not a sfed.Method"
        )
    if problem := _problem_of(method):
        raise ConfigError(f"federated.method = {name!r}: {problem}")
    return method


def _problem_of(method: Method) -> str | None:
    """What is wrong with a record that somebody has written."""
    for what, turns in (("trained", method.trained), ("averaged", method.averaged)):
        if not _are_turns(turns):
            return (
                f"{what} is {turns!r}; it has to hold the factors of each round in turn, such as "
                "(('A', 'B'),) for both in every round"
            )
    rounds = range(len(method.trained) * len(method.averaged))
    if any(set(method.averaged_in(i)) - set(method.trained_in(i)) for i in rounds):
        return "a round averages a factor that it does not train"
    if not all(isinstance(one, int | float) for one in (*method.exponents, method.alpha)):
        return "exponents and alpha have to be numbers"
    return None if method.alpha > 0 else f"alpha is {method.alpha}; it has to be above 0"


def _are_turns(turns: object) -> bool:
    return (
        isinstance(turns, Sequence)
        and bool(turns)
        and all(isinstance(one, tuple) and set(one) <= set(_AB) for one in turns)
    )


def resolve(config: Config) -> Method:
    """Return the configured method with the overrides for ablations applied.

    Raises:
        ConfigError: where an own method cannot be loaded or is no valid record.
        UserError: where gamma grows with N although no mean of independent A's shrinks with N:
            outputs would grow as N and gradients as sqrt(N).
    """
    base, lora = _named(config.federated.method), config.lora
    exponents = base.exponents
    if isinstance(lora.scaling, tuple):
        exponents = lora.scaling
    elif lora.scaling != "auto":
        exponents = EXPONENTS[lora.scaling]
    averaged = base.averaged
    if config.federated.averaged != "auto":
        if base.server_step is not None:
            raise ConfigError(
                f"federated.averaged={list(config.federated.averaged)}: the server step of "
                f"{base.name} takes the factors that its record names; leave it at auto"
            )
        averaged = (tuple(factor for factor in _AB if factor in config.federated.averaged),)
    method = replace(
        base,
        averaged=averaged,
        exponents=exponents,
        independent_init=(
            base.independent_init if lora.init == "auto" else lora.init == "independent"
        ),
        alpha=base.alpha if lora.alpha is None else lora.alpha,
    )
    if config.federated.optimizer_state == "keep" and not method.keeps_moments:
        raise ConfigError(
            f"federated.optimizer_state=keep: the server step of {method.name} changes the basis "
            "of the factors, so the moments of the optimizer mean nothing after it; leave "
            "federated.optimizer_state=auto"
        )
    if exponents[0] > 0 and not method.averages_a_at_start and not lora.allow_unstable:
        what = "one shared draw" if not method.independent_init else "no mean of A at the start"
        key = "lora.init=shared" if not method.independent_init else "a method that keeps A apart"
        raise UserError(
            f"{key} with a gamma that grows with N (N^{exponents[0]:g}): the factor makes up for "
            f"the variance that a mean of N independent draws of A loses, and with {what} nothing "
            "is lost, so the adapter's output would grow with N. Set lora.init=independent and "
            "average A, or set lora.scaling=rslora, or lora.allow_unstable=true to see it"
        )
    return method
