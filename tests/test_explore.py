"""`memkern explore`: the tokens and the code that are shown, the images behind them, and the page over HTTP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import memkern
from memkern import demo
from memkern.explore import Choice, page, runs, show
from memkern.explore.page import build, chosen
from memkern.explore.serve import example, loading, serve
from memkern.explore.tokens import as_html
from memkern.policy import Policy
from memkern.roles import Role

VALUES = ("a red circle", "", "zero-pad", 0.5, 1.0, "auto", ["down", "mid", "up"], 0.0, 1.0, "0, 3", 2.0, 5.0)
"""Of the page's controls, in order."""


def test_tokens_have_roles_and_edits(tokenizers):
    found, cut = runs(tokenizers["sd1"], "a cat", Policy.parse("swap-pad-zero-eot"))
    assert [(run.text, run.role, run.edit, run.count) for run in found] == [
        ("<|startoftext|>", Role.SOT, "", 1),
        ("a", Role.PROMPT, "", 1),
        ("cat", Role.PROMPT, "", 1),
        ("<|endoftext|>", Role.EOT, "zeroed", 1),
        ("<|endoftext|>", Role.PAD, "re-embedded as !", 73),
    ]
    assert cut == ""


@pytest.mark.parametrize(
    ("policy", "edits"),
    [
        ("zero-pad:0.5", {Role.PAD: {"zeroed", ""}}),
        ("ren:1.5", {Role.SOT: {"logit × 1.5"}, Role.PAD: {"excluded"}}),
        ("pad-from-eot", {Role.PAD: {"takes row 3"}}),
        ("prompt-eot-from-pad", {Role.PROMPT: {"takes another row"}, Role.EOT: {"takes another row"}}),
        ("guard:0.2,1.5", {role: {"logit attenuated where it stands out"} for role in Role if role is not Role.SOT}),
        ("none", {}),
    ],
)
def test_every_kind_of_edit_is_said(tokenizers, policy, edits):
    found, _ = runs(tokenizers["sd1"], "a cat", Policy.parse(policy))
    said = {role: {run.edit for run in found if run.role is role} for role in Role}
    assert said == {role: edits.get(role, {""}) for role in Role}


def test_negative_prompts_are_edited_by_what_acts_on_them(tokenizers):
    found, _ = runs(tokenizers["sd1"], "blurry", Policy.parse("ren:1.5"), "uncond")
    assert {run.role: run.edit for run in found} == {Role.SOT: "", Role.PROMPT: "", Role.EOT: "", Role.PAD: "excluded"}


@pytest.mark.parametrize("prompt", ["", " ".join(["cat"] * 200), "<script>&", "a <|endoftext|> b", "日本語"])
def test_any_prompt_is_shown_as_text(tokenizers, prompt):
    found, cut = runs(tokenizers["sd1"], prompt, Policy.parse("zero-pad"))
    assert sum(run.count for run in found) == 77
    assert ("cat" in cut) == (len(prompt) > 700)
    assert "<script>" not in as_html(found)


def test_a_choice_is_the_preset_until_it_is_changed():
    assert Choice("zero-pad").policy() == Policy.parse("zero-pad:0.7")
    assert Choice("zero-pad", share=0.4).policy() == Policy.parse("zero-pad:0.4")
    assert Choice("swap-pad-zero-eot", share=0.4).policy() == Policy.parse("swap-pad-zero-eot")
    changed = Choice("swap-pad-zero-eot", amount=0.5, blocks=("mid", "down"), steps=(0.0, 0.5)).policy()
    assert changed.reembed_pads == "!"
    (edit,) = changed.edits
    assert str(edit) == "strength(0.5) EOT on cond in layers down, mid in steps 0 to 0.5"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, "zero-pda", "did you mean 'zero-pad'"),
        (2, "guard", "alpha has no default"),
        (2, None, "unknown preset ''"),
        (9, "x", "seeds: expected whole numbers such as 0, 1, got 'x'"),
        (9, "", "seeds: expected whole numbers"),
        (9, "1,2,3,4,5,6,7,8,9", "seeds: expected 1 to 8"),
        (9, "-1", "seeds: expected 1 to 8"),
        (7, 1.0, "steps: expected a part of the schedule"),
        (5, "later", "stage: expected one of"),
    ],
)
def test_what_is_wrong_with_a_choice_is_named(place, value, message):
    given = list(VALUES)
    given[place] = value
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        chosen(*given).policy()


