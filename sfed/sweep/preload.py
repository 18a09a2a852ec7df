"""What the fork server of a sweep imports once, so that each run begins at once.

A process that has asked for a CUDA device cannot give it to those it forks. PEFT imports
bitsandbytes where it is installed, which asks; so it is hidden meanwhile. The trainer needs nothing
of what PEFT makes of it, and a run that quantises its backbone imports it in its own process.
"""

from __future__ import annotations

import sys

from sfed.utils.garbage import permanent

_is_hidden = "bitsandbytes" not in sys.modules
if _is_hidden:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
try:
    # The memory of objects that no collection visits stays shared with the processes that it forks.
    with permanent():
        import sfed.federated.session
        import sfed.observability.third_party  # noqa: F401
finally:
    if _is_hidden:
        del sys.modules["bitsandbytes"]
