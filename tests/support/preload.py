"""What the fork server of the tests does once, so that no process of theirs has to.

A run of the trainer on a process that is forked from here costs half as much as on one that is
forked from bare imports. No operation of torch may run here: its threads would not be forked along.
"""

from __future__ import annotations

from contextlib import suppress

from sfed.utils.garbage import permanent

with permanent():
    with suppress(ImportError):  # until Python 3.11
        import distutils.ccompiler  # noqa: F401  (what DeepSpeed looks for compilers with)

    from transformers import conversion_mapping

    import tests.support.runs  # noqa: F401

    # Compiles a thousand regular expressions, and keeps them for this process.
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
