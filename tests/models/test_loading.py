"""What is no causal language model of the kind that the objectives can use is refused, and the message says which."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from avatarl import UserError
from avatarl.hub import require_on_hub
from avatarl.models import PlayerConfig, build_player, load_model, load_tokenizer
from avatarl.models.loading import check_model, resolve_model

from ..conftest import BLOCK, TINY, TINY_PLAYER

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
}
BERT = transformers.BertConfig(**SMALL, initializer_range=0.2)  # attends as a trained one does
UNTIED = PlayerConfig(settings={**TINY, "tie_word_embeddings": False})


def refusal(model: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(model)
    message = str(caught.value)
    assert "\n" not in message and str(model) in message
    return message


# --- models without logits of their own ------------------------------------------------------------------------------


def test_an_encoder_under_a_causal_name_is_refused(tmp_path: Path):
    transformers.BertForMaskedLM(BERT).save_pretrained(tmp_path)
    assert "hidden states depend on later tokens, as those of an encoder (BERT) do" in refusal(tmp_path)


def test_an_encoder_without_a_head_is_refused_as_an_encoder(tmp_path: Path):
    transformers.BertModel(BERT).save_pretrained(tmp_path)
    assert "hidden states depend on later tokens" in refusal(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path):
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=300)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "is an encoder-decoder (t5), which reads one text to write another; expected" in refusal(tmp_path)


@pytest.mark.parametrize(
    "config, found",
    [
        (transformers.LlavaConfig(), "is multimodal (llava)"),
        (transformers.ViTConfig(), "is of type vit, for which transformers has no causal language model"),
    ],
    ids=["llava", "vit"],
)
def test_what_has_no_causal_language_model_is_refused_by_its_configuration(tmp_path: Path, config, found: str):
    config.save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert found in message and "such as llama, gpt2 or qwen3" in message


def test_a_model_saved_without_its_head_is_refused(tmp_path: Path, tokenizer):
    build_player(UNTIED, tokenizer, BLOCK, seed=1).model.save_pretrained(tmp_path)
    assert "has no head (lm_head.weight is missing), so it was saved without one" in refusal(tmp_path)


def test_a_model_saved_without_its_head_opens_where_the_embedding_is_the_head(tmp_path: Path, tokenizer):
    player = build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).eval()
    player.model.save_pretrained(tmp_path)
    ids = torch.arange(BLOCK).unsqueeze(0)
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, player(ids).logits)


# --- logits that are no products of hidden states and head -----------------------------------------------------------

NOT_PRODUCTS = {
    "a cap": (transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1), "capped at 30"),
    "a cap met by ordinary logits": (
        transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.01),
        "capped at 0.01",
    ),
    "a divisor": (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "scaled by 0.125"),
    "a factor": (transformers.CohereConfig(**SMALL, logit_scale=3.0), "scaled by 3"),
    "a bias": (transformers.PhiConfig(**SMALL), "its logits have a bias"),
    "a head of layers": (transformers.BertConfig(**SMALL, is_decoder=True), "its logits have a bias"),
}


@pytest.mark.parametrize("kind", NOT_PRODUCTS)
def test_what_is_done_to_the_logits_is_named(tmp_path: Path, kind: str):
    config, found = NOT_PRODUCTS[kind]
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert found in message
    assert message.endswith("hidden states and the head's weight alone, so expected are logits that are their product")


def test_logits_that_are_made_in_another_way_are_refused(tokenizer):
    player = build_player(UNTIED, tokenizer, BLOCK, seed=1)
    player.lm_head.register_forward_hook(lambda module, inputs, logits: logits.flip(-1))
    with pytest.raises(UserError, match="its logits are made by more than the head"):
        check_model(player, "a player")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(tokenizer, dtype: torch.dtype):
    player = build_player(UNTIED, tokenizer, BLOCK, seed=1)
    player.lm_head.weight = nn.Parameter(player.lm_head.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(
        UserError, match=rf"its head is quantised \(Parameter, {dtype}\); the objectives multiply by it"
    ):
        check_model(player, "a player")


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HTTPServer]:
    """A Hub on this machine that answers every question with ``hub.answer``, a status and an error code."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            status, code = self.server.answer
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    server.asked, server.answer = [], (404, "RepoNotFound")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_id_that_the_hub_does_not_know_is_refused_after_one_question(hub: HTTPServer, load):
    with pytest.raises(UserError, match="model owner/name: no such folder, and the Hugging Face Hub has no model of"):
        load("owner/name")
    assert hub.asked.count("/api/models/owner/name") == 1


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_without_network_an_id_is_refused_at_once(hub: HTTPServer, load):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="and the Hugging Face Hub cannot be reached .*; give a folder, or") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_offline_an_id_is_looked_for_in_the_cache_alone(hub: HTTPServer, monkeypatch: pytest.MonkeyPatch, load):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and it is not in the local cache; give a folder"):
        load("owner/name")
    assert not hub.asked


def test_what_was_downloaded_before_is_not_asked_for(hub: HTTPServer, tmp_path: Path):
    (tmp_path / "cache" / "models--owner--name" / "snapshots").mkdir(parents=True)
    require_on_hub("owner/name", "model")
    assert not hub.asked
    with pytest.raises(UserError, match="dataset owner/name: no such folder"):
        require_on_hub("owner/name", "dataset")
    assert "/api/datasets/owner/name" in hub.asked


def test_a_hub_that_is_busy_is_left_to_the_library(hub: HTTPServer):
    hub.answer = (503, "")
    require_on_hub("owner/name", "model")
    assert hub.asked


def test_a_name_that_is_no_id_is_refused_without_asking(hub: HTTPServer):
    with pytest.raises(UserError, match="no such folder, and no id of the Hugging Face Hub"):
        load_model("no--such..name")
    assert not hub.asked


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for mistyped in ("runs/player", "runs/demo/avatarl", "/no/such/folder"):
        with pytest.raises(UserError, match="no such folder"):
            resolve_model(mistyped)
    assert resolve_model("owner/name") == "owner/name"
