"""Adapters in use: scores on new data, answers in the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from sfed.chat import __main__ as chat
from sfed.chat.answers import Conversation, Decoding, answerer
from sfed.eval import __main__ as evaluation
from sfed.federated.loaded import on_backbone, spec_of
from sfed.storage.adapter_source import config_for
from sfed.utils.errors import CheckpointError, DataError, UserError
from sfed.utils.text import printable
from tests.support import chats, glue, runs, tiny, used

pytestmark = pytest.mark.slow


# --- eval ----------------------------------------------------------------------------------------


def scored(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, Any]:
    evaluation.main([*words, "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())
    shown = capsys.readouterr().out
    for entry in found["adapters"]:
        assert f"{entry['loss']:.4f}" in shown and entry["name"] in shown
    return {entry["name"]: entry for entry in found["adapters"]} | {"all": found}


def test_adapters_score_on_a_file_what_the_run_reported_on_it(
    used_run: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = scored(capsys, tmp_path, str(used_run), f"data.eval_files={used_folder / 'new.jsonl'}")
    first, last = runs.rounds(used_run)[0], runs.rounds(used_run)[-1]
    for entry in last["clients"]:
        mine = found[entry["name"]]
        assert mine["loss"] == pytest.approx(entry["personal_loss"], rel=1e-5)
        assert mine["samples"] == entry["samples"]
    assert found["global"]["loss"] == pytest.approx(last["eval/global_loss"], rel=1e-5)
    assert found["base model"]["loss"] == pytest.approx(first["eval/personal_loss"], rel=1e-5)
    assert found["all"]["examples"] == 17


def test_an_adapter_scores_the_same_wherever_its_folder_is(
    used_run: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = used.exported(used_run, tmp_path / "elsewhere", "--client", "west")
    capsys.readouterr()
    found = scored(
        capsys, tmp_path, str(out / "west"), f"data.eval_files={used_folder / 'new.jsonl'}"
    )
    entry = runs.rounds(used_run)[-1]["clients"][2]
    assert found["west"]["loss"] == pytest.approx(entry["personal_loss"], rel=1e-5)


def test_an_adapter_of_an_older_version_is_read_as_its_run_says(
    used_run: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(used_run, tmp_path / "run")
    for path in (tmp_path / "run" / "adapters").glob("*/prompt_template.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        del facts["config"]
        path.write_text(json.dumps(facts), encoding="utf-8")
    words = [f"data.eval_files={used_folder / 'new.jsonl'}", "--client", "west"]
    found = scored(capsys, tmp_path, str(tmp_path / "run"), *words)
    entry = runs.rounds(used_run)[-1]["clients"][2]
    assert found["west"]["loss"] == pytest.approx(entry["personal_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"config": {"data": {"task": "text", "columns": [1]}}}, r"data\.columns"),
        ({"config": {"data": {"task": "text", "max_tokens": -1}}}, r"data\.max_tokens = -1"),
        ({"config": {"data": {"task": {}}}}, r"data\.task"),
        ({"config": [], "examples": 3}, r"data\.task: no default"),
        ([], r"prompt_template\.json holds list, not an object"),
    ],
)
def test_a_strangers_folder_with_odd_keys_is_refused_by_name(
    used_run: Path, used_folder: Path, tmp_path: Path, facts: Any, message: str
):
    shutil.copytree(used_run / "adapters" / "west", tmp_path / "west")
    (tmp_path / "west" / "prompt_template.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        evaluation.main([str(tmp_path / "west"), f"data.eval_files={used_folder / 'new.jsonl'}"])


def test_a_strangers_folder_names_neither_files_nor_code(used_run: Path, tmp_path: Path):
    """What it says of other keys is passed over."""
    shutil.copytree(used_run / "adapters" / "west", tmp_path / "west")
    keys = {
        "model": {"name": "stranger/model"},
        "data": {"task": "text", "train_files": "/etc", "chat_template": "/etc/passwd"},
        "backbone": {"trust_remote_code": True},
        "output": {"dir": "/"},
    }
    (tmp_path / "west" / "prompt_template.json").write_text(json.dumps({"config": keys}))
    config = config_for(tmp_path / "west", "org/model", [])
    assert (config.model.name, config.data.chat_template) == ("org/model", None)
    assert not config.backbone.trust_remote_code and config.output.dir == "runs"
    assert config.data.train_files == str(tmp_path / "west")  # is never read


def test_several_processes_are_refused(
    used_run: Path, used_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs as one process; start it without torchrun"):
        evaluation.main([str(used_run), f"data.eval_files={used_folder / 'new.jsonl'}"])


def test_a_classifier_scores_on_a_file_what_the_run_reported_on_it(
    used_classifier: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its clients hold parts of the file, so the global adapter is compared."""
    new = f"data.eval_files={used_folder / 'new-notes.jsonl'}"
    found = scored(capsys, tmp_path, str(used_classifier), "--client", "global", new)
    first, last = runs.rounds(used_classifier)[0], runs.rounds(used_classifier)[-1]
    for name in ("loss", "accuracy", "macro_f1", "matthews"):
        for title, event in (("global", last), ("base model", first)):
            expected = event[f"eval/global_{name}"]
            assert found[title][name] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found["global"]["loss"] < found["base model"]["loss"]


