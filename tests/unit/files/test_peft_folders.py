"""What the files of a PEFT adapter say, and what of it is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from sfed.files import peft_folders
from sfed.files.names import adapter_folders
from sfed.files.peft_folders import PeftFolder, by_client, find, read
from sfed.utils.errors import ConfigError
from tests.support.peft_files import FACTORS, save

KEY = "lora.start_from"


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as mistake:
        find(folder, KEY)
    return str(mistake.value)


def test_an_adapter_is_read_without_its_values(tmp_path: Path):
    found = read(save(tmp_path / "a", files={"labels.json": '["x", 1]'}), KEY)
    assert (found.lora_rank, found.gamma, found.targets) == (2, 4.0, ("q_proj",))
    assert (found.layers, found.head, found.base_name) == (("layer.q_proj",), (), "meta/llama")
    assert (found.client, found.labels) == (None, ("x", 1))


@given(st.integers(1, 300), st.floats(1e-3, 1e6))
def test_gamma_is_that_of_peft(rank: int, alpha: float):
    for rslora in (False, True):
        _, gamma = peft_folders._rank_and_gamma(
            {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
        )
        assert gamma == (alpha / math.sqrt(rank) if rslora else alpha / rank)


def test_whatever_stock_peft_writes_of_plain_lora_is_read(tmp_path: Path):
    save(tmp_path / "a")
    for over in ({}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}, {"bias": "none"}):
        LoraConfig(r=2, target_modules=["q_proj"], **over).save_pretrained(tmp_path / "a")
        assert read(tmp_path / "a", KEY).gamma == 4.0  # its alpha is 8


KEYS = ("q_proj", "v_proj", "0.q_proj", "layers.1.q_proj", "^layers.1.v_proj", "^q_proj", "proj")
PATTERNS = st.dictionaries(st.sampled_from(KEYS), st.sampled_from((1, 2, 4)), max_size=4)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = [{"q_proj": nn.Linear(5, 7), "v_proj": nn.Linear(5, 7)} for _ in range(2)]
        self.layers = nn.ModuleList(map(nn.ModuleDict, pairs))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATTERNS, PATTERNS, st.booleans(), st.booleans())
def test_layers_have_the_ranks_and_gammas_that_stock_peft_gives_them(
    tmp_path: Path, ranks: dict[str, int], alphas: dict[str, int], same: bool, rslora: bool
):
    """Whichever of several keys names a layer; different gammas are refused."""
    alphas, rslora = (ranks, False) if same else (alphas, rslora)
    own = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rslora,
    )
    own.save_pretrained(tmp_path)  # which sorts the keys: PEFT takes the first of the file
    model = get_peft_model(Layers(), LoraConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    layers = [one for one in model.modules() if isinstance(one, LoraLayer)]
    gammas = sorted({one.scaling["default"] for one in layers})
    if gammas[-1] - gammas[0] > 1e-9:
        with pytest.raises(ConfigError, match="rank_pattern, alpha_pattern: layers differ in gam"):
            read(tmp_path)
        return
    found = read(tmp_path)
    assert found.ranks == tuple(sorted({one.r["default"] for one in layers}))
    assert (found.lora_rank, found.gamma) == (found.ranks[-1], pytest.approx(gammas[0], rel=1e-15))
    assert found.gamma == 1.0 or not same


def test_layers_that_differ_in_gamma_are_named_with_both(tmp_path: Path):
    shapes = {**FACTORS, "v_proj.lora_A.weight": (1, 5), "v_proj.lora_B.weight": (7, 1)}
    said = refusal(save(tmp_path / "a", shapes, rank_pattern={"v_proj": 1}))
    assert "which is 4 of layer.q_proj and 8 of layer.v_proj" in said
    assert said.endswith("or score the adapter with PEFT")


def test_a_refusal_of_a_long_value_still_says_the_remedy(tmp_path: Path):
    said = refusal(save(tmp_path / "a", loftq_config={"something": list(range(500))}))
    assert "loftq_config = {'something': [0, 1" in said and "save an adapter of plain LoRA" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("rank_pattern", [4]),
        ("rank_pattern", {"[qv]_proj": 2}),
        ("alpha_pattern", "q_proj"),
        ("alpha_pattern", {"(a+)+": 8}),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.w1"]),
        ("lora_bias", True),
        ("something_of_a_later_version", 1.5),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, name: str, value: object):
    said = refusal(save(tmp_path / "a", **{name: value}))
    assert said.startswith(f"{KEY}: the adapter {tmp_path / 'a'}: {name}")


@pytest.mark.parametrize(
    ("over", "rest"),
    [
        ({"r": 0}, "r = 0 is no rank"),
        ({"r": True}, "r = True is no rank"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is not a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha = '8' is not"),
        ({"r": 3}, "layer.q_proj.lora_A.weight has the shape [2, 5] and r is 3"),
        ({"rank_pattern": {"q_proj": 4}}, "lora_A.weight has the shape [2, 5] and r is 4"),
        ({"rank_pattern": {"q_proj": 2.0}}, "r = 2.0 is no rank"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha = None is not a number above 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, over: dict, rest: str):
    assert rest in refusal(save(tmp_path / "a", **over))


@pytest.mark.parametrize(
    ("shapes", "rest"),
    [
        ({"q_proj.lora_A.weight": (2, 5)}, "layer.q_proj lacks A or B"),
        ({}, "holds no A and B"),
        ({**FACTORS, "e.lora_embedding_A": (2, 9)}, "'layer.e.lora_embedding_A' is not supported"),
        ({**FACTORS, "q_proj.lora_magnitude_vector": (7,)}, "lora_magnitude_vector' is not"),
        ({**FACTORS, "q_proj.lora_A.weight": (2, 5, 1)}, "has the shape [2, 5, 1]"),
    ],
)
def test_tensors_that_are_no_plain_lora_are_refused(tmp_path: Path, shapes: dict, rest: str):
    assert rest in refusal(save(tmp_path / "a", shapes))


def test_integers_are_no_factors(tmp_path: Path):
    assert "of I32 is none of LoRA" in refusal(save(tmp_path / "a", dtype=np.int32))


def test_files_that_are_damaged_or_missing_are_named(tmp_path: Path):
    folder = save(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert str(folder) in refusal(folder)
    path.rename(folder / "adapter_model.bin")
    said = refusal(folder)
    assert "adapter_model.safetensors is missing; adapter_model.bin is there" in said
    (folder / "adapter_config.json").write_text("[1]")
    assert "adapter_config.json holds list, not an object" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")
    said = refusal(folder)
    assert str(folder) in said and "adapter_config.json is damaged, it is not JSON" in said


def test_a_folder_without_adapters_says_where_they_may_be(tmp_path: Path):
    assert "the folder does not exist" in refusal(tmp_path / "none")
    (tmp_path / "run" / "adapters").mkdir(parents=True)
    assert f"did you mean {tmp_path / 'run' / 'adapters'}?" in refusal(tmp_path / "run")


def test_excluded_layers_are_not_among_the_targets(tmp_path: Path):
    found = read(save(tmp_path / "a", exclude_modules=["lm_head"]), KEY)
    assert found.targets == ("layer.q_proj",)


def test_a_digest_is_that_of_both_files(tmp_path: Path):
    digest = read(save(tmp_path / "a"), KEY).digest()
    assert read(save(tmp_path / "b"), KEY).digest() == digest
    assert read(save(tmp_path / "c", lora_alpha=9), KEY).digest() != digest
    assert read(save(tmp_path / "d", dtype=np.float16), KEY).digest() != digest


# --- whose is which -------------------------------------------------------------------------------


def adapter(name: str, client: str | None = None) -> PeftFolder:
    return PeftFolder(Path("adapters") / name, 2, 4.0, ("q_proj",), "", {}, client)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8, unique=True))
def test_each_client_gets_back_what_was_exported_under_its_name(names: list[str]):
    folders = adapter_folders(names)
    found = [adapter(f, n or None) for f, n in zip(folders, names, strict=True)]
    mine = by_client(found[::-1], names, folders, "key")
    assert [one.path.name for one in mine] == folders


def test_a_folder_that_says_its_client_is_of_no_other(tmp_path: Path):
    found = [adapter("a-b", "a/b")]
    with pytest.raises(ConfigError, match="no adapter there: 'a b'; the adapters are of 'a/b'"):
        by_client(found, ["a b"], ["a-b"], "key")
    with pytest.raises(ConfigError, match="no adapter there: 'a b'"):
        by_client([adapter("other", "a-b")], ["a b"], ["a-b"], "key")
    assert by_client([adapter("a-b")], ["a b"], ["a-b"], "key")[0].path.name == "a-b"


def test_two_adapters_of_one_client_are_refused():
    with pytest.raises(ConfigError, match="a and b are both of client 'x'"):
        by_client([adapter("a", "x"), adapter("b", "x")], ["x"], ["x"], "key")
