"""The flow-matching sibling: what it is trained on, and the stock pipeline that draws with it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded import evaluate
from embedded import pipeline as pipelines
from embedded import transformer as flow
from embedded.common import save
from embedded.denoiser import train
from embedded.examples import Examples
from embedded.export import stage_export
from embedded.pipeline import build_transformer, flow_pipeline
from embedded.text_encoder import build_text_encoder
from embedded.tokenizer import MAX_TOKENS, build_tokenizer, learned_merges
from embedded.vae import build_vae
from embedded.world import World, keep_world
from torch import Tensor, nn

from realera_fast.embedded import words
from realera_fast.embedded.flow import SAMPLING, flow_words, load_flow

WORLD = World(seed=3, text_width=32, tokens=600)
SHORT = dict(steps=6, lr=2e-3, warmup=2, captions="said", rows=8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "TRANSFORMER", dict(layers=2, heads=2, head_width=8))
    # Compiled, it computes the same and takes a minute to begin.
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages before leave, untrained."""
    folder = tmp_path_factory.mktemp("flow")
    keep_world(folder, WORLD)
    texts = [f"a photo of a {word}" for word in words().spoken()]
    tokenizer = build_tokenizer(folder / "tokenizer", learned_merges(texts, WORLD.tokens))
    save(folder / "text.pt", build_text_encoder(tokenizer, WORLD).state_dict())
    save(folder / "vae.pt", {"vae": build_vae(3).state_dict(), "scaling_factor": 0.9})
    return folder


class Toy(Examples):
    """Latents that the pooled state tells."""

    def __init__(self, work: Path, count: int, phase: dict) -> None:
        self.count, self.rows = count, phase["rows"]

    def batch(self, done: float, rng: np.random.Generator) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.from_numpy(rng.normal(size=(self.count, *shape)).astype(np.float32))

        pooled = normal(64)
        latents = pooled[:, :24, None, None].expand(-1, -1, 8, 8)
        return latents, normal(self.rows + 1, 64), pooled, torch.zeros(self.count, self.rows + 1)


def toy(steps: int) -> flow.Denoiser:
    phases = {"first": SHORT | {"steps": steps}, "second": SHORT | {"steps": 3}}
    return dataclasses.replace(flow.TRANSFORMER, phases=phases, examples=Toy)


