"""Passes without arithmetic: floating-point tensors have a shape and no values.

They are torch's fake tensors: operations on them return the right shape, strides and dtype, and
nothing is computed or allocated. Integers and booleans (token ids, positions, masks) stay real.
They are small, and models look at them to decide what they do, for example whether attention needs
a mask. So the operations of a pass are those of a real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class FakeFloats(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every floating-point tensor that comes into being within it a fake one, on the CPU.

    What looks at the values of such a tensor raises an error of torch (see ``CANNOT_TRACE``).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Real integers meet fake floats: as indices of an embedding, as a mask.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if FakeTensor in types:  # then torch derives shapes only
            return func(*args, **kwargs)
        if not any(torch.is_tensor(leaf) for leaf in tree_leaves((args, kwargs))):
            with self._fake:
                made = func(*args, **kwargs)
            if _is_float(made):
                return made
        return tree_map_only(torch.Tensor, self._faked, func(*args, **kwargs))

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        is_real = _is_float(tensor) and not isinstance(tensor, FakeTensor)
        return self._fake.from_tensor(tensor) if is_real else tensor


def _is_float(made: Any) -> bool:
    return torch.is_tensor(made) and made.is_floating_point()


# What a pass raises under ``FakeFloats`` where the model looks at values, or calls a kernel that
# has no fake form; torch and models' own code raise them with many types.
CANNOT_TRACE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
