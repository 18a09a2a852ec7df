"""Tests of what a checkpoint may be resumed with."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfed.config.diff import comparable
from sfed.config.load import validate
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.storage.resume import find, refuse_other_run
from sfed.utils.errors import CheckpointError

DATA = {"task": "glue", "name": "sst2", "train_files": "rows.jsonl"}


@pytest.mark.parametrize("key", ["train.class_weights", "data.columns", "data.labels"])
def test_a_key_that_an_older_version_did_not_have_is_at_its_default(key):
    config = validate({"data": DATA})
    kept = {name: value for name, value in comparable(config, 4).items() if name != key}
    found = CheckpointRef(Path("run/checkpoints/round-000001"), {"config": kept})
    refuse_other_run(found, config, 4)
    changed = validate({"data": DATA, "train": {"class_weights": "balanced"}})
    with pytest.raises(CheckpointError, match=r"train\.class_weights: 'none' there"):
        refuse_other_run(found, changed, 4)


def test_a_run_folder_in_the_place_of_a_checkpoint_is_answered_with_its_checkpoint(tmp_path):
    newest = tmp_path / "run" / "checkpoints" / "round-000002"
    newest.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"run.json is missing; its newest .* {newest}"):
        find(tmp_path / "new", str(tmp_path / "run"))
