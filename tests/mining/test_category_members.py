"""Members of a category, as the embedded model and the smallest models draw them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_families import FAMILIES
from tolerance import check
from torch.testing import assert_close

from realera_fast import Concept, EraseConfig, embedded, erase, eraser, selection
from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import MemberSearch, MiningConfig, guidance_cosine
from realera_fast.models import text_streams
from realera_fast.runtime import CheckpointError, Execution, Processes, fastest_dtype
from realera_fast.text import TextWithPooled
from realera_fast.unet import SharedUNet

CLOSED_FORM = EraseConfig(alignment=AlignmentConfig(enabled=False))
CATEGORY = [Concept("dog", kind="explicit")]


@pytest.fixture(scope="module")
def pipe():
    return embedded.load_pipeline(fastest_dtype("cpu"))


def cosines(pipe, names, words, **options):
    text = text_streams(pipe.unet, pipe.text_encoder, pipe.tokenizer)["sequence"][0]
    return guidance_cosine(
        pipe.unet,
        pipe.scheduler,
        names,
        words,
        text=text,
        empty=text.encode([""]),
        config=AlignmentConfig(**options),
    )


def test_members_are_told_from_other_words(pipe):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.train()
    found = cosines(pipe, ["plant"], ["plant", "tree", "maple", "truck", "owl"])
    assert pipe.unet.training
    pipe.unet.eval()
    assert pipe.unet.attn_processors == processors
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    assert_close(found[0], torch.ones(()), rtol=1e-5, atol=1e-5)
    assert (found[1:3] > MiningConfig().member_cosine).all()
    assert (found[3:] < MiningConfig().member_cosine).all()


def test_a_word_does_not_depend_on_those_beside_it(pipe):
    """bfloat16 rounds products of other sizes differently."""
    words = ["banana", "truck", "owl"]
    many, few = (cosines(pipe, ["food"], words, sampling_batch_size=n) for n in (64, 4))
    assert_close(many, few, rtol=0.0, atol=0.05)


def test_the_name_that_fits_best_counts(pipe):
    words = ["banana", "castle"]
    food, building, both = (
        cosines(pipe, names, words) for names in (["food"], ["building"], ["food", "building"])
    )
    assert_close(both, torch.maximum(food, building), rtol=0.0, atol=0.05)


def shown(pipe):
    """What `guidance_cosine` is told of the text, for a pipeline of Stable Diffusion 1, 2 or XL."""
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    tokenizers = [pipe.tokenizer, getattr(pipe, "tokenizer_2", None)]
    encoders, tokenizers = ([x for x in part if x is not None] for part in (encoders, tokenizers))
    texts = text_streams(pipe.unet, tuple(encoders), tuple(tokenizers))
    text = texts["sequence"][0]
    if "pooled" not in texts:
        return {"text": text, "empty": text.encode([""]), "pooled_width": None}
    joined = TextWithPooled(text, texts["pooled"][0])
    return {
        "text": joined,
        "empty": torch.zeros_like(joined.encode([""])),
        "pooled_width": texts["pooled"][0].width,
    }


def plainly(pipe, name, words, dtype):
    """The definition in diffusers' own terms, one word and start after the other."""
    seen = shown(pipe)
    unet = copy.deepcopy(pipe.unet).to(dtype)
    scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": False})
    scheduler.set_timesteps(4)

    def predict(x, t, prompt):
        added = None
        if seen["pooled_width"] is not None:
            vector, prompt = prompt[:, -1, : seen["pooled_width"]], prompt[:, :-1]
            sizes = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=dtype).expand(len(prompt), -1)
            added = {"text_embeds": vector.to(dtype), "time_ids": sizes}
        x = x.to(dtype).expand(len(prompt), -1, -1, -1)
        out = unet(x, t, prompt.to(dtype), added_cond_kwargs=added).sample
        return out.to(torch.promote_types(dtype, torch.float32))

    def encode(word):
        return seen["text"].encode([f"a photo of {word}"])

    asked, found = encode(name), []
    for word in words:
        prompts, cosines = torch.cat((seen["empty"], encode(word), asked)), []
        for seed in (40_000, 40_001):
            x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
            x = x.to(torch.promote_types(dtype, torch.float32))
            pushes = []
            for t in scheduler.timesteps:
                free, own, named = predict(x, t, prompts).split(1)
                x = scheduler.step(free + 5.0 * (own - free), t, x).prev_sample
                pushes.append((own - free, named - free))
            own, named = (torch.cat(part).flatten() for part in zip(*pushes, strict=True))
            cosines.append(torch.dot(own, named) / (own.norm() * named.norm()))
        found.append(torch.stack(cosines).mean())
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_cosines_are_those_of_the_plain_loop(family, dtype):
    """Noise and v-prediction, one text encoder and two."""
    pipe = FAMILIES[family](dtype=dtype)
    # Of few words the plain loop's largest error is a matter of luck.
    words = ["dog", "ship", "tree", "house", "bird", "car"]
    got = guidance_cosine(
        pipe.unet, pipe.scheduler, ["cat"], words, config=AlignmentConfig(), **shown(pipe)
    )
    assert got.dtype == torch.float32 and len(set(got.tolist())) == len(words)
    check(
        family,
        got,
        plainly(pipe, "cat", words, torch.float64),
        plainly(pipe, "cat", words, dtype),
    )


