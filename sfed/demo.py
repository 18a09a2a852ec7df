"""The embedded demo: generated word problems for eight clients and a tiny pretrained backbone.

Nothing is downloaded. Each client owns one kind of arithmetic word problem in the form of GSM8K and
writes worked answers in its house style. Half of its questions come from a pool that all clients
share, so the style cannot be told from the question and one global adapter cannot suit everybody.
The backbone, a very small LLaMA, is pretrained on the same questions answered by bare equations,
and on scraps of the houses' phrases: it knows the language and some arithmetic, but no house style.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, str]
__all__ = ["KINDS", "ensure_backbone", "problems", "rows"]


@dataclass(frozen=True)
class Recipe:
    """What the backbone depends on, besides the generated text."""

    vocabulary: int = 640
    width: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 344
    positions: int = 256
    problems_per_kind: int = 900
    remarks: int = 2400
    batch: int = 16
    steps: int = 370
    warmup: int = 20
    learning_rate: float = 2e-3
    seed: int = 7


@dataclass(frozen=True)
class House:
    """A client: how it writes a worked answer, and a question of its own."""

    opening: str
    operations: str  # the words before the annotation of a sum|difference|product|quotient
    link: str
    closing: str
    situation: tuple[str, str, str] = ("", "", "")  # question, shape of the calculation, unit


RECIPE = Recipe()
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# The space before a number belongs to the word before it, so that a digit is one and the same token
# with and without a space; but not after a colon, so that "Answer:" ends with a token of its own.
TOKEN_PATTERN = r"\d|\s?[^\s\d]+(?:(?<!:) (?=\d))?|\s+"
PEOPLE = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jill", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "toys", "cups")
SHARED = (
    ("{who} has {0} {things} and gets {1} more. How many {things} now?", "a+b", "{things}"),
    ("{who} has {0} {things} and gives away {1}. How many are left?", "a-b", "{things}"),
    ("{who} has {0} bags of {1} {things} each. How many {things}?", "a*b", "{things}"),
    ("{who} puts {0} {things} in {1} equal piles. How many per pile?", "a/b", "{things}"),
)
PLAIN = "{x} + {y} =|{x} - {y} =|{x} * {y} =|{x} / {y} ="
NEUTRAL = House("", PLAIN, "\n", "")
HOUSES = {  # a school, a shop, a kitchen, a warehouse, a bus company, a bank, a farm and a library
    "sums": House("Think step by step. ", PLAIN, ". Then ", ". So the answer is {r} {unit}.",
        ("{who} sees {0} {things} here and {1} there. How many?", "a+b", "{things}")),
    "change": House("Till receipt: ",
        "{x} plus {y} makes|{x} less {y} makes|{x} at {y} makes|{x} split {y} ways makes",
        ", next ", ". Thank you, {r} {unit}!",
        ("{who} buys {0} {things} at {1} dollars each and pays {2}. What is the change?",
         "c-a*b", "dollars")),
    "sharing": House("In our kitchen we ",
        "stir {y} into {x} for|take {y} from {x} for|lay {y} by {x} for|cut {y} ways {x} for",
        "; now ", ", so serve {r} {unit}.",
        ("{who} and friends, {1} in all, share {0} {things}. How many each?", "a/b", "{things}")),
    "packing": House("STOCK of {unit}: ", "{x}+{y}=|{x}-{y}=|{x}*{y}=|{x}/{y}=",
        " OK / ", " OK, TOTAL {r}",
        ("{who} packs {0} boxes of {1} {things} and {2} loose ones. How many?",
         "a*b+c", "{things}")),
    "travel": House("Driver log, ",
        "on from {x} by {y} to|back from {x} by {y} to|{x} for {y} legs to|{x} over {y} legs to",
        " then ", ". Arrived: {unit} {r}.",
        ("{who} drives {0} miles an hour for {1} hours. How many miles?", "a*b", "miles")),
    "savings": House("Dear customer, ",
        "credit {y} on {x}:|debit {y} on {x}:|{y} deposits of {x}:|one part in {y} of {x}:",
        " and ", ". Balance {r} {unit}, yours truly.",
        ("{who} saves {0} dollars a week for {1} weeks and spends {2}. How much is left?",
         "a*b-c", "dollars")),
    "harvest": House("Well, {unit} go ",
        "{x} and {y}, that's|{x} but {y}, that's|{x} rows by {y}, that's|{x} among {y}, that's",
        ", next ", ". A good {r}, I reckon.",
        ("{who} picks {0} {things} at dawn and {1} at dusk. How many?", "a+b", "{things}")),
    "reading": House("Note to reader: ",
        "({x} with {y}) gives|({x} without {y}) gives|({x} sets of {y}) gives|({x} in {y}) gives",
        " -> ", " -> return {r} {unit} please.",
        ("{who} has read {1} of {0} pages. How many are left?", "a-b", "pages")),
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(HOUSES)
Problem = tuple[str, list[tuple[int, str, int, int]], str]  # question, steps (x, sign, y, r), unit


def _draw(house: House, rng: random.Random) -> Problem:
    """A problem whose numbers, final and intermediate, are small, whole and positive."""
    question, shape, unit = house.situation if rng.random() < 0.5 else rng.choice(SHARED)
    a, b, c, n = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(11, 40)
    p = a * b
    less, paid = min(c, p - 1), (p // 10 + 1) * 10
    numbers, steps = {
        "a+b": ((n, b), [(n, "+", b, n + b)]),
        "a-b": ((n, b), [(n, "-", b, n - b)]),
        "a*b": ((a, b), [(a, "*", b, p)]),
        "a/b": ((p, b), [(p, "/", b, a)]),
        "a*b+c": ((a, b, c), [(a, "*", b, p), (p, "+", c, p + c)]),
        "a*b-c": ((a, b, less), [(a, "*", b, p), (p, "-", less, p - less)]),
        "c-a*b": ((a, b, paid), [(a, "*", b, p), (paid, "-", p, paid - p)]),
    }[shape]
    words = {"who": rng.choice(PEOPLE), "things": rng.choice(THINGS)}
    return question.format(*numbers, **words), steps, unit.format(**words)


def _answer(problem: Problem, opening: House, working: House, closing: House) -> str:
    """The worked answer without its last line; its parts may be in the styles of several houses."""
    _, steps, unit = problem
    said = dict(zip("+-*/", working.operations.split("|"), strict=True))
    done = [f"{said[op].format(x=x, y=y)} <<{x}{op}{y}={r}>>{r}" for x, op, y, r in steps]
    end = closing.closing.format(r=steps[-1][3], unit=unit)
    return opening.opening.format(unit=unit) + working.link.join(done) + end


def _stream(kind: str, seed: int, split: str = "", style: House | None = None) -> Iterator[Row]:
    """Endless rows; a question comes again only after a thousand draws without a new one."""
    rng = random.Random(f"{kind}/{seed}")  # a string seeds alike in every process
    house = style or HOUSES[kind]
    seen: set[str] = set()
    misses = 0
    while True:
        problem = _draw(HOUSES[kind], rng)
        question, steps, _ = problem
        # By its digest, a question is in the same split for every kind and seed.
        belongs = "eval" if hashlib.sha256(question.encode()).digest()[0] < 64 else "train"
        if split and split != belongs:
            continue
        if question in seen and misses < 1000:
            misses += 1
            continue
        misses = 0
        seen.add(question)
        answer = f"{_answer(problem, house, house, house)}\n#### {steps[-1][3]}"
        yield {"question": question, "answer": answer, "kind": kind}


def problems(kind: str, count: int, seed: int) -> list[dict[str, str]]:
    """Generates word problems of one kind, answered in the style of its client.

    A pure function of its arguments, alike in every process; some 20 microseconds per row.

    Args:
        kind: One of `KINDS`; another raises KeyError.
        count: How many rows; their questions are distinct while the kind has new ones (>10 000).
        seed: Another seed gives other rows.

    Returns:
        Rows with "question", "answer" (in the form of GSM8K) and "kind".
    """
    return list(islice(_stream(kind, seed), count))


def rows(split: str, count_per_kind: int, seed: int) -> list[dict[str, str]]:
    """Generates the rows of all clients for training or for evaluation.

    As pure and as fast as `problems`. A question is in one split only, whatever kind and seed.

    Args:
        split: "train" (three quarters of all questions) or "eval"; another raises ValueError.
        count_per_kind: How many rows of each kind.
        seed: Another seed gives other rows of the same split.

    Returns:
        Rows as from `problems`, kind after kind in the order of `KINDS`.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    streams = (_stream(kind, seed, split) for kind in KINDS)
    return [row for stream in streams for row in islice(stream, count_per_kind)]


