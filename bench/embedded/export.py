"""What was trained into the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from embedded.common import load, log
from embedded.pipeline import UNET, export_pipeline
from realera_fast.embedded import FOLDER


def stage_export(work: Path) -> None:
    """Put the pipeline and the judge into the package (the table is already there)."""
    done = work / "unet.pt"
    state = load(done if done.exists() else work / "unet.resume.pt")
    export_pipeline(work, state["averaged"], FOLDER / "pipeline")
    step = state["steps"] if "steps" in state else state["step"]
    (work / "exported.json").write_text(json.dumps({"unet_steps": step, "planned": UNET["steps"]}))
    if (work / "judge.safetensors").exists():
        shutil.copyfile(work / "judge.safetensors", FOLDER / "judge.safetensors")
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    log("export", f"{sum(f.stat().st_size for f in files) / 1e6:.2f} MB")
