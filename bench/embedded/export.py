"""What was trained, into the package or another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from embedded.common import load, log
from embedded.pipeline import export_pipeline
from embedded.unet import PHASES, TRAIN, trained_unet
from embedded.world import FILE
from realera_fast.embedded import FOLDER


def stage_export(work: Path, folder: Path) -> None:
    """Put the pipeline and the judge into the folder; the table is the package's."""
    state = load(trained_unet(work))
    folder.mkdir(parents=True, exist_ok=True)
    export_pipeline(work, state["averaged"], folder / "pipeline")
    steps = {name: phase["steps"] for name, phase in PHASES.items()}
    (work / "exported.json").write_text(
        json.dumps({"unet_steps": steps, "batch": TRAIN["batch"]}) + "\n"
    )
    if (work / "judge.safetensors").exists():
        shutil.copyfile(work / "judge.safetensors", folder / "judge.safetensors")
    if folder != FOLDER:
        shutil.copyfile(FOLDER / "words.json", folder / "words.json")
        shutil.copyfile(work / FILE, folder / FILE)
    # Of what else is in the folder, nothing is touched.
    files = [f for f in (folder / "pipeline").rglob("*") if f.is_file()]
    files += [f for f in folder.iterdir() if f.name in ("judge.safetensors", "words.json", FILE)]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    log("export", f"{sum(f.stat().st_size for f in files) / 1e6:.2f} MB")
