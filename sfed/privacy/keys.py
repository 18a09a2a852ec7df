"""The secret of a run: a key of the system's entropy, and what is drawn from it. Needs no torch.

A run's ``seed`` stands in its folder, which people publish: whoever reads it could subtract noise
that is drawn from it, and would know the cohorts. So both come from a key in a file of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from sfed.privacy.accounting import Sampling
from sfed.utils import files
from sfed.utils.errors import CheckpointError, UserError

_BYTES = 32
_NUMBERS_AT_A_TIME = 2**18


@dataclass(frozen=True)
class Key:
    """A secret key and its public name."""

    name: str
    """16 hexadecimal digits, which stand in the ledger."""
    secret: bytes = field(repr=False)
    """32 bytes."""

    @staticmethod
    def new() -> Key:
        """Draw a key from the operating system's entropy."""
        return Key(secrets.token_hex(8), secrets.token_bytes(_BYTES))

    @staticmethod
    def read(folder: Path, name: str) -> Key:
        """Read the key of a run that is resumed.

        Raises:
            CheckpointError: where it is not there, is no key, or others may read it.
        """
        path = _path(folder, name)
        remedy = (
            "put it back, or set privacy.key_folder to where it is; without it the noise of a "
            "repeated round would be another"
        )
        try:
            mode, secret = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"the key of this run, {path}, cannot be read ({error.strerror}); {remedy}"
            ) from None
        if len(secret) != _BYTES:
            raise CheckpointError(
                f"{path} holds {len(secret)} bytes and a key {_BYTES}, so it is damaged; {remedy}"
            )
        if mode & 0o077:
            raise CheckpointError(
                f"{path} has mode {mode:04o}, so others may have read the key of this run; set it "
                "to 0600 if nobody has, or begin anew with output.resume=never"
            )
        return Key(name, secret)

    def write(self, folder: Path) -> None:
        """Write the key to a new file of mode 0600, in a folder that git leaves alone.

        Raises:
            UserError: where it cannot be written.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")
            path = _path(folder, self.name)
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(opened, "wb") as file:
                file.write(self.secret)
                file.flush()
                os.fsync(file.fileno())
            files.sync(folder)
        except OSError as error:
            raise UserError(
                f"privacy.key_folder: the key of the run cannot be written to {folder} "
                f"({error.strerror}); make room, or name another folder"
            ) from None

    def derive(self, purpose: str, *parts: bytes) -> bytes:
        """Return 32 bytes that are random to who does not know the key.

        Args:
            purpose: at most 16 letters; other purposes get independent bytes.
            parts: on which the bytes depend; all but the last of a fixed length.
        """
        return _derived(self.secret, purpose, *parts)


def _derived(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    blake = hashlib.blake2b(key=secret, person=purpose.encode(), digest_size=32)
    for part in parts:
        blake.update(part)
    return blake.digest()


def _path(folder: Path, name: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        raise CheckpointError(f"the ledger names the key {name!r}, which is no name of a key")
    return folder / f"{name}.key"


def draw_cohort(secret: bytes, round_index: int, sampling: Sampling) -> tuple[int, ...]:
    """Return the sorted cohort of a 0-based round; of a Poisson one perhaps nobody.

    Args:
        secret: on which the draws depend.
        round_index: of the round.
        sampling: how they are drawn.
    """
    everyone = range(sampling.num_clients)
    if sampling.is_everyone:
        return tuple(everyone)
    words = [np.array([round_index, client], dtype="<u8").tobytes() for client in everyone]
    draws = [int.from_bytes(_derived(secret, "client", one)[:8], "little") for one in words]
    if sampling.is_poisson:
        # u / 2^64 < m / N in whole numbers.
        most = sampling.cohort * 2**64
        return tuple(client for client in everyone if draws[client] * sampling.num_clients < most)
    first = sorted(everyone, key=lambda client: (draws[client], client))[: sampling.cohort]
    return tuple(sorted(first))


def standard_normal(secret: bytes, count: int) -> Iterator[NDArray[np.float64]]:
    """Yield ``count`` numbers of a standard normal distribution, in parts.

    The inverse distribution function of uniform numbers of 52 bits, which SHAKE-256 makes of the
    secret. The bits are cryptographic; the numbers are floating-point approximations.
    """
    for part, start in enumerate(range(0, count, _NUMBERS_AT_A_TIME)):
        size = min(_NUMBERS_AT_A_TIME, count - start)
        stream = hashlib.shake_256(secret + part.to_bytes(8, "little")).digest(8 * size)
        bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52  # exact, and neither 0 nor 1
        yield np.asarray(ndtri(uniform), dtype=np.float64)
