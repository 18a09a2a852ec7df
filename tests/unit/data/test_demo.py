"""Tests of the embedded demo: its generated problems and its tiny backbone."""

import json
import operator
import re
from itertools import islice
from pathlib import Path

import pytest

from sfed.data import demo
from sfed.models import demo as demo_model
from tests.support import launchers

ANNOTATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
TINY = demo_model.Recipe(width=16, layers=1, heads=2, intermediate=32, steps=3, warmup=1, batch=4)


@pytest.fixture
def backbone() -> Path:
    return demo_model.FOLDER


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def texts_of(row: dict[str, str]) -> tuple[str, str]:
    return f"Question: {row['question']}\nAnswer:", f" {row['answer']}"


def run_python(code: str, **environment: str) -> str:
    return launchers.python("-c", code, env=launchers.environment(**environment), check=True).stdout


def test_there_are_eight_distinct_kinds():
    assert len(demo.KINDS) == len(set(demo.KINDS)) == 8


def test_importing_the_module_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'tokenizers'}"
    assert run_python(f"import sys, sfed.data.demo; print({heavy} & set(sys.modules))") == "set()\n"


def problems(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    return list(islice(demo.stream(kind, seed), count))


@pytest.mark.parametrize("kind", demo.KINDS)
def test_problems_depend_on_kind_and_seed_only(kind):
    again = problems(kind, 50, 3)
    assert problems(kind, 50, 3) == again
    assert problems(kind, 20, 3) == again[:20]
    assert problems(kind, 50, 4) != again
    assert {row["kind"] for row in again} == {kind}


def test_problems_are_the_same_in_every_process():
    code = (
        "from itertools import islice; from sfed.data import demo;"
        "print(list(islice(demo.stream('change', 1), 5)))"
    )
    printed = {run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert printed == {f"{problems('change', 5, 1)}\n"}


def test_unknown_kind_and_split_are_refused():
    with pytest.raises(KeyError):
        problems("poetry", 1, 0)
    with pytest.raises(ValueError, match="split"):
        demo.rows("test", 1, 0)


@pytest.mark.parametrize("kind", demo.KINDS)
def test_every_annotation_is_right_and_the_last_line_has_the_result(kind):
    for row in problems(kind, 500, 0):
        steps = ANNOTATION.findall(row["answer"])
        assert len(steps) == row["answer"].count("<<") >= 1
        for left, sign, right, result, repeated in steps:
            assert OPERATIONS[sign](int(left), int(right)) == int(result) == int(repeated) > 0
        assert row["answer"].splitlines()[-1] == f"#### {steps[-1][3]}"


@pytest.mark.parametrize("kind", demo.KINDS)
def test_the_numbers_of_an_answer_come_from_the_question_or_an_earlier_step(kind):
    for row in problems(kind, 200, 0):
        known = set(re.findall(r"\d+", row["question"]))
        for left, _, right, result, _ in ANNOTATION.findall(row["answer"]):
            assert {left, right} <= known
            known.add(result)


@pytest.mark.parametrize("kind", demo.KINDS)
def test_questions_are_distinct_and_no_placeholder_is_left(kind):
    made = problems(kind, 2000, 0)
    assert len({row["question"] for row in made}) == 2000
    assert not any(set("{}|") & set(row["question"] + row["answer"]) for row in made)


def test_an_exhausted_kind_repeats_questions_instead_of_hanging(monkeypatch):
    monkeypatch.setattr(demo, "_draw", lambda house, rng: ("1 + 1?", [(1, "+", 1, 2)], "apples"))
    assert len(problems("sums", 3, 0)) == 3


def test_rows_hold_all_kinds_in_order():
    kinds = [row["kind"] for row in demo.rows("train", 3, 0)]
    assert kinds == [kind for kind in demo.KINDS for _ in range(3)]


def test_train_and_eval_share_no_question_for_any_seeds():
    train = {row["question"] for seed in (0, 1) for row in demo.rows("train", 1000, seed)}
    held_out = {row["question"] for seed in (0, 2) for row in demo.rows("eval", 500, seed)}
    assert train and held_out and not train & held_out


def test_clients_answer_the_same_situation_differently():
    problem = ("", [(12, "+", 5, 17)], "eggs")
    answers = {demo._answer(problem, house, house, house) for house in demo.HOUSES.values()}
    assert len(answers) == 8


def test_every_client_has_shared_situations_too():
    for kind in demo.KINDS:
        shared = [" gets " in row["question"] for row in problems(kind, 400, 0)]
        assert 0.05 < sum(shared) / len(shared) < 0.3


def test_pretraining_shows_no_held_out_question_and_no_house_style():
    texts = demo.pretraining_texts(TINY.problems_per_kind, TINY.remarks, TINY.seed)
    asked = [text for text in texts if text.startswith("Question: ")]
    held_out = {row["question"] for row in demo.rows("eval", 500, 0)}
    assert not held_out & {re.split("Question: |\n", text)[1] for text in asked}
    style = r"\nAnswer: (\d+ [-+*/] \d+ = <<[^>]*>>\d+\n)+#### \d+"
    assert all(re.search(style, text) for text in asked)


def test_backbone_loads_as_a_causal_language_model(backbone):
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), load_tokenizer(backbone)
    assert model.config.model_type == "llama" and model.dtype == torch.float16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_tokenizer_round_trip_of_rows_and_of_any_text(backbone):
    tokenizer = load_tokenizer(backbone)
    texts = ["".join(texts_of(row)) for row in demo.rows("eval", 20, 0)]
    for text in [*texts, "  é\t漢字 7 , x!\n\n12: 3 "]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_a_digit_is_always_one_and_the_same_token(backbone):
    tokenizer = load_tokenizer(backbone)
    numbers = tokenizer.encode("1 has 12 of 12=(12) #### 12", add_special_tokens=False)
    digits = [token for token in tokenizer.convert_ids_to_tokens(numbers) if token.isdigit()]
    assert digits == list("112121212")
    assert sum(any(map(str.isdecimal, token)) for token in tokenizer.get_vocab()) == 10


def test_prompt_and_completion_are_short_and_tokenize_apart_as_together(backbone):
    tokenizer = load_tokenizer(backbone)
    lengths = []
    for row in demo.rows("train", 100, 0):
        prompt, completion = texts_of(row)
        apart = tokenizer.encode(prompt) + tokenizer.encode(completion, add_special_tokens=False)
        assert apart == tokenizer.encode(prompt + completion)
        lengths.append(len(apart) + 1)
    assert max(lengths) <= 80


def test_the_backbone_of_the_package_is_small_and_its_recipe_is_the_one_of_today() -> None:
    files = list(demo_model.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    said = json.loads((demo_model.FOLDER / demo_model.DIGEST_FILE).read_text(encoding="utf-8"))
    assert said == {"digest": demo_model.digest_of(demo_model.RECIPE)}, (
        "the recipe or its texts have changed: python -m sfed.models.demo makes the backbone anew"
    )


def test_a_backbone_is_deterministic_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    import torch

    threads, state, said = torch.get_num_threads(), torch.random.get_rng_state(), []
    for name in ("one", "other"):
        demo_model.build(tmp_path / name, TINY, said.append)
    assert said
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.full
def test_the_recipe_makes_the_backbone_of_the_package(tmp_path: Path) -> None:
    """To the last bit on one machine; elsewhere one that has learned the same."""
    import torch
    from transformers import AutoModelForCausalLM

    demo_model.build(tmp_path / "again", demo_model.RECIPE, lambda _: None)
    name = "tokenizer.json"
    assert (tmp_path / "again" / name).read_bytes() == (demo_model.FOLDER / name).read_bytes()
    tokenizer, losses = load_tokenizer(demo_model.FOLDER), []
    for folder in (demo_model.FOLDER, tmp_path / "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            texts = demo_model.texts_of(demo_model.RECIPE)[:200]
            batches = [torch.tensor([tokenizer.encode(text)]) for text in texts]
            losses.append(sum(model(ids, labels=ids).loss.item() for ids in batches) / len(texts))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] < 1.0
