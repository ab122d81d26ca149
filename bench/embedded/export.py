"""What was trained, into the package or another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from embedded.common import load, log
from embedded.denoiser import TRAIN, Denoiser
from embedded.pipeline import save_shared
from embedded.transformer import TRANSFORMER
from embedded.unet import UNET
from embedded.world import FILE
from realera_fast.embedded import FOLDER

DENOISERS: dict[str, Denoiser] = {"unet": UNET, "transformer": TRANSFORMER}
FOLDERS = {"unet": "pipeline", "transformer": "flow"}
"""Where each is in an exported model."""


def exported_record(work: Path, denoiser: str) -> Path:
    """Where it is kept how an exported model was trained."""
    return work / ("exported.json" if denoiser == "unet" else f"exported.{denoiser}.json")


def stage_export(work: Path, folder: Path, denoiser: str) -> None:
    """Put the pipeline and the judge into the folder; the table is the package's."""
    trained, place = DENOISERS[denoiser], FOLDERS[denoiser]
    state = load(trained.weights(work))
    folder.mkdir(parents=True, exist_ok=True)
    trained.export(work, state["averaged"], folder / place)
    places = [place]
    if denoiser != "unet" and not (folder / "pipeline").exists():
        save_shared(work, folder / "pipeline")
        places.append("pipeline")
    steps = {name: phase["steps"] for name, phase in trained.phases.items()}
    record = {f"{denoiser}_steps": steps, "batch": TRAIN["batch"]}
    exported_record(work, denoiser).write_text(json.dumps(record) + "\n")
    if (work / "judge.safetensors").exists():
        shutil.copyfile(work / "judge.safetensors", folder / "judge.safetensors")
    if folder != FOLDER:
        shutil.copyfile(FOLDER / "words.json", folder / "words.json")
        shutil.copyfile(work / FILE, folder / FILE)
    # Of what else is in the folder, nothing is touched.
    files = [f for place in places for f in (folder / place).rglob("*") if f.is_file()]
    files += [f for f in folder.iterdir() if f.name in ("judge.safetensors", "words.json", FILE)]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    log("export", f"{sum(f.stat().st_size for f in files) / 1e6:.2f} MB")