@pytest.mark.parametrize(
    "choice",
    [
        Choice("zero-pad", share=0.6, prompt='a "red" circle', seeds=(3,), count=2, guidance=5.0),
        Choice("ren", blocks=("down",), steps=(0.0, 0.5), prompt="a red circle", seeds=(4,), count=2, stage="kv"),
    ],
)
def test_the_code_generates_what_is_shown(choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    side = show(pipe, choice, edited=True)
    assert not memkern.status(pipe).patched
    with torch.no_grad():
        exec(choice.code(loading(pipe, "embedded")), {})
    from PIL import Image

    (shown,) = side.images
    assert Image.open(f"{choice.seeds[0]}.png").tobytes() == shown.tobytes()
    assert show(pipe, choice, edited=False).images[0].tobytes() != shown.tobytes()


def test_the_code_loads_the_model_that_is_shown(sd1):
    assert loading(sd1, "someone/model") == (
        "from diffusers import StableDiffusionPipeline\n\n"
        "pipe = StableDiffusionPipeline.from_pretrained('someone/model', torch_dtype=torch.float32)"
    )
    assert "from_single_file('model.safetensors'" in loading(sd1, "model.safetensors")
    assert example("someone/model").prompt


def test_what_has_no_page_is_refused(sd1):
    with pytest.raises(TypeError, match="pipe"):
        serve(SimpleNamespace(), wait=False)
    with pytest.raises(ValueError, match="cannot be patched"):
        serve(type(sd1)(**sd1.components | {"text_encoder": None}), wait=False)


@pytest.fixture(scope="module")
def client():
    """The page on the embedded model, asked over HTTP as a browser does."""
    gradio_client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    address = serve(demo.load(), port=0, browser=False, wait=False)
    return gradio_client.Client(address, verbose=False)


def test_the_page_shows_tokens_and_code(client):
    tokens, code = client.predict(*VALUES, api_name="/described")
    assert tokens.count('class="token pad edited"') == 1
    assert "memkern.patch(pipe, 'zero-pad:0.5')" in code


def test_the_page_says_what_is_wrong(client):
    tokens, code = client.predict(*VALUES[:2], "zero-pda", *VALUES[3:], api_name="/described")
    assert "did you mean" in tokens
    assert code == ""
    with pytest.raises(Exception, match="did you mean"):
        client.predict(*VALUES[:2], "zero-pda", *VALUES[3:], api_name="/generated")


def test_what_is_refused_is_refused_before_an_image_is_generated(client, monkeypatch):
    def shown(pipe, choice, *, edited, report):
        assert edited
        raise ValueError("no kv stage here")

    monkeypatch.setattr(page, "show", shown)
    with pytest.raises(Exception, match="no kv stage here"):
        client.predict(*VALUES, api_name="/generated")


def test_the_page_generates_both_sides(client):
    before, after, mass, maps, status = client.predict(*VALUES, api_name="/generated")
    assert [row["caption"] for row in before] == [row["caption"] for row in after] == ["seed 0", "seed 3"]
    from PIL import Image

    pairs = zip(before, after, strict=True)
    assert all(Image.open(a["image"]).tobytes() != Image.open(b["image"]).tobytes() for a, b in pairs)
    assert "36 PAD zeroed" in status
    assert mass["plot"].startswith("data:image/")
    assert maps["plot"].startswith("data:image/")


def test_the_page_fetches_nothing_from_elsewhere():
    """Its theme has no fonts of others."""
    assert not build(demo.load(), "pipe = None", example("embedded")).analytics_enabled
