"""The section ``partition``: which examples each client gets. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from sfed.config.fields import Section


class PartitionSection(Section):
    """Assignment of examples to clients."""

    kind: Literal["iid", "dirichlet", "by_key", "by_file"] = "iid"
    """How examples are assigned to clients: iid = at random; dirichlet = label skew; by_key = one
    value of the column partition.key per client, with its name; by_file = one file per client, with
    its name; N follows from the files."""
    concentration: PositiveFloat = 0.5
    """Concentration of the Dirichlet distribution, above 0: a small value gives skewed shares, a
    large value even ones. Used with partition.kind=dirichlet."""
    key: str | None = None
    """Column for by_key and dirichlet. null with dirichlet = the class of an example; where
    examples have no class, their length in quantiles. Values keep their types: 1 and "1" differ."""