def test_nothing_is_asked_of_no_words(pipe):
    assert cosines(pipe, ["food"], []).shape == (0,)
    assert torch.equal(cosines(pipe, [], ["banana"]), torch.zeros(1))


def test_a_category_takes_its_members_with_it(pipe):
    # A quarter of the words that are drawn by default: it is the line between them that counts.
    config = dataclasses.replace(CLOSED_FORM, mining=MiningConfig(member_words=64))
    result = erase(pipe, [Concept("clothing", kind="explicit")], config=config, progress=False)
    near = set(result.report["neighbors"]["clothing"])
    result.restore_(pipe.unet)
    # What the lexicon knows, and what is drawn as clothing is.
    assert {"dress", "gown", "garment"} <= near
    assert not near & {"guitar", "castle", "apple", "dog", "tiger"}
    assert {"lexicon", "member"} <= {result.report["sources"][word] for word in near}


@pytest.fixture
def asked(monkeypatch):
    """Words of each search for members that is made."""
    found = []

    def counting(*arguments, **options):
        found.append(arguments[3])
        return guidance_cosine(*arguments, **options)

    monkeypatch.setattr(selection, "guidance_cosine", counting)
    return found


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "pixart_sigma"])
def test_every_family_takes_a_category(name, asked):
    """Drawn where the noise alignment runs, by the text alone elsewhere."""
    config = dataclasses.replace(CLOSED_FORM, mining=MiningConfig(member_words=16))
    erase(FAMILIES[name](), CATEGORY, config=config, progress=False)
    assert bool(asked) == (name in ("sd1", "sdxl"))


@pytest.mark.parametrize(
    "change", [{"in_channels": 9}, {"sample_size": None}, {"num_class_embeds": 3}]
)
def test_what_takes_more_than_a_prompt_goes_by_the_text(asked, change):
    """Inpainting, an unknown size, classes: erased all the same, and the report says so."""
    pipe = FAMILIES["sd1"]()
    options = {name: x for name, x in pipe.unet.config.items() if not name.startswith("_")}
    pipe.unet = type(pipe.unet)(**options | change)
    result = erase(pipe, CATEGORY, config=CLOSED_FORM, progress=False)
    assert not asked
    assert any("members of a category" in text for text in result.report["warnings"])


def test_foreign_attention_goes_by_the_text(asked):
    class Own:
        def __call__(self, *arguments, **options):
            raise AssertionError("never run")

    pipe = FAMILIES["sd1"]()
    pipe.unet.set_attn_processor(Own())
    erase(pipe, CATEGORY, config=CLOSED_FORM, progress=False)
    assert not asked