def _pretraining_texts(recipe: Recipe) -> list[str]:
    """Plainly answered problems of the train split, and scraps of phrases from mixed houses."""
    streams = (_stream(kind, recipe.seed, "train", NEUTRAL) for kind in KINDS)
    plain = [row for stream in streams for row in islice(stream, recipe.problems_per_kind)]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in plain]
    rng, houses = random.Random(recipe.seed), list(HOUSES.values())
    for _ in range(recipe.remarks):
        whose, opening, working, closing = rng.choices(houses, k=4)
        texts.append(_answer(_draw(whose, rng), opening, working, closing))
    return texts


def _make_tokenizer(recipe: Recipe, texts: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no types
    return wrap(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        model_max_length=recipe.positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _make_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.positions, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _pretrain(
    recipe: Recipe, model: Any, tokenizer: Any, texts: list[str], say: Callable[[str], None]
) -> None:
    import torch

    def rate(step: int) -> float:
        cosine = math.cos(math.pi * step / recipe.steps)
        return min((step + 1) / recipe.warmup, 0.52 + 0.48 * cosine)

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    encoded = [torch.tensor([*ids, eos]) for ids in tokenizer(texts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng, started = random.Random(recipe.seed), time.monotonic()
    for step in range(1, recipe.steps + 1):
        chosen = rng.sample(encoded, recipe.batch)
        batch = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        # Padded on the right of a causal model, so no token sees the padding: no mask is needed.
        labels = batch.masked_fill(batch == pad, -100)
        loss = model(input_ids=batch, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps:
            spent = time.monotonic() - started
            say(f"backbone: step {step}/{recipe.steps}, loss {loss.item():.3f}, {spent:.0f} s")


def _free_cores() -> int:
    """Only those that this process may use: more threads than these would hinder one another."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(recipe: Recipe, target: Path, texts: list[str], say: Callable[[str], None]) -> None:
    """Leaves torch's number of threads and random state as they were."""
    import torch

    tokenizer = _make_tokenizer(recipe, texts)
    threads = torch.get_num_threads()
    torch.set_num_threads(_free_cores())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = _make_model(recipe, tokenizer)
            _pretrain(recipe, model, tokenizer, texts, say)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in ("model.safetensors", "tokenizer.json"))


def ensure_backbone(folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Makes the demo's pretrained backbone, or finds the one made before.

    Deterministic on one machine with one version of torch. About half a minute of one core if it
    has to be made, a fraction of a second otherwise. It is written beside its place, then renamed:
    a half-written one never counts, and of two racing processes the slower discards its copy.

    Args:
        folder: The cache; made if absent.
        say: Takes a line about progress now and then.

    Returns:
        A model folder below `folder` for `AutoModelForCausalLM` and `AutoTokenizer`, named after
        the digest of the recipe and of the generated text.
    """
    texts = _pretraining_texts(RECIPE)
    content = json.dumps([asdict(RECIPE), TOKEN_PATTERN, texts])
    target = folder / f"demo-backbone-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if _is_complete(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    say(f"backbone: not cached, pretraining a tiny one into {target}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".demo-backbone-") as workshop:
        made = Path(workshop) / "model"
        _build(RECIPE, made, texts, say)
        try:
            os.replace(made, target)
        except OSError:
            if not _is_complete(target):  # if it is, another process was faster
                raise
    return target
