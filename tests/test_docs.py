"""Every block of Python in the README runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import memkern

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_blocks_of_the_readme_run(sd1, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = sd1.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = sd1.text_encoder(ids)[0]
        patch = memkern.patch(sd1)
        exec(compile(block, "README.md", "exec"), {
            "memkern": memkern, "pipe": sd1, "patch": patch, "input_ids": ids, "embeds": embeds,
        })  # fmt: skip


def test_there_are_blocks():
    assert len(BLOCKS) >= 5
