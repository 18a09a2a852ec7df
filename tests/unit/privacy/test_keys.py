"""The key's file, the cohorts and the noise that are drawn from it."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sfed.privacy import keys
from sfed.privacy.accounting import Sampling
from sfed.privacy.keys import Key
from sfed.utils.errors import CheckpointError, UserError

SECRET = bytes(range(32))


def test_a_key_is_the_systems_entropy_in_a_file_of_its_own_that_others_cannot_read(
    tmp_path: Path,
) -> None:
    key, other = Key.new(), Key.new()
    assert key.secret != other.secret and key.name != other.name
    assert len(key.secret) == 32 and repr(key.secret) not in repr(key)
    folder = tmp_path / "runs" / ".keys"
    key.write(folder)
    path = folder / f"{key.name}.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".gitignore").read_text() == "*\n"
    assert Key.read(folder, key.name) == key
    with pytest.raises(UserError, match=r"privacy\.key_folder"):
        key.write(folder)  # a key is never written over


def test_a_key_that_is_gone_damaged_or_open_to_others_is_refused(tmp_path: Path) -> None:
    key = Key.new()
    with pytest.raises(CheckpointError, match=r"No such file.*privacy\.key_folder"):
        Key.read(tmp_path, key.name)
    key.write(tmp_path)
    path = tmp_path / f"{key.name}.key"
    path.chmod(0o644)
    with pytest.raises(CheckpointError, match="mode 0644"):
        Key.read(tmp_path, key.name)
    path.chmod(0o600)
    path.write_bytes(key.secret[:31])
    with pytest.raises(CheckpointError, match="31 bytes"):
        Key.read(tmp_path, key.name)
    with pytest.raises(CheckpointError, match="no name of a key"):
        Key.read(tmp_path, "../../etc/passwd")


def test_each_purpose_and_each_part_gets_bytes_of_its_own() -> None:
    key = Key("0" * 16, SECRET)
    derived = [key.derive("noise", b"1"), key.derive("tag", b"1"), key.derive("noise", b"2")]
    derived.append(Key("0" * 16, SECRET[::-1]).derive("noise", b"1"))
    assert len(set(derived)) == 4


@pytest.mark.parametrize("is_poisson", [True, False])
def test_a_client_is_drawn_in_its_share_of_rounds_and_the_key_decides(is_poisson: bool) -> None:
    sampling = Sampling(10, 3, is_poisson)
    cohorts = [keys.draw_cohort(SECRET, number, sampling) for number in range(2000)]
    shares = np.bincount([client for one in cohorts for client in one], minlength=10) / 2000
    np.testing.assert_allclose(shares, 0.3, atol=0.04)
    sizes = {len(one) for one in cohorts}
    assert (sizes == {3}) is not is_poisson
    assert (0 in sizes) is is_poisson  # 0.7 ** 10 of the rounds
    assert cohorts == [keys.draw_cohort(SECRET, number, sampling) for number in range(2000)]
    others = [keys.draw_cohort(SECRET[::-1], number, sampling) for number in range(2000)]
    assert sum(one == other for one, other in zip(cohorts, others, strict=True)) < 200
    assert all(list(one) == sorted(one) for one in cohorts)


def test_poisson_draws_of_clients_are_independent() -> None:
    """The sizes of cohorts are binomial: a fixed or a clustered draw has another variance."""
    sampling = Sampling(20, 5, is_poisson=True)
    sizes = [len(keys.draw_cohort(SECRET, number, sampling)) for number in range(3000)]
    assert abs(np.mean(sizes) - 5) < 0.15
    assert abs(np.var(sizes) - 20 * 0.25 * 0.75) < 0.35


@pytest.mark.parametrize("is_poisson", [True, False])
def test_without_sampling_everybody_takes_part(is_poisson: bool) -> None:
    assert keys.draw_cohort(SECRET, 5, Sampling(4, 4, is_poisson)) == (0, 1, 2, 3)


@pytest.mark.parametrize(("byte", "sign"), [(b"\x00", -1), (b"\xff", 1)])
def test_the_rarest_noise_is_finite(
    monkeypatch: pytest.MonkeyPatch, byte: bytes, sign: int
) -> None:
    class Constant:
        def digest(self, size: int) -> bytes:
            return byte * size

    monkeypatch.setattr(keys.hashlib, "shake_256", lambda _: Constant())
    [noise] = keys.standard_normal(SECRET, 3)
    np.testing.assert_allclose(noise, sign * 8.2095, atol=1e-3)


def test_the_noise_is_standard_normal() -> None:
    count = 2**18 + 5
    parts = list(keys.standard_normal(SECRET, count))
    noise = np.concatenate(parts)
    assert len(noise) == count and len(parts) == 2
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.005
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01
    assert len(np.unique(noise)) > count - 5  # no part is drawn twice
    other = next(keys.standard_normal(SECRET[::-1], 1000))
    assert abs(np.corrcoef(noise[:1000], other)[0, 1]) < 0.15
