"""Train the embedded model from an emoji font, WordNet and a sentence encoder, on a CPU.

Every stage reads its inputs from the work folder and leaves its result there, so a stopped run
continues with the same command; the denoiser is trained in several processes if it is::

    python bench/run.py embedded --work build/embedded --stage all
    torchrun --nproc-per-node 2 bench/run.py embedded --work build/embedded --stage unet --threads 1

A flow-matching sibling shares everything but the denoiser with a model that is trained, and is
trained in the same folder: ``--stage transformer``, then ``--stage export --denoiser transformer``.

Another model of the same table, by another seed, another width of the text encoder and another
tokenizer, is trained in a folder of its own, whose ``world.json`` keeps these choices::

    python bench/run.py embedded --work build/second --seed 7 --text-width 256 --tokens 16384 \\
        --out build/second_model

=========== =====================================================================================
bank        pictures of every thing alone and of two side by side, rendered once
corpus      texts of WordNet and of the table, and what the sentence encoder says of them
distil      ``CLIPTextModel`` on the tokenizer's words, from the sentence encoder
text        the same, contrasted with the pictures
vae         ``AutoencoderKL`` between 64x64 pictures and 8x8x24 latents
latents     latents of every picture, states of every caption
unet        ``UNet2DConditionModel``, v-prediction, in four phases
transformer ``SD3Transformer2DModel``, rectified flow, in three phases
judge       which things are there, which style, whether it is junk
export      the pipeline folder and the judge into the package, or into ``--out``
sweep       guidance and step counts compared, from which the table's ``sampling`` was chosen
evaluate    what the judge sees in the model's pictures
=========== =====================================================================================
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import is_torchelastic_launched

from embedded.bank import stage_bank
from embedded.evaluate import stage_evaluate, stage_sweep
from embedded.examples import stage_latents
from embedded.export import stage_export
from embedded.judge import stage_judge
from embedded.text_encoder import stage_corpus, stage_distil, stage_text
from embedded.transformer import stage_transformer
from embedded.unet import stage_unet
from embedded.vae import stage_vae
from embedded.world import World, choose_world, keep_world
from realera_fast.embedded import FOLDER

STAGES = {
    "bank": stage_bank,
    "corpus": stage_corpus,
    "distil": stage_distil,
    "text": stage_text,
    "vae": stage_vae,
    "latents": stage_latents,
    "unet": stage_unet,
    "transformer": stage_transformer,
    "judge": stage_judge,
}
DENOISERS = ("unet", "transformer")
EXPORTED = {"export": stage_export, "sweep": stage_sweep, "evaluate": stage_evaluate}
"""Stages that write or read the exported model."""


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.py embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=[*STAGES, *EXPORTED, "all"], default="all")
    parser.add_argument(
        "--denoiser",
        choices=DENOISERS,
        default="unet",
        help="which of the two is trained by `all`, exported, swept or evaluated (default: unet)",
    )
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, help=f"of everything (default: {World.seed})")
    parser.add_argument(
        "--text-width", type=int, help=f"of the text encoder (default: {World.text_width})"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"about how many the tokenizer learns (default: CLIP's own {World.tokens})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the exported model (default: the package; needed for another world)",
    )
    return parser


def exported_folder(arguments: argparse.Namespace, world: World) -> Path:
    """Where the exported model is."""
    folder = FOLDER if arguments.out is None else arguments.out.resolve()
    if world != World() and folder == FOLDER:
        raise ValueError(
            f"--out: the package holds the default world, and {arguments.work} is another: name "
            "a folder for it"
        )
    if folder == arguments.work.resolve():
        raise ValueError(f"--out {arguments.out}: this is the --work folder; name another")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = options()
    arguments = parser.parse_args(argv)
    if is_torchelastic_launched() and arguments.stage not in DENOISERS:
        parser.error("torchrun is for --stage unet and --stage transformer alone")
    work, chosen = arguments.work, arguments.stage
    try:
        world = choose_world(
            work, seed=arguments.seed, text_width=arguments.text_width, tokens=arguments.tokens
        )
        # Before hours of training, not after them.
        folder = None if chosen in STAGES else exported_folder(arguments, world)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)
    keep_world(work, world)
    other = {*DENOISERS} - {arguments.denoiser}
    for name, stage in STAGES.items():
        if chosen == name or (chosen == "all" and name not in other):
            torch.manual_seed(world.seed)
            stage(work)
    for name, stage in EXPORTED.items():
        if chosen in (name, "all"):
            torch.manual_seed(world.seed)
            stage(work, folder, arguments.denoiser)
    return 0
