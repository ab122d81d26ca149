"""A list of many concepts, and settings under which each costs little."""

from __future__ import annotations

from dataclasses import replace

from edits import CLOSED

from realera_fast.text import PairsConfig

ONE = replace(CLOSED, pairs=PairsConfig(templates={"object": ("a photo of a {}",)}))


LIST = [f"{'abcdefgh'[i % 8]}{'ijklmnop'[i // 8]}=dog" for i in range(20)]
