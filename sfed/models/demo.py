"""The demo's backbone: a very small LLaMA, pretrained on the spot and kept in a cache.

It reads the demo's questions answered by bare equations, and scraps of the houses' phrases: it
knows the language and some arithmetic, but no house style.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfed.data.demo import pretraining_texts
from sfed.utils.errors import UserError

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


def _build(recipe: Recipe, target: Path, texts: list[str], say: Callable[[str], None]) -> None:
    """Leaves torch's number of threads and random state as they were.

    One thread: on so small a model a second one gains little, and where others keep the cores busy
    threads that wait for one another take minutes.
    """
    import torch

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
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in ("model.safetensors", "tokenizer.json"))


def _make_private(folder: Path) -> None:
    """Make the cache for this user alone; refuse one into which somebody else may put a model."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise UserError(
            f"the cache folder {folder} belongs to another user or everybody may write to it; set "
            "XDG_CACHE_HOME to a folder of your own"
        )


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

    Raises:
        UserError: where the cache is open to other users.
    """
    _make_private(folder)
    texts = pretraining_texts(RECIPE.problems_per_kind, RECIPE.remarks, RECIPE.seed)
    content = json.dumps([asdict(RECIPE), TOKEN_PATTERN, texts])
    target = folder / f"demo-backbone-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if _is_complete(target):
        return target
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
