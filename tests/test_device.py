"""What `auto` takes for a precision."""

from __future__ import annotations

import pytest
import torch

from avatarl.device import pick_precision


@pytest.mark.parametrize(
    "capabilities, precision",
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True, "avx512_bf16": False}, "fp32")],
)
def test_bf16_is_for_processors_that_multiply_it(monkeypatch, capabilities: dict[str, bool], precision: str):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_precision("auto", torch.device("cpu")) == precision
    assert pick_precision("fp32", torch.device("cpu")) == "fp32", "what is asked for goes before"


def test_other_devices_are_not_judged_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert pick_precision("auto", torch.device("meta")) == "fp32"
