"""The images as Docker archives, built once for all tests of a run."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import image
import pytest
import pyz
from image_engine import MARK

SOURCE = "https://example.org/livenessprobe"


@functools.cache
def archives() -> dict[str, Path]:
    """By platform. The engine keeps none of them; `docker load` gives it one, under a tag of its own."""
    image.build_image()  # here, since two at once would make it twice
    folder = Path(tempfile.mkdtemp(prefix="lp"))
    atexit.register(shutil.rmtree, folder)

    def make(platform: str) -> Path:
        tag = f"livenessprobe-test:{os.getpid()}-{platform.partition('/')[2]}"
        return image.make(platform, tag, folder, more_labels=[MARK])

    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor() as pool:
        environment.setenv("SOURCE", SOURCE)
        return dict(zip(pyz.PLATFORMS, pool.map(make, pyz.PLATFORMS), strict=True))
