"""Train the embedded model from nothing but two fonts, on a CPU.

Every stage reads its inputs from the work folder and leaves its result there, so a stopped run
continues with the same command::

    python bench/run.py embedded --work build/embedded --stage all

==========  =====================================================================================
text        tokenizer and CLIP text encoder, by contrast with a small image tower
latents     latents (principal components of patches) of every picture, states of the captions
vae         ``AutoencoderKL`` between 64x64 pictures and those 8x8x16 latents
unet        ``UNet2DConditionModel``, noise prediction
judge       classifier of things and styles
export      the pipeline folder and the judge into the package
sweep       guidance and step counts compared; the table's ``sampling`` is chosen from it
evaluate    what the judge sees in the model's pictures
==========  =====================================================================================
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from embedded.common import SEED
from embedded.evaluate import stage_evaluate, stage_sweep
from embedded.export import stage_export
from embedded.judge import stage_judge
from embedded.text_encoder import stage_text
from embedded.unet import stage_unet
from embedded.vae import stage_latents, stage_vae

STAGES = {
    "text": stage_text,
    "latents": stage_latents,
    "vae": stage_vae,
    "unet": stage_unet,
    "judge": stage_judge,
    "export": stage_export,
    "sweep": stage_sweep,
    "evaluate": stage_evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if arguments.stage in (name, "all"):
            torch.manual_seed(SEED)
            stage(arguments.work)
    return 0
