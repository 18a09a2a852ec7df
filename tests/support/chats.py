"""Chat templates in the manner of widely used ones, and tokenizers that know their marks."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support import tiny
from tests.support.tiny import ALPHABET, byte_tokenizer

CHATML = (
    "{%- for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n{{ turn.content }}{{ '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{%- for turn in messages %}"
    "{%- if turn.role == 'assistant' %}"
    "<|im_start|>assistant\n"
    "{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{%- else %}<|im_start|>{{ turn.role }}\n{{ turn.content }}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for turn in messages %}"
    "<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n{{ turn.content | trim }}<|eot_id|>"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{- bos_token }}"
    "{%- for turn in messages %}"
    "{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif %}"
    "{%- if turn.role == 'user' %}{{ ' [INST] ' + turn.content + ' [/INST]' }}"
    "{%- else %}{{ ' ' + turn.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}"
    "{%- set first = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set first = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- for turn in turns %}"
    "<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{{- '\n' }}{{ first if loop.first }}{{ turn.content | trim }}<end_of_turn>\n"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
REASONING = (
    "{%- for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n"
    "{%- set words = turn.content.split('</think>') %}"
    "{{- '\n' }}{{ turn.content if loop.last else words[-1] }}<|im_end|>\n"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Leaves what a model thought out of the turns before the last."""
TOOLS = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n{{ turn.content or '' }}"
    "{%- for call in turn.tool_calls or [] %}<call>{{ call | tojson }}</call>{%- endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml-marked": CHATML_MARKED,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
}
_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A token per byte and one per mark of any of these templates; it sets bos itself."""
    marks = [mark for some in _MARKS.values() for mark in some]
    inner = byte_tokenizer(["<s>", "</s>", *ALPHABET])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, template: str | None) -> Path:
    """Write a tiny model whose tokenizer has a chat template."""
    tiny.save_model(folder, context=256)
    tokenizer = chat_tokenizer(template)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder
