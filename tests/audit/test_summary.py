"""The summary of an audit in few numbers, and the axes of its chart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from memkern import audit
from memkern.audit.report import axes_of, plot
from memkern.audit.summary import Summary, paired, summarize, write_summary


def rows(values, name="pixels_to_unmitigated", **more):
    """values[method][prompt] = a list over seeds."""
    return [
        {"prompt_id": str(prompt), "method": method, "seed": seed, name: value, **more}
        for method, prompts in values.items()
        for prompt, seeds in enumerate(prompts)
        for seed, value in enumerate(seeds)
    ]


def test_summaries():
    summary = Summary.of([[0.0, 1.0], [], [0.4]])
    assert summary.mean == pytest.approx(0.45)
    assert summary.above == pytest.approx(1 / 3)
    assert Summary.of([[0.0, 1.0], [], [0.4]], 0.3).above == pytest.approx(2 / 3)
    assert summary.low <= summary.mean <= summary.high
    assert Summary.of([[], []]) is None


def test_g35_methods_on_the_same_prompts_are_compared_in_pairs():
    """Prompts differ by far more than methods do: unpaired intervals overlap, the paired one leaves out 0."""
    drawn = np.random.default_rng(1)
    level = drawn.uniform(0, 1, 40)
    values = {
        "a": [[v, v + 0.01] for v in level],
        "b": [[v - 0.05, v - 0.04 + drawn.normal(0, 0.01)] for v in level],
        "c": [[v] if place else [None] for place, v in enumerate(level)],
    }
    table = rows(values)
    found = summarize(table)
    assert found["b"]["pixels_to_unmitigated"].high > found["a"]["pixels_to_unmitigated"].low
    pairs = paired(table)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    one = pairs["a", "b"]["pixels_to_unmitigated"]
    assert 0 < one.low <= one.mean <= one.high
    expected = [np.mean(a) - np.mean(b) for a, b in zip(values["a"], values["b"], strict=True)]
    assert one.mean == pytest.approx(np.mean(expected))
    # By the normal approximation.
    assert one.high - one.low == pytest.approx(2 * 1.96 * np.std(expected) / np.sqrt(40), rel=0.2)
    assert pairs["a", "c"]["pixels_to_unmitigated"].count == 39, "prompts that both have"


def test_files_of_the_summary(tmp_path):
    table = rows({"none": [[0.25], [0.75]], "a|b_&": [[1.0], [1.0]]}, seconds=1.0)
    write_summary(tmp_path, table, 0.5)
    markdown = (tmp_path / "summary.md").read_text().splitlines()
    assert markdown[0] == "| method | pixel correlation with the unmitigated image |"
    assert markdown[2].startswith("| none | 0.500 (0.250–0.750) |")
    assert markdown[3].startswith("| a\\|b_& | 1.000")
    latex = (tmp_path / "summary.tex").read_text()
    assert latex == (
        "\\begin{tabular}{lr}\n"
        "method & pixel correlation with the unmitigated image \\\\ \\hline\n"
        "none & 0.500 (0.250--0.750) \\\\\n"
        "a|b\\_\\& & 1.000 (1.000--1.000) \\\\\n"
        "\\end{tabular}\n"
    )
    document = json.loads((tmp_path / "summary.json").read_text())
    assert document["methods"]["none"]["pixels_to_unmitigated"]["mean"] == 0.5
    (difference,) = document["differences"]
    assert (difference["first"], difference["second"], difference["mean"]) == ("none", "a|b_&", -0.5)
    assert "seconds" not in (tmp_path / "summary.json").read_text(), "no two runs have them in common"


@pytest.mark.parametrize(
    ("measures", "axes"),
    [
        (["pixels_to_unmitigated", "pixels_to_reference", "noise_magnitude"], None),
        (["pixels_to_unmitigated", "pixels_to_reference", "kept"], ("pixels_to_reference", "kept")),
        (["sscd_to_unmitigated", "pixels_to_unmitigated", "clip_score"], ("sscd_to_unmitigated", "clip_score")),
        (["sscd_to_unmitigated", "sscd_to_reference", "clip_score", "kept"], ("sscd_to_reference", "clip_score")),
    ],
)
def test_g35_a_chart_of_memorization_and_fidelity_has_both(measures, axes):
    assert axes_of(measures) == axes
    summary = Summary(0.5, 0.4, 0.6, 0.5, 2)
    assert bool(plot({"none": dict.fromkeys(measures, summary)}, measures)) == (axes is not None)


def test_ordinary_prompts_keep_their_image(tmp_path):
    """Without a CLIP model: of prompts without a training image, the similarity to the unmitigated image."""
    names = tmp_path / "prompts.csv"
    names.write_text("prompt,reference\na red circle,red.png\na blue square,\n")

    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "red.png")
    audit.run(out=tmp_path / "out", prompts=names, policies=["zero-pad:1"], steps=2, quiet=True)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    assert found["none"]["kept"]["mean"] == 1
    assert found["zero-pad:1"]["kept"]["count"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "none − zero-pad:1" in page