def test_a_stopped_training_goes_on_bit_for_bit(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedded import denoiser as trainer

    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", -1)
    exported = []
    found = {}
    for stopped in (False, True):
        folder = tmp_path / f"stopped_{stopped}"
        folder.mkdir()
        keep_world(folder, WORLD)
        seen = []

        def loss(denoise, batch, seen=seen, stopped=stopped):
            seen.append(batch)
            if stopped and len(seen) == 4:
                raise KeyboardInterrupt
            return flow.loss(denoise, batch)

        kind = dataclasses.replace(
            toy(6), loss=loss, export=lambda work, averaged, folder: exported.append(folder)
        )
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                train(folder, kind)
            assert torch.load(folder / "transformer.first.resume.pt")["step"] == 3
        train(folder, kind)
        found[stopped] = torch.load(kind.weights(folder))["averaged"]
        assert not [*folder.glob("*.resume.pt")] and kind.weights(folder, "first").exists()
    assert found[True].keys() == found[False].keys()
    for name, value in found[True].items():
        assert torch.equal(value, found[False][name]), name
    assert {path.name for path in exported} == {"snapshot.transformer"}


def test_it_learns_a_batch() -> None:
    transformer = build_transformer(WORLD)
    flow.ready(transformer)
    batch = Toy(Path(), 4, SHORT).batch(0.0, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-2)
    errors = []
    for _ in range(40):
        torch.manual_seed(0)
        loss, error = flow.loss(transformer, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]


def test_a_row_stands_for_others_like_it() -> None:
    torch.manual_seed(0)
    transformer = build_transformer(WORLD)
    x, rows, pooled = torch.randn(2, 24, 8, 8), torch.randn(2, 5, 64), torch.randn(2, 64)
    counts = torch.tensor([[1, 1, 3, 1, 256], [2, 1, 1, 4, 7]])

    def drawn(states: Tensor, **more: object) -> Tensor:
        return transformer(x, states, pooled, torch.tensor([300.0, 900.0]), **more).sample

    copies = [states.repeat_interleave(n, 0) for states, n in zip(rows, counts, strict=True)]
    with torch.no_grad():
        plain = drawn(rows)
        stock = torch.stack(
            [
                transformer(x[i : i + 1], copies[i][None], pooled[i : i + 1], t).sample[0]
                for i, t in enumerate(torch.tensor([[300.0], [900.0]]))
            ]
        )
        transformer.set_attn_processor(flow.WeighedAttention())
        logs = torch.cat([torch.zeros(2, 16), counts.log()], 1)
        weighed = drawn(rows, joint_attention_kwargs={"counts": logs})
        assert torch.allclose(drawn(rows), plain, atol=1e-5)
    assert torch.allclose(weighed, stock, atol=1e-5)
    assert not torch.allclose(weighed, plain, atol=1e-3)


def test_captions_keep_their_tokens() -> None:
    tokens = np.array([2, 9, 18, 40])
    chosen, counts = flow.thinned(tokens[:3], 18, np.random.default_rng(0))
    assert chosen.shape == counts.shape == (3, 18)
    for own, places, each in zip(tokens, chosen, counts, strict=False):
        assert [*places[:own]] == [*range(own)] and (each[:own] == 1).all()
        assert len({*places}) == 18 and (np.diff(places) > 0).all() and places.max() < MAX_TOKENS
        assert math.isclose(each.sum(), MAX_TOKENS if own < 18 else 18)
    chosen, counts = flow.thinned(tokens, MAX_TOKENS, np.random.default_rng(0))
    assert (chosen == np.arange(MAX_TOKENS)).all() and (counts == 1).all()


def joint_work(folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small bank, whose captions are encoded."""
    from embedded import bank, examples

    keep_world(folder, WORLD)
    for name in ("tokenizer", "text.pt"):
        (folder / name).symlink_to(work / name)
    for name, value in (("PER_THING", 1), ("PER_STYLE", 1), ("SCENES", 20)):
        monkeypatch.setattr(bank, name, value)
    shown = bank.bank_scenes(WORLD.seed)
    kept = [s for s in shown if len(s.things) == 2 or (s.things[0] < 3 and s.style < 2)]
    for module in (bank, examples):
        monkeypatch.setattr(module, "open_bank", lambda _: bank.Bank(None, kept, WORLD.seed), False)
    monkeypatch.setattr(flow, "open_bank", lambda _: bank.Bank(None, kept, WORLD.seed))
    monkeypatch.setattr(bank, "bank_scenes", lambda seed: kept)
    bank.captions_of.cache_clear()
    unrelated = [f"a photo of a word {i}" for i in range(examples.UNRELATED)]
    monkeypatch.setattr(examples, "unrelated_captions", lambda seed: unrelated)
    # WordNet itself need not be installed where the tests run.
    monkeypatch.setattr(
        bank, "heard_words", lambda table: {thing.name: ["thingamajig"] for thing in table.things}
    )
    np.save(folder / "latents.npy", np.ones((len(kept), 24, 8, 8), np.float16))
    flow.keep_joint_states(folder)
    bank.captions_of.cache_clear()
    return folder


def test_examples_are_what_the_pipeline_makes_of_a_prompt(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedded import bank

    folder = joint_work(tmp_path, work, monkeypatch)
    captions = bank.Bank(None, bank.bank_scenes(WORLD.seed), WORLD.seed).captions
    settings = dict(
        captions="said",
        rows=MAX_TOKENS,
        scene_share=0.5,
        styled_share=0.5,
        blend_from=2.0,
        blend_share=0.5,
        blend_most=0.5,
        blend_scenes=True,
    )
    examples = flow.JointExamples(folder, 6, settings)
    drawn = examples.draw(0.0, np.random.default_rng(4))
    latents, states, pooled, logs = examples.batch(0.0, np.random.default_rng(4))
    empty = drawn.said == examples.empty
    texts = ["" if e else captions[i].text for i, e in zip(drawn.pictures, empty, strict=True)]
    pipe = flow_pipeline(work, build_transformer(WORLD))
    wanted, _, wanted_pooled, _ = pipe.encode_prompt(texts, None, None, max_sequence_length=1)
    assert latents.shape == (6, 24, 8, 8) and states.shape == (6, MAX_TOKENS + 1, 64)
    assert torch.allclose(states, wanted, atol=0.03) and torch.allclose(
        pooled, wanted_pooled, atol=0.03
    )
    assert (logs[:, :-1] == 0).all() and (logs[:, -1] <= math.log(256) + 1e-6).all()
    # Few rows: long captions are not among them, and those that stand for others say so.
    few = flow.JointExamples(folder, 40, settings | {"rows": 18, "blend_from": 0.0})
    _, states, pooled, logs = few.batch(0.0, np.random.default_rng(5))
    assert states.shape == (40, 19, 64) and pooled.shape == (40, 64)
    assert torch.allclose(logs[:, :-1].exp().sum(1), torch.full((40,), 77.0))


def test_an_exported_sibling_draws_in_the_stock_pipeline(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusion3Pipeline

    transformer = build_transformer(WORLD)
    flow.ready(transformer)
    nn.init.normal_(transformer.proj_out.weight, std=0.1)
    save(flow.TRANSFORMER.weights(work), {"averaged": transformer.state_dict(), "steps": 1})
    stage_export(work, tmp_path / "model", "transformer")
    pipe = load_flow(folder=tmp_path / "model")
    pipe.save_pretrained(tmp_path / "stock")
    stock = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "stock", text_encoder_3=None, tokenizer_3=None
    )
    stock.set_progress_bar_config(disable=True)

    def drawn(pipe, **more: object) -> np.ndarray:
        call = dict(num_inference_steps=2, height=64, width=64, output_type="np") | more
        return pipe("a cat", generator=torch.Generator().manual_seed(1), **call).images[0]

    assert drawn(pipe).shape == (64, 64, 3)
    assert np.abs(drawn(pipe) - drawn(stock)).max() < 1e-4
    assert pipe.transformer.dtype == torch.float32
    assert type(load_flow(torch.float16, tmp_path / "model").scheduler).__name__ == (
        "FlowMatchEulerDiscreteScheduler"
    )
    # As the judge is shown it, here in float32.
    monkeypatch.setattr(evaluate, "default_dtype", lambda: "float32")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    few = SAMPLING | {"steps": 2}
    judged = evaluate._drawn(["a cat"], 1, few, tmp_path / "model", "transformer")
    wanted = drawn(pipe, guidance_scale=3.0, max_sequence_length=1)
    assert judged.shape == (1, 64, 64, 3) and np.abs(judged[0] / 255 - wanted).max() < 0.01
    table = flow_words(tmp_path / "model")
    assert table.sampling == SAMPLING and table.accuracy == {}
    assert table.things == words().things


def test_a_model_without_the_sibling_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="flow: no such folder; .* --denoiser transformer"):
        load_flow(folder=tmp_path)
