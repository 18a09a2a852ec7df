"""The demo's backbone: a very small LLaMA that comes with the package, and how it was pretrained.

It has read the demo's questions answered by bare equations, and scraps of the houses' phrases: it
knows the language and some arithmetic, but no house style. ``python -m sfed.models.demo FOLDER``
pretrains it anew, about half a minute of one core.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfed.data.demo import pretraining_texts
from sfed.utils.command import Parser, run_command
from sfed.utils.errors import UserError

FOLDER = Path(__file__).parent / "demo_backbone"
"""Model and tokenizer, for ``AutoModelForCausalLM`` and ``AutoTokenizer``; weights in fp16."""
DIGEST_FILE = "recipe.json"
"""Names the recipe and the texts that the model in its folder was made from."""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# The space before a number belongs to the word before it, so that a digit is one and the same token
# with and without a space; but not after a colon, so that "Answer:" ends with a token of its own.
TOKEN_PATTERN = r"\d|\s?[^\s\d]+(?:(?<!:) (?=\d))?|\s+"


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


RECIPE = Recipe()


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


def build(target: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Pretrain the backbone into a folder.

    Deterministic on one machine with one version of torch. Leaves torch's number of threads and
    random state as they were. One thread: on so small a model a second one gains little, and where
    others keep the cores busy threads that wait for one another take minutes.

    Args:
        target: made if absent.
        recipe: what the model depends on.
        say: takes a line about progress now and then.
    """
    import torch

    texts = texts_of(recipe)
    tokenizer = _make_tokenizer(recipe, texts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = _make_model(recipe, tokenizer)
            _pretrain(recipe, model, tokenizer, texts, say)
    finally:
        torch.set_num_threads(threads)
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / DIGEST_FILE).write_text(json.dumps({"digest": digest_of(recipe)}) + "\n")


def texts_of(recipe: Recipe) -> list[str]:
    """What the backbone reads."""
    return pretraining_texts(recipe.problems_per_kind, recipe.remarks, recipe.seed)


def digest_of(recipe: Recipe) -> str:
    """Tell a recipe and its texts from others."""
    content = json.dumps([asdict(recipe), TOKEN_PATTERN, texts_of(recipe)])
    return hashlib.sha256(content.encode()).hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Pretrain the backbone anew."""
    parser = Parser("python -m sfed.models.demo", "Pretrain the demo's backbone into a folder.")
    parser.add_argument("folder", type=Path, help="new folder for the model and its tokenizer")
    folder: Path = parser.parse_args(arguments).folder
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    build(folder, RECIPE, print)


if __name__ == "__main__":
    run_command(main)
