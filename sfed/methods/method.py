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
flexlora   A, B                        SVD of product   alpha/r           shared
fedex      A, B                        A, B, rest in W0 alpha/r           shared
flora      A, B, new in each round     product in W0    alpha/r           shared
hetlora    A, B                        A, B             alpha/r           shared
========== =========================== ================ ================= ============

SFed-LoRA arXiv 2603.08058; FedSA-LoRA 2410.01463; RoLoRA 2502.01755; FFA-LoRA 2403.12313;
FedIT 2305.05644; FlexLoRA 2402.11505; FedEx-LoRA 2410.09432; FLoRA 2409.05976; HetLoRA 2401.06432.
Exact definitions in the tests. A method of one's own is such a record in a file of one's own:
``federated.method = FILE.py:NAME``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sfed.clients.local_layer import LocalTerm
from sfed.config.own_method import is_own
from sfed.config.schema import Config
from sfed.methods.own import load_named
from sfed.methods.product import fedex, flexlora, flora, norm_of_products
from sfed.methods.scaling import EXPONENTS, client_scalings
from sfed.methods.server import ClientMeasure, ServerStep
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
    is_alone: bool = False
    """Whether clients have joined a finished federation, each by itself: nothing of an adapter is
    sent, not even to evaluate."""
    local_term: LocalTerm | None = None
    """The gradient of a further term of each client's loss; None = the loss of the data alone."""
    weighed_by: ClientMeasure | None = None
    """Clients count in proportion to this measure of what they have trained; None = as
    ``federated.weighting`` says."""
    changes_base: bool = False
    """Whether the server step returns changes of the frozen weights (``base_change``)."""
    mixed_ranks: bool = False
    """Whether the server step and ``weighed_by`` take clients of different LoRA ranks, with zeros
    beyond them. The weighted mean does."""
    zero_padded: bool = False
    """Whether rows that a client of a smaller LoRA rank lacks count as zeros in the mean; else a
    row is the mean over its holders."""
    keeps_product: bool = False
    """Whether what is common stands for its product with gamma of the largest LoRA rank: a client
    of another gamma gets B times the quotient of both gammas."""

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
        if len(set(ranks)) > 1 and (reason := self._why_one_rank()):
            raise ConfigError(
                f"federated.method = {self.name!r}: {reason}; set one rank for all clients"
            )
        return client_scalings(self.alpha, ranks, client_weights, self.exponents)

    def _why_one_rank(self) -> str | None:
        """Why it takes no clients of different LoRA ranks; None where it does."""
        if self.local_term is not None:
            return "its local term takes one gamma, so clients of different LoRA ranks have none"
        measures = self.server_step is not None or self.weighed_by is not None
        if measures and not self.mixed_ranks:
            of = "server step" if self.server_step is not None else "weight of a client"
            return (
                f"its {of} does not say that it takes clients of different LoRA ranks "
                "(Method.mixed_ranks)"
            )
        if self.zero_padded and self.exponents[0] != 0:
            return (
                "its mean counts rows that a client lacks as zeros, which shrinks them in every "
                "round, so no gamma that grows with N is right with different LoRA ranks"
            )
        return None

    @property
    def received(self) -> Factors:
        """Factors that train and are the same on all clients at the start of every round.

        They have a value that was received; what a client keeps apart has none.
        """
        trained = {factor for factors in self.trained for factor in factors}
        return tuple(f for f in _AB if f in trained and not self.keeps_apart(f))

    @property
    def averages_a_at_start(self) -> bool:
        """Whether the clients' independent A's are averaged before the first step ("round 0")."""
        return self.independent_init and self.has_global_adapter

    @property
    def has_global_adapter(self) -> bool:
        """Whether (A, mean B) means something: A is the same on all clients between rounds."""
        averages_a = any("A" in factors for factors in self.averaged)
        trains_a = any("A" in factors for factors in self.trained)
        return not self.is_alone and (averages_a or not trains_a)

    @property
    def needs_common_a(self) -> bool:
        """Whether all clients have to start with the same A: its mean is not the first thing.

        Such a method averages B at a time when A is taken to be the same on all clients.
        """
        return not self.keeps_apart("A") and "A" not in self.averaged_in(0) and not self.is_alone

    @property
    def common(self) -> Factors:
        """The factors that are the same on all clients when a run is finished."""
        return tuple(factor for factor in _AB if not self.keeps_apart(factor))

    def joined(self) -> Method:
        """What clients do that join a finished run of this method: A is frozen, B is their own."""
        return replace(
            self, trained=(("B",),), averaged=((),), independent_init=False, is_alone=True
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
        Method(
            *("flexlora", (_AB,), (_AB,), _LORA, False, 16.0, flexlora),
            keeps_moments=False,
            mixed_ranks=True,
            keeps_product=True,
        ),
        Method(
            *("fedex", (_AB,), (_AB,), _LORA, False, 16.0, fedex),
            keeps_moments=False,
            changes_base=True,
        ),
        Method(
            *("flora", (_AB,), (_AB,), _LORA, False, 16.0, flora),
            keeps_moments=False,
            changes_base=True,
            mixed_ranks=True,
        ),
        Method(
            *("hetlora", (_AB,), (_AB,), _LORA, False, 16.0),
            weighed_by=norm_of_products,
            mixed_ranks=True,
            zero_padded=True,
        ),
    )
}
"""The methods by name, as ``federated.method`` takes them."""


