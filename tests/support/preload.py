"""What the fork server of the tests does once, so that no process of theirs has to.

A process that is forked from here finds all that a run of the trainer imports, and what
transformers and DeepSpeed make at their first use. No operation of torch may run here: its threads
would not be forked along.
"""
# ruff: noqa: F401  (to import is what this file is for)

from __future__ import annotations

from sfed.utils.garbage import permanent

with permanent():
    import datasets.io.generator
    import datasets.packaged_modules.generator.generator
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import peft.tuners.lora.bnb
    import scipy.io
    import transformers.models.llama.modeling_llama
    from transformers import conversion_mapping

    import sfed.bench.__main__
    import sfed.federated.session
    import sfed.models.deepspeed
    import sfed.observability.third_party
    import tests.support.runs

    # Compiles a thousand regular expressions, and keeps them for this process.
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