def test_numbers_that_are_not_finite_are_said_and_left_to_the_text(caplog):
    pipe = FAMILIES["sd1"]()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    assert torch.equal(cosines(pipe, ["dog"], ["cat", "ship"]), torch.full((2,), -torch.inf))
    assert "not finite" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_search_that_is_cut_off_leaves_the_model_as_it_was(monkeypatch, error):
    pipe = FAMILIES["sd1"]()
    pipe.unet.train()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    predict, count = SharedUNet.predict, 0

    def failing(self, *arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise error
        return predict(self, *arguments)

    monkeypatch.setattr(SharedUNet, "predict", failing)
    with pytest.raises(error):
        erase(pipe, CATEGORY, config=CLOSED_FORM, progress=False)
    assert count == 5 and pipe.unet.training
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    assert all(p is processors[name] for name, p in pipe.unet.attn_processors.items())


class Cut(KeyboardInterrupt):
    """A run that ends where the test wants it."""


def cut_off(*arguments):
    raise Cut


def test_a_search_that_was_cut_off_goes_on(asked, monkeypatch, tmp_path):
    """Every word is drawn once, and what comes out is what an uninterrupted run gives."""
    config = dataclasses.replace(
        CLOSED_FORM,
        mining=MiningConfig(member_words=16),
        alignment=dataclasses.replace(CLOSED_FORM.alignment, sampling_batch_size=8),
        vocabulary=dataclasses.replace(CLOSED_FORM.vocabulary, preserve_scale=5.0),
    )
    whole, pipe = FAMILIES["sd1"](), FAMILIES["sd1"]()
    erase(whole, CATEGORY, config=config, progress=False)
    drawn = [tuple(words) for words in asked]
    assert len(drawn) > 2 and all(len(words) <= 4 for words in drawn)
    asked.clear()
    options = {"config": config, "checkpoint_dir": tmp_path, "progress": False}
    counting = selection.guidance_cosine

    def cut(*arguments, **more):
        if len(asked) == 2:
            raise Cut
        return counting(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(selection, "guidance_cosine", cut)
        erase(pipe, CATEGORY, **options)
    # Later stages may change; what was drawn does not depend on them.
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(eraser, "solve", cut_off)
        erase(pipe, CATEGORY, resume=True, **options)
    erase(pipe, CATEGORY, resume=True, **options)
    assert [tuple(words) for words in asked] == drawn
    assert not list(tmp_path.iterdir())
    expected = whole.unet.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in pipe.unet.state_dict().items())


def test_without_resume_all_is_drawn_anew_and_other_drawings_are_refused(
    asked, tmp_path, monkeypatch
):
    pipe = FAMILIES["sd1"]()
    monkeypatch.setattr(eraser, "solve", cut_off)
    config = dataclasses.replace(CLOSED_FORM, mining=MiningConfig(member_words=4))
    options = {"config": config, "checkpoint_dir": tmp_path, "progress": False}
    for _ in range(2):
        with pytest.raises(Cut):
            erase(pipe, CATEGORY, **options)
    assert len(asked) == 2
    alignment = dataclasses.replace(CLOSED_FORM.alignment, guidance_scale=3.0)
    other = {"config": dataclasses.replace(config, alignment=alignment)}
    with pytest.raises(CheckpointError, match="members.safetensors is of another run"):
        erase(pipe, CATEGORY, resume=True, **options | other)


def test_sums_of_other_members_are_refused(tmp_path, monkeypatch):
    """A search that finds other words than the one whose sums are in the checkpoint."""
    pipe, solve = FAMILIES["sd1"](), eraser.solve
    # The lexicon knows hundreds of kinds of dogs: all of them are asked about, and the others.
    config = dataclasses.replace(CLOSED_FORM, mining=MiningConfig(member_words=2000))
    options = {"config": config, "checkpoint_dir": tmp_path, "progress": False}

    def only(member):
        def found(unet, scheduler, names, words, **more):
            return torch.tensor([float(word == member) for word in words])

        return found

    monkeypatch.setattr(selection, "guidance_cosine", only("cat"))
    monkeypatch.setattr(eraser, "solve", cut_off)
    with pytest.raises(Cut):
        erase(pipe, CATEGORY, **options)
    (tmp_path / "members.safetensors").unlink()
    monkeypatch.setattr(eraser, "solve", solve)
    monkeypatch.setattr(selection, "guidance_cosine", only("horse"))
    with pytest.raises(CheckpointError, match="sequence.safetensors is of another run"):
        erase(pipe, CATEGORY, resume=True, **options)


class Rank(Processes):
    """One of two processes; what the other one adds is known before."""

    def __init__(self, rank, other):
        super().__init__()
        self.rank, self.count, self.other, self.sums = rank, 2, other, []

    def sum_(self, tensors):
        for tensor in tensors:
            self.sums.append(tensor.clone())
            if self.other is not None:
                tensor += self.other[len(self.sums) - 1]


def test_two_processes_measure_each_word_once():
    words = [f"word{i}" for i in range(11)]
    asked = {0: [], 1: []}

    def search(rank, other):
        def measure(names, part):
            asked[rank].extend(part)
            return torch.tensor([float(words.index(word)) for word in part])

        processes = Rank(rank, other)
        execution = Execution(processes, progress=False)
        search = MemberSearch(measure, torch.device("cpu"), together=2, execution=execution)
        found = search(Concept("name"), words)
        return found, processes.sums

    own = {rank: search(rank, None)[1] for rank in (0, 1)}
    asked = {0: [], 1: []}
    for rank in (0, 1):
        found, _ = search(rank, own[1 - rank])
        assert torch.equal(found, torch.arange(11.0))
    assert sorted(asked[0] + asked[1]) == sorted(words) and asked[0] and asked[1]