def _named(name: str) -> Method:
    """A method of the table, or one of the user's."""
    if not is_own(name):
        return METHODS[name]
    method = load_named(name, "federated.method")
    if not isinstance(method, Method):
        raise ConfigError(
            f"federated.method = {name!r}: it is a {type(method).__name__}, not a sfed.Method"
        )
    if problem := _problem_of(method):
        raise ConfigError(f"federated.method = {name!r}: {problem}")
    return method


def _refuse_against_step(config: Config, base: Method) -> None:
    """Refuse overrides that a method's server step leaves without a meaning."""
    if config.federated.averaged != "auto" and base.server_step is not None:
        raise ConfigError(
            f"federated.averaged={list(config.federated.averaged)}: the server step of "
            f"{base.name} takes the factors that its record names; leave it at auto"
        )
    if config.federated.optimizer_state == "keep" and not base.keeps_moments:
        raise ConfigError(
            f"federated.optimizer_state=keep: the server step of {base.name} changes the basis "
            "of the factors, so the moments of the optimizer mean nothing after it; leave it at "
            "auto"
        )


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

    Adapters on disk (``lora.start_from``, ``federated.join``) bring their own A and gamma, so then
    neither ``lora.init`` nor the exponents count.

    Raises:
        ConfigError: where an own method cannot be loaded or is no valid record, or where a key
            contradicts the method.
        UserError: where gamma grows with N although no mean of independent A's shrinks with N:
            outputs would grow as N and gradients as sqrt(N).
    """
    base, lora = _named(config.federated.method), config.lora
    _refuse_against_step(config, base)
    exponents = base.exponents
    if isinstance(lora.scaling, tuple):
        exponents = lora.scaling
    elif lora.scaling != "auto":
        exponents = EXPONENTS[lora.scaling]
    averaged = base.averaged
    if config.federated.averaged != "auto":
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
    _refuse_contradictions(config, method)
    if config.federated.join is not None:
        method = method.joined()
    elif config.lora.start_from is not None:
        method = replace(method, independent_init=False)
    _require_received(config, method)
    if config.federated.join is not None or config.lora.start_from is not None:
        return method
    if not lora.allow_unstable:
        _refuse_growing_gamma(method)
    return method


def _refuse_growing_gamma(method: Method) -> None:
    """Refuse a gamma that grows with N where A is no mean of N independent draws."""
    power = method.exponents[0]
    if power <= 0:
        return
    law = (
        f"with a gamma that grows with N (N^{power:g}): the factor makes up for the variance that "
        "a mean of N independent draws of A loses"
    )
    if method.server_step is not None:
        raise UserError(
            f"federated.method={method.name} {law}, and here a server step makes A. Set "
            "lora.scaling=rslora, or lora.allow_unstable=true to see it"
        )
    if not method.averages_a_at_start:
        what = "one shared draw" if not method.independent_init else "no mean of A at the start"
        key = "lora.init=shared" if not method.independent_init else "a method that keeps A apart"
        raise UserError(
            f"{key} {law}, and with {what} nothing is lost, so the adapter's output would grow "
            "with N. Set lora.init=independent and average A, or set lora.scaling=rslora, or "
            "lora.allow_unstable=true to see it"
        )


def refuse_mixed_ranks(config: Config, ranks: Sequence[int]) -> None:
    """Refuse keys that have no meaning, or none that was shown, where LoRA ranks (N,) differ.

    Raises:
        ConfigError: naming the key.
    """
    if len(set(ranks)) == 1:
        return
    reasons = []
    if config.federated.scaffold:
        reasons.append(
            "federated.scaffold=true: the server's control variate is the mean over all clients, "
            "and a row of a factor is held by some"
        )
    if config.privacy.is_on:
        reasons.append(
            f"privacy.clip={config.privacy.clip:g}: a mean over the holders of a row divides by "
            "their number, so a client moves it by more than the noise is made for"
        )
    if reasons:
        remedy = "; set one LoRA rank for all clients, or remove the key"
        raise ConfigError("\n".join(reason + remedy for reason in reasons))


def check_joinable(run: Config, folder: str) -> Factors:
    """Return what the clients of a finished run have in common: A, and perhaps B.

    Args:
        run: its configuration.
        folder: of the run, for the error.

    Raises:
        ConfigError: where its clients have no A in common.
    """
    method = resolve(run)
    if method.changes_base:
        raise ConfigError(
            f"federated.join = {folder!r}: federated.method={run.federated.method} has changed the "
            "frozen weights, and a client that joins trains on the original ones"
        )
    if "A" in method.common:
        return method.common
    known = [name for name, one in METHODS.items() if "A" in one.common and not one.changes_base]
    raise ConfigError(
        f"federated.join = {folder!r}: federated.method={run.federated.method} with "
        f"federated.averaged={_words(run.federated.averaged)} leaves each client an A of its own, "
        "so there is none to join with; a client can join a run whose clients share A, such as one "
        f"of {', '.join(known)}"
    )


def _words(averaged: str | tuple[str, ...]) -> str:
    return averaged if isinstance(averaged, str) else f"[{', '.join(averaged)}]"


def keys_of_received(config: Config) -> list[str]:
    """The keys that are set and compare what a client has received with what it holds."""
    federated = config.federated
    asked = {
        f"federated.prox_mu={federated.prox_mu:g}": federated.prox_mu > 0,
        "federated.scaffold=true": federated.scaffold,
        f"federated.server_optimizer={federated.server_optimizer}": (
            federated.server_optimizer != "none"
        ),
    }
    return [key for key, is_set in asked.items() if is_set]


def _require_received(config: Config, method: Method) -> None:
    """Refuse terms and optimizers of received factors with a method that they mean nothing for."""
    federated, keys = config.federated, keys_of_received(config)
    if keys and not method.received and not federated.share_head:
        raise ConfigError(
            f"{keys[0]}: no factor that trains with {method.name} is the same on all clients at "
            "the start of a round, and the key is about such factors; remove it, or set "
            "federated.method or federated.averaged to one that averages"
        )
    of_means = [key for key in keys if "prox_mu" not in key]
    if of_means and method.server_step is not None:
        raise ConfigError(
            f"{of_means[0]}: {method.name} has a server step of its own, and this needs weighted "
            "means; remove it"
        )
    if federated.server_optimizer == "none":
        return
    averaged = {factor for factors in method.averaged for factor in factors}
    if apart := sorted(factor for factor in averaged if method.keeps_apart(factor)):
        raise ConfigError(
            f"{keys[-1]}: {method.name} averages {apart[0]} in some rounds only, and clients hold "
            "their own before, so there is no common value that a server optimizer could step "
            "from; set federated.server_optimizer=none"
        )


def _refuse_contradictions(config: Config, method: Method) -> None:
    """Refuse keys that ask for what the record of the method excludes."""
    if config.federated.weighting != "uniform" and method.weighed_by is not None:
        raise ConfigError(
            f"federated.weighting={config.federated.weighting}: {method.name} weights its clients "
            "by what they have trained, not by their examples; leave federated.weighting=uniform"
        )
    if method.changes_base and (key := _keeps_weights_elsewhere(config)):
        raise ConfigError(
            f"{key}: {method.name} changes the frozen weights, which is not supported there; leave "
            "the key out, or choose a method that changes no weight, such as flexlora"
        )


_ZERO_KEYS_OF_COPIES = (
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
)
"""Keys of DeepSpeed with which weights are not, or not only, in the shards on the device."""


def _keeps_weights_elsewhere(config: Config) -> str | None:
    """The key with which frozen weights are somewhere else than in replicas or plain shards."""
    if config.backbone.compute != "full":
        return f"backbone.compute={config.backbone.compute}"
    if config.backbone.offload != "none":
        return f"backbone.offload={config.backbone.offload}"
    zero = config.backbone.deepspeed.get("zero_optimization")
    keys = zero if isinstance(zero, dict) else {}
    found = [key for key in _ZERO_KEYS_OF_COPIES if keys.get(key)]
    return f"backbone.deepspeed.zero_optimization.{found[0]}" if found else None
