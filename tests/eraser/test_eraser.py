"""The one verb, end to end on tiny models."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from model_state import same, weights
from planted_kernels import broken, planted, unchecked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_alignment import UNCHECKED
from tiny_erase import CLOSED, CONFIG, FAST, run
from tiny_models import tiny_pipeline, tiny_text_encoder, tiny_unet

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure
from realera_fast.alignment import stage
from realera_fast.erasure import ErasureFileError
from realera_fast.mining import MiningConfig, known_words
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, TextModel, TokenWords, VocabularyConfig


@pytest.fixture
def pipe():
    return tiny_pipeline()


def test_edits_the_projections_and_nothing_else(pipe):
    before = weights(pipe.unet)
    result = run(pipe, ["cat=dog"], CONFIG)
    after = pipe.unet.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert result.report["layers"].keys() == {n.removesuffix(".weight") for n in changed}


def test_three_arguments_are_enough(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    loaded = type(tiny_pipeline()).from_pretrained(tmp_path, safety_checker=None)
    before = weights(loaded.unet)
    result = realera_fast.erase(loaded.unet, loaded.text_encoder, ["cat"])
    assert not same(loaded.unet, before) and result.concepts == (Concept("cat"),)


def test_the_target_moves_to_its_anchor_and_the_rest_stays(pipe):
    report = run(pipe, ["cat=dog"]).report
    words = {word["word"]: word for word in report["words"]}
    weak = run(tiny_pipeline(), ["cat=dog"], dataclasses.replace(CLOSED, erase_scale=0.01)).report
    assert words["cat"]["moved"] > weak["words"][0]["moved"] > 0
    drift = [w["drift"] for w in report["words"] if w["role"] == "vocabulary"]
    assert sum(drift) / len(drift) < 0.5
    assert report["solve"]["rank"] > 0 and report["solve"]["residual_ratio"] < 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_unets(dtype):
    pipe = tiny_pipeline(dtype=dtype)
    before = weights(pipe.unet)
    checked = dataclasses.replace(FAST, check_seeds=1, check_sampling_steps=2)
    result = run(pipe, ["cat=dog"], dataclasses.replace(CONFIG, alignment=checked))
    assert result.report["alignment"]["closed_form"] is not None
    assert all(value.dtype == dtype for value in pipe.unet.state_dict().values())
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_restore_is_bit_exact_and_apply_does_it_again(pipe, tmp_path):
    before = weights(pipe.unet)
    result = run(pipe, ["cat=dog"], CONFIG)
    edited = weights(pipe.unet)
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)
    Erasure.load(result.save(tmp_path / "cat.safetensors")).apply_(pipe.unet)
    assert same(pipe.unet, edited)


def test_erasing_nothing_changes_no_bit(pipe):
    before = weights(pipe.unet)
    result = run(pipe, [])
    assert same(pipe.unet, before) and result.map.rank == 0 and not result.lora
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(pipe, context):
    plain = tiny_pipeline()
    run(plain, ["cat=dog"], CONFIG)
    with context():
        run(pipe, ["cat=dog"], CONFIG)
    assert same(pipe.unet, weights(plain.unet))


def test_training_flags_come_back(pipe):
    pipe.unet.mid_block.train()
    pipe.text_encoder.encoder.train()
    run(pipe, ["cat=dog"], CONFIG)
    assert pipe.unet.mid_block.training and not pipe.unet.training
    assert pipe.text_encoder.encoder.training and not pipe.text_encoder.training


def test_a_kernel_that_was_not_believed_is_in_the_provenance(pipe, tmp_path):
    assert "distrusted_kernels" not in run(pipe, ["cat=ship"]).provenance
    with unchecked(tmp_path), planted("solve_spd", broken):
        erasure = run(pipe, ["cat=ship"])
        path = erasure.save(tmp_path / "erasure.safetensors")
    found = {"solve_spd on cpu, float64": "raised ValueError: no such instruction"}
    assert erasure.provenance["distrusted_kernels"] == found
    assert Erasure.load(path or tmp_path / "erasure.safetensors").provenance == erasure.provenance


def test_same_seed_same_bits(pipe):
    other = tiny_pipeline()
    first, second = run(pipe, ["cat"], CONFIG), run(other, ["cat"], CONFIG)
    assert same(pipe.unet, weights(other.unet))
    assert torch.equal(first.map.left, second.map.left)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize(
    "where", ["realera_fast.eraser.align_noise", "realera_fast.erasure.report.Movement"]
)
def test_any_failure_leaves_the_model_bit_identical(pipe, monkeypatch, where, error):
    before = weights(pipe.unet)

    def fail(*_, **__):
        raise error("stop")

    import sys

    module = sys.modules[where.rpartition(".")[0]]
    monkeypatch.setattr(module, where.rpartition(".")[2], fail)
    with pytest.raises(error):
        run(pipe, ["cat"], CONFIG)
    assert same(pipe.unet, before)


@pytest.mark.parametrize("mode", ["gaussian", "offset", "vocabulary", "none"])
def test_every_kind_of_mining_erases(pipe, mode):
    config = dataclasses.replace(CLOSED, mining=MiningConfig(mode=mode))
    report = run(pipe, ["cat=dog"], config).report
    assert report["words"][0]["moved"] > 0.1


def test_sampled_mining_is_near_its_expectation(pipe):
    def factors(samples):
        fresh = tiny_pipeline()
        mining = MiningConfig(mode="gaussian", samples=samples)
        return run(fresh, ["cat=dog"], dataclasses.replace(CLOSED, mining=mining)).map.matrix

    exact = factors(None)
    few, many = (factors(4) - exact).norm(), (factors(256) - exact).norm()
    assert many < 0.5 * few


@pytest.mark.parametrize("several", [iter, tuple, np.array, lambda ws: (w for w in ws), set])
def test_arguments_may_come_in_any_form_that_has_items(pipe, several):
    names, kept = ["cat", "horse"], ["dog", "ship"]
    expected = run(tiny_pipeline(), names, preserve=kept)
    result = run(pipe, several(names), preserve=several(kept))
    roles = {w["word"]: w["role"] for w in result.report["words"]}
    assert roles["dog"] == roles["ship"] == "preserved"
    assert result.concepts == expected.concepts
    assert torch.equal(result.map.left, expected.map.left)


def test_numbers_of_settings():
    assert type(EraseConfig(seed=np.int64(3)).seed) is int
    for wrong in (True, 1.5, "1", None, np.float32(1), -1):
        with pytest.raises((TypeError, ValueError), match=r"EraseConfig\.seed must be"):
            EraseConfig(seed=wrong)
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="erase_scale must be finite"):
            EraseConfig(erase_scale=number)
        with pytest.raises(ValueError, match="preserve_scale must be finite"):
            VocabularyConfig(preserve_scale=number)


def test_nothing_to_preserve_may_be_none(pipe):
    result = run(pipe, ["cat"], preserve=None)
    assert not any(w["role"] == "preserved" for w in result.report["words"])


def test_one_word_in_two_spellings_is_preserved_once(pipe):
    expected = run(tiny_pipeline(), ["cat=dog"], preserve=["tree"])
    result = run(pipe, ["cat=dog"], preserve=["tree", "Tree", " DOG", "dog"])
    kept = [w["word"] for w in result.report["words"] if w["role"] == "preserved"]
    assert kept == ["tree", "DOG"]
    assert torch.equal(result.map.left, expected.map.left)
    assert result.report["warnings"] == expected.report["warnings"]


def test_words_added_to_the_tokenizer_are_no_control_tokens(pipe):
    pipe.load_textual_inversion({"<bun>": torch.randn(32)}, token="<bun>")
    result = run(pipe, ["<bun>"])
    assert result.report["words"][0]["moved"] > 0


def test_preserved_words_move_less(pipe):
    def drift(preserve):
        result = run(tiny_pipeline(), ["cat=dog"], preserve=preserve)
        spread = {w["word"]: w["drift"] for w in result.report["words"] if w["drift"] is not None}
        return spread["kitten"]

    assert drift(["kitten"]) < drift([])


def test_progress_bars_follow_the_argument_and_diffusers(pipe, capsys):
    from diffusers.utils import logging

    run(pipe, ["cat"], CONFIG, progress=True)
    assert "alignment" in capsys.readouterr().err
    logging.disable_progress_bar()
    try:
        run(tiny_pipeline(), ["cat"], CONFIG, progress=None)
    finally:
        logging.enable_progress_bar()
    assert "alignment" not in capsys.readouterr().err


def test_config_round_trip_and_unknown_fields():
    config = EraseConfig(seed=3, mining=MiningConfig(mode="gaussian", samples=5))
    assert EraseConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field 'speed'"):
        EraseConfig.from_dict({"speed": 1})
    with pytest.raises(ValueError, match=r"EraseConfig\.mining has no field 'sample'"):
        EraseConfig.from_dict({"mining": {"sample": 1}})
    with pytest.raises(ValueError, match="seed"):
        EraseConfig(seed=-1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {
                "model": lambda p: UNet2DModel(
                    8,
                    block_out_channels=(32, 32),
                    layers_per_block=1,
                    down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2,
                )
            },
            ValueError,
            "UNet2DModel is not supported",
        ),
        ({"model": lambda p: tiny_unet(width=48)}, ValueError, "width 32"),
        ({"text_encoders": lambda p: tiny_text_encoder(width=48)}, ValueError, "width 48"),
        ({"concepts": lambda p: ["cat", "cat"]}, ValueError, "named twice"),
        ({"concepts": lambda p: [""]}, ValueError, "empty"),
        ({"concepts": lambda p: ["cat=cat"]}, ValueError, "equals its anchor"),
        ({"preserve": lambda p: ["cat"]}, ValueError, "also to be erased"),
        ({"preserve": lambda p: "dog"}, TypeError, "list of strings"),
        ({"concepts": lambda p: ["cat " * 80]}, ValueError, "would be cut"),
        ({"preserve": lambda p: {"dog": 1}}, TypeError, "preserve: .*got dict"),
        ({"preserve": lambda p: b"dog"}, TypeError, "preserve: .*got bytes"),
        ({"preserve": lambda p: ["d\u200bog"]}, ValueError, r"preserve: .*U\+200B"),
        ({"preserve": lambda p: ["Cat"]}, ValueError, "preserve: 'Cat' .*same as 'cat'.* erased"),
        ({"preserve": lambda p: ["<|endoftext|>"]}, ValueError, "preserve: .*control token"),
        ({"concepts": lambda p: {"cat": "dog"}}, TypeError, "concepts: .*got dict"),
        ({"concepts": lambda p: ["cat", "Cat"]}, ValueError, "'Cat' .*same as 'cat'.* twice"),
        ({"concepts": lambda p: [Concept("cat", "Cat")]}, ValueError, "equals its anchor 'Cat'"),
        ({"concepts": lambda p: [Concept("caf\u00e9", "cafe\u0301")]}, ValueError, "equals its"),
        ({"concepts": lambda p: [Concept("cat", synonyms=["CAT"])]}, ValueError, "named twice"),
        ({"concepts": lambda p: ["cat=Dog", "dog"]}, ValueError, "anchor 'Dog' .*itself erased"),
        ({"concepts": lambda p: ["a <|endoftext|>cat"]}, ValueError, "holds '<|endoftext|>'"),
        ({"concepts": lambda p: ["cat=<|startoftext|>"]}, ValueError, "concepts: .*control token"),
        (
            {
                "config": lambda p: dataclasses.replace(
                    CLOSED, pairs=PairsConfig(templates={"object": ["<|endoftext|> {}"]})
                )
            },
            ValueError,
            "templates: .*control tok",
        ),
        (
            {"latents": lambda p: [("cat", torch.zeros(1, 4, 8, 8))], "config": lambda p: CONFIG},
            TypeError,
            "latents: expected a mapping .*got list",
        ),
        ({"config": lambda p: {"seed": 1}}, TypeError, "EraseConfig"),
        ({"tokenizer": lambda p: 3}, TypeError, "tokenizer"),
        ({"concepts": lambda p: 5}, TypeError, "concepts: expected strings"),
        ({"scheduler": lambda p: "ddim"}, TypeError, "scheduler: expected"),
        ({"preserve": lambda p: ["tree " * 90]}, ValueError, "preserve: .* would be cut"),
        ({"concepts": lambda p: [Concept("cat", synonyms=("tree " * 90,))]}, ValueError, "cut"),
        ({"concepts": lambda p: ["cat=" + "tree " * 90]}, ValueError, "would be cut"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(pipe, change, error, message):
    arguments = {
        "model": pipe.unet,
        "text_encoders": pipe.text_encoder,
        "concepts": ["cat"],
        "tokenizer": pipe.tokenizer,
        "config": CLOSED,
        "progress": False,
    } | {name: make(pipe) for name, make in change.items()}
    before = weights(arguments["model"])
    with pytest.raises(error, match=message):
        realera_fast.erase(**arguments)
    assert same(arguments["model"], before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda unet: unet.fuse_qkv_projections(), "unfuse_qkv_projections"),
        (lambda unet: unet.to("meta"), "meta"),
        (lambda unet: next(unet.mid_block.parameters()).data.fill_(float("nan")), "NaN"),
    ],
)
def test_unusable_models_are_refused(pipe, spoil, message):
    if message == "NaN":
        name = next(n for n, _ in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
        pipe.unet.get_submodule(name).weight.data[0, 0] = float("nan")
    else:
        spoil(pipe.unet)
    with pytest.raises(ValueError, match=message):
        run(pipe, ["cat"])


def test_a_tokenizer_without_words_warns_and_still_erases(pipe, caplog, monkeypatch):
    nothing = TokenWords((), (), (), 0.0, False)
    monkeypatch.setattr(known_words, "read_token_words", lambda *_: nothing)
    # Words of a lexicon that a random encoder takes for cats would outweigh the cat.
    config = dataclasses.replace(CLOSED, mining=MiningConfig(mode="none"))
    result = run(pipe, ["cat=dog"], config)
    assert "the vocabulary is empty" in caplog.text
    assert any("the vocabulary is empty" in text for text in result.report["warnings"])
    words = result.report["words"]
    assert words[0]["moved"] > 0 and all(w["drift"] < 10 for w in words if w["role"] != "target")


KEEP = dataclasses.replace(
    CLOSED,
    closed_form=ClosedFormConfig(keep_system=True),
    # To a random encoder any word may be near another.
    mining=MiningConfig(mode="none"),
)


def test_a_concept_can_be_withdrawn(pipe, tmp_path):
    before = weights(pipe.unet)
    both = run(pipe, ["cat", "dog"], KEEP)
    path = both.save(tmp_path / "both.safetensors")
    both.restore_(pipe.unet)
    dog = both.without(" cat\n")
    with pytest.raises(TypeError, match="targets must be a string, got list"):
        both.without(["cat"])
    assert [c.target for c in dog.concepts] == ["dog"]
    # The first erasure is as it was, and its file holds the same equations.
    assert both.system.concepts == ("cat", "dog")
    assert torch.equal(Erasure.load(path).without("cat").map.left, dog.map.left)
    # The text, end-of-text and the first row of the padding, which the prior holds.
    cat_row = TextModel(pipe.text_encoder, pipe.tokenizer).encode(["a cat", "a dog"])[:, 1:5]
    moved = [(m.map(cat_row) - cat_row).norm(dim=(1, 2)) for m in (both, dog)]
    assert moved[1][0] < 0.5 * moved[0][0] and moved[1][1] > 0.7 * moved[0][1]
    dog.apply_(pipe.unet)
    assert not same(pipe.unet, before)
    dog.restore_(pipe.unet)
    nothing = dog.without("dog")
    assert nothing.map.rank == 0 and nothing.concepts == ()
    nothing.apply_(pipe.unet)
    assert same(pipe.unet, before)
    with pytest.raises(ValueError, match="^targets: 'cat' is not erased here"):
        dog.without("cat")


def test_keeping_the_system_does_not_change_the_edit(pipe):
    maps = []
    for config in (CLOSED, KEEP):
        result = run(pipe, ["cat"], config)
        result.restore_(pipe.unet)
        maps.append(result.map.matrix)
    torch.testing.assert_close(maps[0], maps[1])
    with pytest.raises(ValueError, match=r"^system: .*keep_system=True"):
        dataclasses.replace(result, system=None).without("cat")


@pytest.mark.parametrize("spoil", ["shape", "missing", "state"])
def test_a_damaged_system_is_refused(pipe, tmp_path, spoil):
    result = run(pipe, ["cat"], KEEP)
    path = result.save(tmp_path / "cat.safetensors")
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    if spoil == "shape":
        tensors["system.factor"] = tensors["system.factor"][:3].contiguous()
    elif spoil == "missing":
        del tensors["system.source.0"]
    else:
        metadata["system"] = metadata["system"].replace("cat", "cow")
    save_file(tensors, path, metadata)
    with pytest.raises(ErasureFileError):
        Erasure.load(path)


# The alignment stage's own arguments


def improving(check, model):
    """Scores of a stage that helped."""
    from realera_fast.alignment.check import AlignmentScore

    return AlignmentScore(*[0.5 if model == "edited" else 0.1] * 3)


def test_a_run_that_was_cut_off_goes_on(pipe, tmp_path, monkeypatch):
    from realera_fast.alignment import Trainer
    from realera_fast.runtime import checkpoint

    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    config = dataclasses.replace(CONFIG, alignment=dataclasses.replace(FAST, steps=5))
    whole = run(tiny_pipeline(), ["cat"], config)
    step, before = Trainer.step, weights(pipe.unet)

    def cut(self, window, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, window, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, ["cat"], config, checkpoint_dir=tmp_path)
    assert same(pipe.unet, before)
    taken = []
    monkeypatch.setattr(Trainer, "step", lambda s, w, n: taken.append(n) or step(s, w, n))
    resumed = run(pipe, ["cat"], config, checkpoint_dir=tmp_path, resume=True)
    assert taken == [3, 4]
    assert resumed.report["alignment"]["held_back"] == whole.report["alignment"]["held_back"]
    for change in ({"concepts": ["ship"]}, {"config": dataclasses.replace(config, seed=1)}):
        arguments = {"concepts": ["cat"], "config": config} | change
        with pytest.raises(ValueError, match="checkpoint_dir: .* is of another run"):
            run(tiny_pipeline(), checkpoint_dir=tmp_path, resume=True, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "resume: expected a checkpoint_dir"),
        ({"latents": {"dog": torch.zeros(1, 4, 8, 8)}}, "latents: 'dog' is not to be erased"),
        ({"latents": {"cat": torch.zeros(4, 8, 8)}}, r"latents\['cat'\]: expected finite \[n, 4"),
        ({"latents": {"cat": torch.zeros(1, 4, 8, 9)}}, r"\[n, 4, 8, 8\], got \[1, 4, 8, 9\]"),
        ({"latents": {"cat": torch.zeros(1, 3, 8, 8)}}, r"got \[1, 3, 8, 8\]"),
        ({"latents": {"cat": torch.full((1, 4, 8, 8), float("nan"))}}, "expected finite"),
        ({"latents": {"cat": [1]}}, "got list"),
    ],
)
def test_bad_arguments_of_the_alignment_are_named(pipe, options, message):
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match=message):
        run(pipe, ["cat"], CONFIG, **options)
    assert same(pipe.unet, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "it takes 9 channels and gives 4 (inpainting?)"),
        ({"num_class_embeds": 3}, "it takes more than text and noise (num_class_embeds=3)"),
        ({"sample_size": None}, "its config has no sample_size; name AlignmentConfig.latent_size"),
    ],
)
def test_what_alignment_can_not_denoise_is_named(pipe, change, message):
    options = {name: x for name, x in pipe.unet.config.items() if not name.startswith("_")}
    pipe.unet = type(pipe.unet)(**options | change)
    erasure = run(pipe, ["cat"], CONFIG)
    (told,) = [text for text in erasure.report["warnings"] if "noise alignment runs on" in text]
    assert told.endswith(message) and not erasure.report["alignment"]["steps"]
    erasure.restore_(pipe.unet)
    latents = {"cat": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="latents: they are for the alignment stage") as caught:
        run(pipe, ["cat"], CONFIG, latents=latents)
    assert message in str(caught.value)


def test_the_size_of_latents_can_be_named(pipe):
    pipe.unet.register_to_config(sample_size=None)
    config = dataclasses.replace(CONFIG, alignment=dataclasses.replace(FAST, latent_size=8))
    assert run(pipe, ["cat"], config).report["alignment"]["steps"]


def test_a_wrapped_unet_is_aligned(pipe):
    fast = dataclasses.replace(FAST, gradient_checkpointing=True)
    result = realera_fast.erase(
        torch.nn.DataParallel(pipe.unet),
        pipe.text_encoder,
        ["cat"],
        tokenizer=pipe.tokenizer,
        config=dataclasses.replace(CONFIG, alignment=fast),
        progress=False,
    )
    assert result.report["alignment"]["steps"] == fast.steps
    assert not pipe.unet.is_gradient_checkpointing


def test_a_float64_unet_is_aligned():
    pipe = tiny_pipeline(dtype=torch.float64)
    result = run(pipe, ["cat"], CONFIG)
    assert result.report["alignment"]["steps"] == FAST.steps


def test_a_part_of_the_schedule_without_steps_is_refused(pipe):
    fast = dataclasses.replace(FAST, min_timestep=0.99)
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match=r"min_timestep: 0.99 leaves none of 2 denoising steps"):
        run(pipe, ["cat"], dataclasses.replace(CONFIG, alignment=fast))
    assert same(pipe.unet, before)


def test_neighbors_that_are_too_many_are_told(pipe):
    mining = MiningConfig(word_cosine=-1.0, max_words=2)
    result = run(pipe, ["cat"], dataclasses.replace(CLOSED, mining=mining))
    assert len(result.report["neighbors"]["cat"]) == 2
    assert any("raise mining.max_words" in text for text in result.report["warnings"])
    # Whoever is inside is not among those that should stay.
    assert {w["role"] for w in result.report["words"]} == {"target", "neighbor"}


def test_pictures_of_a_word_can_be_given(pipe):
    with_pictures = run(pipe, ["cat"], CONFIG, latents={"cat": torch.ones(2, 4, 8, 8)})
    without = run(tiny_pipeline(), ["cat"], CONFIG)
    held_back = [r.report["alignment"]["held_back"] for r in (with_pictures, without)]
    assert held_back[0] != held_back[1]


def test_alignment_can_work_alone(pipe):
    config = dataclasses.replace(CONFIG, closed_form=ClosedFormConfig(enabled=False))
    result = run(pipe, ["cat=dog"], config)
    assert result.map.rank == 0 and result.report["alignment"]["steps"] == 2


def test_alignment_reaches_queries_and_outputs_if_asked(pipe, tmp_path, monkeypatch):
    from realera_fast.alignment import check

    monkeypatch.setattr(check.HeldOutCheck, "score", improving)
    before = weights(pipe.unet)
    targets = ("to_k", "to_v", "to_q", "to_out.0")
    fast = dataclasses.replace(
        FAST, steps=4, target_modules=targets, evaluation_steps=0, check_seeds=1
    )
    result = run(pipe, ["cat=dog"], dataclasses.replace(CONFIG, alignment=fast))
    changed = {n for n, v in pipe.unet.state_dict().items() if not torch.equal(before[n], v)}
    assert changed == {n for n in before if "attn2.to_" in n and not n.endswith("bias")}
    assert len(result.report["layers"]) == len(changed)
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_alignment_reaches_self_attention_if_asked(pipe, monkeypatch):
    from realera_fast.alignment import check

    monkeypatch.setattr(check.HeldOutCheck, "score", improving)
    before = weights(pipe.unet)
    targets = ("to_k", "to_v", "attn1.to_k", "attn1.to_out.0")
    fast = dataclasses.replace(
        FAST, steps=4, target_modules=targets, evaluation_steps=0, check_seeds=1
    )
    result = run(pipe, ["cat=dog"], dataclasses.replace(CONFIG, alignment=fast))
    changed = {n for n, v in pipe.unet.state_dict().items() if not torch.equal(before[n], v)}
    ends = ("attn2.to_k", "attn2.to_v", "attn1.to_k", "attn1.to_out.0")
    assert changed == {n for n in before if n.removesuffix(".weight").endswith(ends)}
    assert len(result.report["layers"]) == len(changed)
    assert result.report["alignment"]["timesteps"] == [501, 1]
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_factors_of_self_attention_that_go_leave_nothing_there(pipe, monkeypatch):
    monkeypatch.setattr(stage, "is_better", lambda *_, **__: False)
    before = weights(pipe.unet)
    aligned = dataclasses.replace(
        UNCHECKED, target_modules=("attn1.to_k", "attn1.to_v"), check_seeds=1, adversary="worst"
    )
    result = run(pipe, ["cat=dog"], dataclasses.replace(CLOSED, alignment=aligned))
    assert not result.lora and not any("attn1" in name for name in result.report["layers"])
    assert "self_attention" not in result.provenance
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_self_attention_that_text_enters_is_refused(pipe):
    fast = dataclasses.replace(FAST, target_modules=("to_k", "attn1.to_q"))
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, only_cross_attention=True)
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match=r"text enters its .*attn1 .*; name projections of cross"):
        run(pipe, ["cat=dog"], dataclasses.replace(CONFIG, alignment=fast))
    assert same(pipe.unet, before)


def test_memory_does_not_grow_with_the_number_of_concepts(pipe, monkeypatch):
    import weakref

    from realera_fast.text import AlignedPrompts, concept_prompts

    monkeypatch.setattr(concept_prompts, "_KEPT_BYTES", 0)
    living, most = weakref.WeakSet(), []
    made = AlignedPrompts.__init__

    def counted(self, *arguments, **options):
        made(self, *arguments, **options)
        living.add(self)
        most.append(len(living))

    monkeypatch.setattr(AlignedPrompts, "__init__", counted)
    monkeypatch.setattr(AlignedPrompts, "__hash__", object.__hash__)
    words = ["cat", "kitten", "horse", "puppy", "ship", "tree", "van", "gogh", "painting"]
    run(pipe, words, dataclasses.replace(CLOSED, mining=MiningConfig(mode="gaussian")))
    assert len(most) >= 2 * len(words) and max(most) <= 2


def test_an_interrupt_at_the_last_moment_undoes_queries_and_outputs_too(pipe, monkeypatch):
    from realera_fast.alignment import check
    from realera_fast.erasure import history

    monkeypatch.setattr(check.HeldOutCheck, "score", improving)

    def interrupt(message, *_):
        if message.startswith("applied"):
            raise KeyboardInterrupt

    monkeypatch.setattr(history.logger, "info", interrupt)
    targets = ("to_k", "to_v", "to_q", "to_out.0")
    fast = dataclasses.replace(
        FAST, steps=4, target_modules=targets, evaluation_steps=0, check_seeds=1
    )
    before = weights(pipe.unet)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, ["cat=dog"], dataclasses.replace(CONFIG, alignment=fast))
    assert same(pipe.unet, before)
