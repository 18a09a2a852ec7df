"""Log-probabilities of a prompt by vLLM, with and without an adapter; runs in vLLM's environment.

python read_by_vllm.py BASE ADAPTER RANK OUT.json TOKEN,TOKEN,...
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base, adapter, rank, out, tokens = sys.argv[1:]
    ids = [int(token) for token in tokens.split(",")]
    model = LLM(
        model=base,
        enable_lora=True,
        max_lora_rank=max(8, int(rank)),
        block_size=32,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
    )
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = {}
    for name, request in (("base", None), ("adapter", LoRARequest("one", 1, adapter))):
        [answer] = model.generate([{"prompt_token_ids": ids}], wanted, lora_request=request)
        found[name] = [
            entry[token].logprob
            for token, entry in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        ]
    with open(out, "w", encoding="utf-8") as file:  # noqa: PTH123  (another environment)
        json.dump(found, file)


if __name__ == "__main__":
    main()
