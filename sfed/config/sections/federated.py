"""The section of the federated method and its rounds. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from sfed.config import own_method
from sfed.config.fields import Count, CountOrZero, Location, Section, at_home

# What each server optimizer reads.
SERVER_KEYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fedavgm": ("server_lr", "server_beta1"),
    "fedadam": ("server_lr", "server_beta1", "server_beta2", "server_tau"),
    "fedyogi": ("server_lr", "server_beta1", "server_beta2", "server_tau"),
    "fedadagrad": ("server_lr", "server_beta1", "server_tau"),
}


class FederatedSection(Section):
    """The federated method and its rounds."""

    method: Annotated[str, BeforeValidator(at_home), AfterValidator(own_method.checked)] = "sfed"
    """Federated method: the factors that are trained and averaged, gamma and the initialization of
    A. One of sfed, fedsa, fedsa-rslora, rolora, ffa, fedit, local, flexlora, fedex, flora,
    hetlora; or FILE.py:NAME or package.module:NAME, a method of your own, whose code is run."""
    averaged: Literal["auto"] | tuple[Literal["A", "B"], ...] = "auto"
    """Factors that are averaged after each round, for ablations: [A], [B], [A, B] or []. auto = the
    method's own."""
    num_clients: Count | None = None
    """Number of clients N. null = one client per process; with partition.kind=by_file one per
    file."""
    join: Location | None = None
    """Folder of a finished run that new clients join: they take its A, which is frozen, and its
    gamma, and each trains B and its head alone. No mean is sent. null = the clients of this run are
    a federation of their own."""
    num_rounds: Count = 10
    """Number of rounds of the run, including the rounds before it was resumed. It may change when
    the run resumes: finished rounds keep their learning rates, and the schedule of those that
    follow is computed with the new number."""
    share_head: bool = False
    """Average the classification heads after each round. false = each client keeps its own head."""
    clients_per_round: Count | None = None
    """Number of clients that train in a round, drawn from the seed and the round; at most N. null =
    all."""
    sampling: Literal["auto", "fixed", "poisson"] = "auto"
    """How these clients are drawn: fixed = exactly as many; poisson = each client independently,
    so that their number varies, may be 0, and has the mean clients_per_round; auto = poisson under
    privacy, else fixed. Under privacy they are drawn from the secret key and not from the seed."""
    clients_per_pass: Count | Literal["auto"] | None = "auto"  # noqa: S105  (no password)
    """Maximum number of clients of a process in one forward and backward pass. auto = the fewest
    with 97 % of the best modelled speed, of as many as fit into memory; null = all clients of the
    process."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Weights of the clients in the federated mean: uniform = equal; examples = proportional to
    their numbers of training examples."""
    optimizer_state: Literal["auto", "keep", "reset"] = "auto"
    """keep = the moments of a client's optimizer are kept from round to round; reset = each round
    starts with new moments; auto = keep, unless the method's server step changes the basis of the
    factors."""
    prox_mu: float = Field(default=0.0, ge=0, le=1e6)
    """FedProx: adds prox_mu / 2 * ||w - w_received||^2 to the loss of a client, over the factors
    that it receives and trains; at least 0 and at most 1e6. 0 = no such term."""
    scaffold: bool = False
    """SCAFFOLD: corrects each gradient of the received factors by control variates of the client
    and of the server, before clipping and before the optimizer. A round sends twice the bytes."""
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "none"
    """Optimizer of the averaged factors: it steps from the values of the round before along the
    difference between the mean and them. none = the mean itself."""
    server_lr: float | None = Field(default=None, gt=0, le=1e3)
    """Learning rate of the server optimizer, above 0 and at most 1000. null = 1 with fedavgm, 1e-3
    with the others, where it is about the most that a number moves in a round."""
    server_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the server optimizer's momentum, at least 0 and below 1."""
    server_beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment of fedadam and fedyogi, at least 0 and below 1."""
    server_tau: float = Field(default=1e-3, ge=1e-12, le=1e3)
    """Degree of adaptivity of fedadam, fedyogi and fedadagrad, between 1e-12 and 1000: added to the
    root of the second moment, which starts at its square."""
    max_bad_rounds: CountOrZero = 3
    """Maximum number of rounds, at least 0, in which a client's loss, gradient or adapter is not
    finite. Such a client is reset to the start of the round and excluded from the mean; one more
    such round stops the run."""
    deadline_seconds: float = Field(default=600.0, gt=0, le=1e7)
    """Maximum time in seconds to wait for another process, above 0 and at most 1e7. After it the
    run stops and names the missing process."""

    @model_validator(mode="after")
    def _refuse_unread_server_keys(self) -> FederatedSection:
        read, fields = SERVER_KEYS[self.server_optimizer], type(self).model_fields
        for key in SERVER_KEYS["fedadam"]:
            if key not in read and (value := getattr(self, key)) != fields[key].default:
                kinds = ", ".join(kind for kind, keys in SERVER_KEYS.items() if key in keys)
                raise ValueError(
                    f"{key}={value:g} has no effect with server_optimizer="
                    f"{self.server_optimizer}; remove it, or set server_optimizer to {kinds}"
                )
        return self
