"""The 7B step, with a tiny model: the decoder against transformers, the update, the search."""

import json
import time

import pytest
import torch

from benchmarks import providers
from benchmarks.report import tables
from benchmarks.run import runner
from benchmarks.step_7b import decoder, longest, rows, step
from grpo_fast import reference

CPU = torch.device("cpu")
LIMIT = 1000
PROPERTIES = type("Properties", (), {"total_memory": 85_000_000_000})


def test_the_decoder_is_qwen2():
    transformers = pytest.importorskip("transformers", reason="the oracle is its Qwen2")
    c = decoder.TINY
    config = transformers.Qwen2Config(
        vocab_size=c.V,
        hidden_size=c.D,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        rope_theta=c.theta,
        rms_norm_eps=c.eps,
        tie_word_embeddings=False,
    )
    theirs = transformers.Qwen2ForCausalLM(config)
    ours = decoder.make(c, CPU, torch.float32)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(c.V, (2, 9))
    logits = ours.lm_head(ours(ids))
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_seven_billion():
    with torch.device("meta"):
        model = decoder.Decoder(decoder.QWEN_7B)
    assert sum(x.numel() for x in model.parameters()) == 7_615_616_512


@pytest.mark.parametrize("mode", step.MODES)
def test_an_update_is_the_reference_of_the_same_log_probs(mode):
    trained = step.build(decoder.TINY, mode, CPU, torch.float32)
    inputs = step.batch(step.Size(2, 3, 5), decoder.TINY.V, CPU)
    heads = [providers.load(stem, "eager") for stem in ("linear_logprob", "linear_grpo")]
    loss = step.update(trained, inputs, *heads)
    trained_names = {n for n, x in trained.model.named_parameters() if x.grad is not None}
    every = {n for n, x in trained.model.named_parameters() if x.requires_grad}
    assert trained_names == every
    assert all("lora" in n for n in every) == (mode == "lora")

    def log_probs(model):
        logits = model.lm_head(model(inputs["ids"]))[:, 2:-1]
        return reference.logprob(logits.double(), inputs["completion"])

    new = log_probs(trained.model).detach()
    if mode == "lora":
        decoder.switch_adapters(trained.model, on=False)
    ref = log_probs(trained.reference or trained.model).detach()
    decoder.switch_adapters(trained.model, on=True)
    assert ((new - ref).abs().max() > 1e-6) == (mode == "lora")
    want = reference.policy_loss(
        new,
        advantages=inputs["advantages"],
        old_logps=new,
        ref_logps=ref,
        objective=step.OBJECTIVE,
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=1e-6)


def test_the_whole_program_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "ROUNDS", 2)
    out = tmp_path / "step.json"
    document = on_a_cpu(out=out)
    found = document["step"]
    absent = document["machine_info"]["absent"]
    named = {(row["mode"], row["provider"]) for row in found} | {
        tuple(who.split(", ")[1:]) for who in absent
    }
    assert named == {(mode, name) for mode in step.MODES for name in step.PROVIDERS}
    assert {("lora", "eager"), ("full", "eager")} <= named
    assert not [why for why in absent.values() if why.startswith("wrong")]
    assert all(row["tokens_per_second"] > 0 and row["seconds"] > 0 for row in found)
    assert json.loads(out.read_text())["not_reached"] == []


def on_a_cpu(chosen=step.PROVIDERS, modes=step.MODES, out=None):
    return rows.run(rows.planned(modes, chosen, (), "cpu"), 300, out)


def test_both_ways_to_train_come_before_the_longest_completions():
    plan = rows.planned(step.MODES, ("eager", "grpo_fast"), step.CAPS)
    kinds = [(row.kind, row.mode) for row in plan]
    assert list(dict.fromkeys(kinds)) == [
        *(("headline", "lora"), ("headline", "full"), ("batch", "lora"), ("batch", "full")),
        *(("longest", "lora"), ("longest", "full")),
    ]
    plan = rows.planned(("full",), ("eager", "grpo_fast"), step.CAPS)
    assert [str(row) for row in plan] == [
        "7B step, full, 80 GB, 32768 tokens, grpo_fast",
        "7B step, full, 80 GB, 32768 tokens, eager",
        "7B step, full, eager",
        "7B step, full, grpo_fast",
        *(f"7B step, full, {x} GB, {y}" for x in (24, 48, 80) for y in ("grpo_fast", "eager")),
    ]
    document = rows.run(plan, -1.0)
    assert document["machine_info"]["absent"] == {}
    assert document["not_reached"] == [str(row) for row in plan]


