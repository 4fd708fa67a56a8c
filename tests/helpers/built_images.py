"""The images as Docker archives, built once for all tests of a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import image
import pytest
import pyz
import this_run
from image_engine import MARK

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "https://example.org/livenessprobe"


def archives() -> dict[str, Path]:
    """By platform. The engine keeps none of them; `docker load` gives it one back, under a tag of its own."""
    folder = this_run.made_once("images", _build)
    return {platform: folder / f"livenessprobe-{_architecture(platform)}.tar" for platform in pyz.PLATFORMS}


def _build(folder: Path) -> None:
    image.build_image()  # here, since two at once would make it twice

    def make(platform: str) -> None:
        tag = f"livenessprobe-test:{this_run.name()}-{_architecture(platform)}"
        image.make(platform, tag, folder, more_labels=[MARK])

    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor() as pool:
        environment.setenv("SOURCE", SOURCE)
        list(pool.map(make, pyz.PLATFORMS))


def _architecture(platform: str) -> str:
    return platform.partition("/")[2]
