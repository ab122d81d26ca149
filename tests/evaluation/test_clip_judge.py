"""Zero-shot judging and scoring with a CLIP model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip

from realera_fast.evaluation import ClipJudge

THINGS = ("cat", "dog", "ship")


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (count, 40, 48, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(value.numpy()) for value in values]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def stock(clip, images, prompts):
    """What the model itself says of all pairs: logits, and cosines."""
    model, processor = clip
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits_per_image, output.image_embeds @ output.text_embeds.mT


def test_it_says_what_the_model_says(clip):
    images = pictures(5)
    judge = ClipJudge(*clip, things=THINGS, styles=("van gogh", "art"), batch_size=2)
    prompts = [f"a photo of a {name}" for name in THINGS]
    logits, cosines = stock(clip, images, prompts)
    assert torch.allclose(judge.probabilities(images, prompts), logits.softmax(1), atol=1e-5)
    things, styles = judge.classify(images)
    assert things == [THINGS[i] for i in logits.argmax(1).tolist()]
    _, by_style = stock(clip, images, [f"a picture in the style of {s}" for s in judge.styles])
    assert styles == [judge.styles[i] for i in by_style.argmax(1).tolist()]
    told = [prompts[i % 3] for i in range(5)]
    expected = torch.stack([100 * cosines[i, i % 3].clamp_min(0) for i in range(5)])
    assert torch.allclose(judge.score(images, told), expected, atol=1e-4)
    # The names' order is no argument.
    assert ClipJudge(*clip, things=THINGS[::-1]).classify(images)[0] == things


def test_odd_input(clip):
    judge = ClipJudge(*clip, things=THINGS)
    assert judge.classify([]) == ([], []) and judge.score([], []).shape == (0,)
    assert judge.classify(pictures(1))[1] == [""]
    modes = [picture.convert(mode) for picture in pictures(1) for mode in ("L", "RGBA", "P")]
    assert len(judge.classify(modes)[0]) == 3
    # Longer than the model reads: cut, not an error.
    assert judge.score(pictures(1), ["cat " * 200]).isfinite().all()
    with pytest.raises(ValueError, match="one for each of 1 pictures, got 2"):
        judge.score(pictures(1), ["a", "b"])
    with pytest.raises(ValueError, match="exactly one"):
        ClipJudge(*clip, thing_template="a photo")
    with pytest.raises(TypeError, match="model: expected transformers' CLIPModel, got Linear"):
        ClipJudge(torch.nn.Linear(1, 1), clip[1])
    with pytest.raises(ValueError, match="batch_size"):
        ClipJudge(*clip, batch_size=0)


def test_nothing_of_the_users_changes(clip):
    model, processor = clip
    judge = ClipJudge(model, processor, things=THINGS)
    model.train()
    model.text_model.eval()
    state = torch.random.get_rng_state()
    first, second = judge.classify(pictures(3)), judge.classify(pictures(3))
    assert first == second and torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not model.text_model.training and model.vision_model.training
    model.eval()


def test_half_precision(clip):
    wide, narrow = ClipJudge(*clip), ClipJudge(*tiny_clip(torch.bfloat16))
    images, prompts = pictures(4), ["cat", "dog", "ship", "tree"]
    scores = narrow.score(images, prompts)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, wide.score(images, prompts), atol=3.0)


def test_it_is_loaded_offline_and_pinned(clip, tmp_path):
    model, processor = clip
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    loaded = ClipJudge.from_pretrained(tmp_path / "clip", things=THINGS)
    original = ClipJudge(model, processor, things=THINGS)
    assert loaded.classify(pictures(3)) == original.classify(pictures(3))
    one, other = loaded.identity(), original.identity()
    assert one["weights_sha256"] == other["weights_sha256"] and one["things"] == list(THINGS)
    assert one["name"] == "clip"
    changed = tiny_clip()[0]
    with torch.no_grad():
        changed.logit_scale.add_(1)
    assert ClipJudge(changed, processor).identity()["weights_sha256"] != one["weights_sha256"]
    with pytest.raises(ValueError, match="holds no CLIP model"):
        ClipJudge.from_pretrained(tmp_path)
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="offline from safetensors"):
        ClipJudge.from_pretrained(tmp_path / "clip")


def test_the_embedded_judge_is_whole_or_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from realera_fast.embedded import FOLDER
    from realera_fast.embedded.judge import Judge

    state = load_file(FOLDER / "judge.safetensors")
    assert Judge.load().thing_head.weight.any()
    dropped = next(name for name in state if name.endswith("running_mean"))
    save_file({n: v for n, v in state.items() if n != dropped}, tmp_path / "part.safetensors")
    with pytest.raises(RuntimeError, match=dropped.replace(".", r"\.")):
        Judge.load(tmp_path / "part.safetensors")