@pytest.fixture
def driven(monkeypatch):
    """Runs rows without a GPU, by what `step.peak_at` is to say of (size, provider)."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: PROPERTIES)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(step, "build", lambda *_: None)

    def run(plan, peak):
        monkeypatch.setattr(step, "peak_at", lambda _, size, who: peak(size, who))
        sheet = rows.Sheet(None, {}, plan)
        rows.Run(decoder.TINY, CPU, torch.float32, sheet).all(plan, time.monotonic() + 60)
        return sheet.document, fractions

    return run


def test_the_headlines(driven):
    """One try for each head, under the cap."""
    plan = rows.planned(("lora",), step.PROVIDERS, step.CAPS)[:2]
    document, fractions = driven(plan, lambda size, who: None if who == "eager" else 10**6 * size.T)
    assert document["not_reached"] == []
    assert fractions == [24 / 85, 1.0] * 2
    ours, eager = document["step"]
    assert (ours["provider"], ours["T"], ours["peak_bytes"]) == ("grpo_fast", 8192, 8_192_000_000)
    assert (eager["provider"], eager["peak_bytes"]) == ("eager", None)
    text = "".join(tables.step_tables([ours, eager], []))
    assert "| lora | 24 GB | eager | 1 x (256 + 8192) | does not fit |" in text


def test_inputs_that_do_not_fit_are_no_failure(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "batch", full)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    trained = step.build(decoder.TINY, "lora", CPU, torch.float32)
    assert step.peak_at(trained, step.Size(1, 4, 8), "grpo_fast") is None


def test_the_runner_says_when_to_end(monkeypatch):
    """Seconds would count from when the imports are done."""
    asked = []
    piece = runner.Piece("7B step", (), 1, runner.STEP)
    arguments = piece.command(90, resume=False)[3:]
    time.sleep(1.5)
    monkeypatch.setattr(
        rows, "run", lambda *a: asked.append(a[1]) or {"machine_info": {"absent": {}}}
    )
    assert rows.main(arguments) == 0
    assert 85 < asked[0] < 89.5


def test_a_wrong_head_gets_no_number(monkeypatch):
    good = providers.load("linear_grpo", "eager")
    table = providers.PROVIDERS["linear_grpo"]
    monkeypatch.setitem(table, "trl", lambda: lambda *a, **k: 1.01 * good(*a, **k))
    monkeypatch.setitem(
        providers.PROVIDERS["linear_logprob"],
        "trl",
        lambda: providers.load("linear_logprob", "eager"),
    )
    document = on_a_cpu(("eager", "trl"), ("lora",))
    assert [row["provider"] for row in document["step"]] == ["eager"]
    why = document["machine_info"]["absent"]["7B step, lora, trl"]
    assert why.startswith("wrong result: gradient_norm")


def test_a_head_that_raises_costs_its_rows(monkeypatch):
    def raising(*args, **kwargs):
        raise RuntimeError("misaligned address\n")

    for stem in ("linear_logprob", "linear_grpo"):
        monkeypatch.setitem(providers.PROVIDERS[stem], "trl", lambda: raising)
    plan = rows.planned(("lora",), ("eager", "trl", "grpo_fast"), (), "cpu")
    plan.append(plan[1]._replace(kind="longest", cap=24e9))
    document = rows.run(plan, 300)
    assert [row["provider"] for row in document["step"]] == ["eager", "grpo_fast"]
    assert document["not_reached"] == [], "nothing else of this head is tried"
    absent = document["machine_info"]["absent"]
    assert absent == {"7B step, lora, trl": "failed: RuntimeError: misaligned address"}
    assert rows.own_failures(document) == []
    absent["7B step, full, grpo_fast-bf16"] = "wrong result: loss 1, eager has 2"
    absent["7B step, full, grpo_fast"] = "out of memory at Size(B=4, P=256, T=1024)"
    assert rows.own_failures(document) == ["7B step, full, grpo_fast-bf16"]


def test_adapters_are_on_again_when_the_reference_does_not_fit():
    trained = step.build(decoder.TINY, "lora", CPU, torch.float32)
    inputs = step.batch(step.Size(2, 3, 5), decoder.TINY.V, CPU)
    old = providers.load("linear_logprob", "eager")
    adapted = [m for m in trained.model.modules() if isinstance(m, decoder.Linear)]

    def fails_without(*args):
        if not any(m.adapted for m in adapted):
            raise torch.OutOfMemoryError
        return old(*args)

    with pytest.raises(torch.OutOfMemoryError):
        step.update(trained, inputs, fails_without, None)
    assert all(m.adapted for m in adapted)


@pytest.mark.parametrize("slope, base", [(1, 0), (3, 100), (0.013, 900)])
def test_the_search_finds_the_longest(slope, base):
    tried = []

    def peak(length):
        tried.append(length)
        used = int(base + slope * length)
        return used if used <= LIMIT else None

    fits, fails = longest.longest(peak, LIMIT, 16, time.monotonic() + 60, 16)
    assert len(tried) <= 12
    assert peak(fits) is not None
    assert peak(fails) is None
    assert fails - fits <= max(16, fits // longest.RESOLUTION)


def test_the_search_allows_for_memory_in_pieces():
    """What fits is less than what is in use at the limit: the prediction is a little too long."""
    tried = []

    def peak(length):
        tried.append(length)
        return 200 + length if length <= 20_000 else None

    fits, fails = longest.longest(peak, 22_000, 512, time.monotonic() + 60, 256)
    assert fits <= 20_000 < fails
    assert fails - fits <= max(256, fits // longest.RESOLUTION)
    assert len(tried) <= 8
    assert sum(tried) < 7 * 20_000  # most tries were near the answer, none far beyond


def test_the_search_begins_nothing_that_it_cannot_end():
    tried = []

    def slow(length):
        tried.append(length)
        time.sleep(length / 1000)
        return length

    start = time.monotonic()
    fits, fails = longest.longest(slow, 1e9, 50, start + 0.5, 50)
    assert (fits, fails) == (100, None)
    assert tried == [50, 100]  # the next would be a million
    assert time.monotonic() - start < 0.5


def test_the_search_knows_when_nothing_fits_and_when_time_is_up():
    assert longest.longest(lambda _: None, 1, 16, time.monotonic() + 60, 16) == (0, 16)
    assert longest.longest(lambda _: 1, 2, 16, time.monotonic() - 1, 16) == (0, None)

    def slow(length):
        time.sleep(0.05)
        return length

    fits, fails = longest.longest(slow, 1e9, 16, time.monotonic() + 0.12, 16)
    assert fits >= 16
    assert fails is None


def test_a_search_that_raises_costs_its_row(driven):
    """The calls of the search, in order, for every cap and head."""

    def peak(size, provider):
        if provider == "trl":
            raise RuntimeError("invalid configuration")
        return 10**9 + 10**7 * size.T if size.T < 4000 else None

    plan = [
        x for x in rows.planned(("lora",), ("eager", "trl"), (24e9, 80e9)) if x.kind == "longest"
    ]
    document, fractions = driven(plan, peak)
    assert document["not_reached"] == []
    found = [(row["provider"], row["cap_bytes"]) for row in document["step"]]
    assert found == [("eager", 24e9), ("eager", 80e9)]
    assert all(row["fits"] < 4000 <= row["fails"] for row in document["step"])
    why = "failed: RuntimeError: invalid configuration"
    who = [f"7B step, lora, {cap} GB, trl" for cap in (24, 80)]
    assert document["machine_info"]["absent"] == dict.fromkeys(who, why)
    assert fractions == [24 / 85, 1.0] * 2 + [80 / 85, 1.0] * 2
    assert all(type(x) is float for x in fractions), "PyTorch takes nothing else"
