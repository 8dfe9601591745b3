"""The solved notebooks are tests: nbval runs them again and compares what comes out with what is stored.

Their kernels run on the CPU and offline, so that outputs are the same on all machines, and strictly: an exercise
that is not solved is an error. Other tests do not see these variables.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

KERNELS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PLATFORM_DIRS": "1",
    "TUTORIAL_SAE_STRICT": "1",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KERNELS.items() if item.path.suffix == ".ipynb" else ():
            patch.setenv(name, value)
        return (yield)
