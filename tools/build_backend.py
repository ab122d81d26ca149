"""setuptools' build backend, asking only for the build tools that are missing.

A fixed list in pyproject.toml would download torch (gigabytes, in its default form) into the
build's isolated environment although the one it is built for already has it, and cmake although the
machine has one.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.build_meta import *  # noqa: F403  # the backend interface, re-exported
from setuptools.build_meta import get_requires_for_build_editable as _editable
from setuptools.build_meta import get_requires_for_build_wheel as _wheel


def _missing() -> list[str]:
    # In pip's isolation sysconfig still describes the environment that pip runs in.
    torch = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    tools = [
        f"{name}{bound}"
        for name, bound in (("cmake", ">=3.18"), ("ninja", ""))
        if not shutil.which(name)
    ]
    return tools if torch.is_dir() else [*tools, "torch==2.13.0"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What `pip wheel` and `pip install` must put into the build environment."""
    return [*_wheel(config_settings), *_missing()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for `pip install -e`."""
    return [*_editable(config_settings), *_missing()]