def test_what_cannot_be_scored_is_refused(used_run: Path, used_folder: Path):
    for words, error, message in [
        (["data.eval_files=nowhere.jsonl"], UserError, "does not exist"),
        ([], UserError, r"data\.eval_files=FILE"),
        (["lora.rank=3"], UserError, r"'lora\.rank=3'"),
        (["--client", "nobody", "data.eval_files=x"], UserError, "--client nobody: .* 'north'"),
    ]:
        with pytest.raises(error, match=message):
            evaluation.main([str(used_run), *words])
    with pytest.raises(UserError, match="does not exist"):
        evaluation.main(
            [str(used_run.parent / "no-run"), f"data.eval_files={used_folder}/new.jsonl"]
        )


def test_rows_beyond_the_context_are_not_scored(used_run: Path, tmp_path: Path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b" * 400}) + "\n")
    asked = [f"data.eval_files={rows}", "data.max_tokens=300"]
    with pytest.raises(UserError, match=r"= 300: a row of data\.eval_files .* context is 256; set"):
        evaluation.main([str(used_run), *asked])


def test_an_adapter_of_stock_peft_is_scored_once_its_task_is_given(
    used_run: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """rsLoRA's rule and layers chosen by their numbers are read as PEFT reads them."""
    base = AutoModelForCausalLM.from_pretrained(used_folder / "model")
    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    words = [f"data.eval_files={used_folder / 'new.jsonl'}", "data.max_tokens=64"]
    with pytest.raises(UserError, match=r"data\.task"):
        evaluation.main([str(tmp_path / "theirs"), *words])
    found = scored(capsys, tmp_path, str(tmp_path / "theirs"), "data.task=text", *words)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(used_folder / "model"), tmp_path / "theirs"
    )
    assert found["theirs"]["loss"] == pytest.approx(
        loss_of(stock, used_folder / "new.jsonl"), rel=1e-4
    )
    assert abs(found["theirs"]["loss"] - found["base model"]["loss"]) > 1e-3


@pytest.fixture(scope="module", params=["fedex", "flora"])
def changed_run(used_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A run that has changed frozen weights, so that the layers of its adapters differ in rank."""
    federated = {"method": request.param, "weighting": "uniform"}
    run = used.train_texts(used_folder, request.param, lora={"rank": 2}, federated=federated)
    for path in run.glob("adapters/*/adapter_config.json"):
        facts = json.loads(path.read_text())
        assert 0 < len(facts["rank_pattern"]) < len(facts["target_modules"]) * 2
    return run


def in_stock_peft(folder: Path) -> Any:
    """An adapter of the tiny model in stock PEFT."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_adapters_whose_layers_differ_in_rank_score_as_in_the_run_and_as_in_stock_peft(
    changed_run: Path, used_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = used_folder / "new.jsonl"
    rows = [f"data.eval_files={new}", "data.max_tokens=64"]
    found = scored(capsys, tmp_path, str(changed_run), rows[0])
    first, last = runs.rounds(changed_run)[0], runs.rounds(changed_run)[-1]
    for entry in last["clients"]:
        mine = found[entry["name"]]
        assert mine["loss"] == pytest.approx(entry["personal_loss"], rel=1e-6)
        assert mine["samples"] == entry["samples"]
    assert found["global"]["loss"] == pytest.approx(last["eval/global_loss"], rel=1e-6)
    assert found["base model"]["loss"] == pytest.approx(first["eval/personal_loss"], rel=1e-6)
    adapter = changed_run / "adapters" / "sud"
    mine = scored(capsys, tmp_path, str(adapter), *rows)["süd"]
    assert mine["loss"] == pytest.approx(loss_of(in_stock_peft(adapter), new), rel=1e-6)


@pytest.mark.parametrize("words", [[], ["--merge", "--client", "west"]])
def test_a_checkpoint_of_changed_weights_is_not_exported(
    changed_run: Path, tmp_path: Path, words: list[str]
):
    """The adapters in it, without the changes, are not the model that was trained."""
    with pytest.raises(CheckpointError) as mistake:
        used.exported(changed_run, tmp_path / "out", *words)
    said = str(mistake.value)
    assert f"below {changed_run / 'adapters'}" in said and "merge_and_unload()" in said
    assert not (tmp_path / "out").exists()


def base_of(model: Any) -> str:
    return model.peft_config["default"].base_model_name_or_path


@torch.no_grad()
def loss_of(model: Any, file: Path) -> float:
    """Nats per token of the completions, a row at a time, with eos."""
    total = count = 0.0
    tokenizer = AutoTokenizer.from_pretrained(base_of(model))
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
        targets = torch.tensor(ids[1:])
        losses = -logits[torch.arange(len(targets)), targets]
        completion = losses[len(prompt) - 1 :]
        total, count = total + float(completion.sum()), count + len(completion)
    return total / count


# --- chat ----------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    chat.main(list(words))
    return capsys.readouterr().out


@torch.no_grad()
def stock_answer(model: Any, ids: list[int], length: int) -> str:
    written = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(base_of(model))
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True).strip()


def test_it_answers_as_stock_peft_does_to_the_same_prompt(
    used_run: Path, used_folder: Path, capsys: pytest.CaptureFixture[str]
):
    base = AutoModelForCausalLM.from_pretrained(used_folder / "model")
    stock = PeftModel.from_pretrained(base, used_run / "adapters" / "sud")
    tokenizer = AutoTokenizer.from_pretrained(used_folder / "model")
    expected = stock_answer(stock, tokenizer("3 times c:")["input_ids"], 12)
    words = ["--prompt", "3 times c:", "--max-new-tokens", "12"]
    for target in ([str(used_run), "--client", "süd"], [str(used_run / "adapters" / "sud")]):
        assert said(capsys, *target, *words) == f"{printable(expected, keep=chr(10) + chr(9))}\n"
    assert said(capsys, str(used_run), *words)  # the global adapter


def test_an_adapter_whose_layers_differ_in_rank_answers_as_in_stock_peft(
    changed_run: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = changed_run / "adapters" / "global"
    model = in_stock_peft(adapter)
    ids = AutoTokenizer.from_pretrained(base_of(model))("3 times c:")["input_ids"]
    expected = printable(stock_answer(model, ids, 12), keep="\n\t")
    words = ["--prompt", "3 times c:", "--max-new-tokens", "12"]
    assert said(capsys, str(changed_run), *words) == f"{expected}\n"


def test_without_a_terminal_each_line_gets_one(
    used_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 times a:\n2 times b:\n"))
    answers = said(capsys, str(used_run), "--max-new-tokens", "9").splitlines()
    one = said(capsys, str(used_run), "--max-new-tokens", "9", "--prompt", "2 times b:")
    assert len(answers) == 2 and (answers[1] + "\n" == one or "\\n" in answers[1])


def test_a_classifier_names_the_label(
    used_classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = used.as_the_card_says(used_classifier / "adapters" / "global", monkeypatch)
    for text in ("aaaa", "bbb", "ab"):
        logits = found["model"](**found["tokenizer"](text, return_tensors="pt")).logits
        label = used.LABELS[int(logits.argmax())]
        assert said(capsys, str(used_classifier), "--prompt", text) == f"{label}\n"
    with pytest.raises(DataError, match="an empty text has no class"):
        chat.main([str(used_classifier), "--prompt", " "])


def test_a_conversation_goes_through_its_template_and_is_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    chats.save_chat_model(tmp_path / "model", chats.CHATML)
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2!"}]
    glue.save(tmp_path / "rows.jsonl", [{"messages": turns, "id": i} for i in range(12)])
    settings = tiny.settings(tmp_path, federated={"num_clients": 2, "num_rounds": 1})
    run = used.train(settings)
    adapter = run / "adapters" / "client-0000"
    spec = spec_of(adapter)
    with on_backbone(config_for(adapter, spec.base_name, []), spec, [adapter]) as loaded:
        answer = answerer(loaded, adapter, Decoding(4, 0.0), keeps_turns=True)
        first = answer("2?")
        [talk] = [one for one in vars(answer.__self__).values() if isinstance(one, Conversation)]
        answer("3?")
        assert [turn["content"] for turn in talk.turns[:3]] == ["2?", first, "3?"]
        tokenizer = loaded.tokenizer
        ids = tokenizer.apply_chat_template(
            turns[:1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert talk._ids(turns[:1]) == ids
        for number in range(40):  # far beyond the context
            answer(f"{number}?")
        assert len(talk._ids(talk.turns)) < loaded.backbone.context_tokens + 8


def test_adapters_of_one_run_say_each_how_its_own_rows_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One client has conversations, one instructions; the global adapter has both."""
    chats.save_chat_model(tmp_path / "model", chats.CHATML)
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2!"}]
    (tmp_path / "train").mkdir()
    glue.save(tmp_path / "train" / "talks.jsonl", [{"messages": turns, "id": i} for i in range(8)])
    orders = [{"instruction": f"do {i}", "output": "done"} for i in range(8)]
    glue.save(tmp_path / "train" / "orders.jsonl", orders)
    run = used.train(
        tiny.settings(
            tmp_path,
            data={"task": "text", "train_files": str(tmp_path / "train"), "max_tokens": 256},
            partition={"kind": "by_file"},
            federated={"num_clients": None, "num_rounds": 1},
            train={"local_steps": 1},
        )
    )
    found = {}
    for name in ("talks", "orders", "global"):
        facts = json.loads((run / "adapters" / name / "prompt_template.json").read_text())
        has_file = (run / "adapters" / name / "chat_template.jinja").is_file()
        assert has_file == (facts["chat_template"] is not None)
        found[name] = (has_file, len(facts["examples"]))
    assert found == {"talks": (True, 0), "orders": (False, 1), "global": (True, 1)}
    folder = run / "adapters" / "global"
    spec = spec_of(folder)
    with on_backbone(config_for(folder, spec.base_name, []), spec, [folder]) as loaded:
        both = answerer(loaded, folder, Decoding(3, 0.0), keeps_turns=False).__self__
        assert both.completing.is_filled_by('{"instruction": "do 3"}')
        assert not both.completing.is_filled_by("do 3")
        assert both.answer('{"instruction": "do 3"}') == both.completing.answer("do 3")
        assert both.answer("do 3") == both.conversation.answer("do 3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--client", "nobody"], "--client nobody"),
        (["--temperature", "-1"], "is not a number from 0 up"),
        (["hello"], "'hello': after the adapter come key=value"),
    ],
)
def test_what_cannot_be_asked_is_refused(used_run: Path, words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        chat.main([str(used_run), *words])


def test_a_prompt_beyond_the_context_is_refused(used_run: Path):
    with pytest.raises(
        DataError, match=r"the prompt has \d+ tokens and the model's context is 256"
    ):
        chat.main([str(used_run), "--prompt", "x" * 300])
