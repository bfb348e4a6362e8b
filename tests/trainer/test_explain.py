"""`grpo-fast explain`: the step is the run's own next one, and its numbers are those of the specification."""

import dataclasses
import io
import json
import re

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast import Objective, reference
from grpo_fast.presets import PAPERS
from grpo_fast.trainer import cli, train
from grpo_fast.trainer.explain import capture, command, numbers, page, record, text
from grpo_fast.trainer.explain.stages import stages
from tests.support.tiny_runs import EVEN, given_model, metrics, tiny

# A run whose steps can be compared with a step of one prompt; its checkpoints are those of steps 2 and 3.
OPTIONS = {
    **EVEN, "steps": 3, "save_steps": 2, "keep_checkpoints": 9, "completions_steps": 1,
    "prompts_per_step": 1, "num_iterations": 2, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "name": "run", "objective": "grpo", "temperature": 0.9,
}  # fmt: skip


def files(folder):
    """What is in a folder, with the times of the last change."""
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a KL, which keeps the model before GRPO."""
    folder = tmp_path_factory.mktemp("explain")
    train.train(tiny(folder, **OPTIONS))
    return folder / "run"


@pytest.fixture(scope="module")
def step(run):
    before = files(run)
    found = capture.capture(run / "checkpoints" / "step-000002", device="cpu")
    assert files(run) == before  # nothing was written
    return found


@pytest.fixture(scope="module")
def shipped():
    return record.load(record.SHIPPED)


def test_the_step_is_the_next_one_of_the_run(run, step):
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    own = [r for r in rows if r["step"] == 2]
    assert step.prompt[0].content == own[0]["prompt"]
    assert [c.text for c in step.completions] == [r["completion"] for r in own]
    assert [c.reward for c in step.completions] == [r["reward"] for r in own]
    used = numbers.compute(step, numbers.settings_of(step))
    assert used.advantages == pytest.approx([r["advantage"] for r in own], abs=1e-6)
    # The second update sees what the optimizer made of the first one, with the state of the checkpoint.
    row = metrics(run)[2]
    for name in ("loss", "grad_norm"):
        mean = sum(getattr(x, name) for x in step.updates[:2]) / 2
        assert mean == pytest.approx(row[name], rel=1e-5)


def test_the_trainer_computes_the_same_loss(step, shipped):
    for one in (step, shipped):
        for k, update in enumerate(one.updates, 1):
            found = numbers.compute(one, numbers.settings_of(one, k))
            assert found.loss == pytest.approx(update.loss, abs=2e-6)
            assert update.grad_norm > 0


def test_updates_move_the_policy(step):
    first = numbers.compute(step, numbers.settings_of(step))
    assert {x for row in first.ratios for x in row} == {1.0}
    assert len(step.updates) == capture.UPDATES
    for before, after in zip(step.logps, step.logps[1:], strict=False):
        assert before != after
    assert first.loss_after < first.loss
    assert step.ref_logps != step.logps[0]  # of the model before GRPO, which the run has left
    assert first.kl_mean > 0


def test_a_source_has_names_and_no_paths(run, step):
    assert (step.source.run, step.source.checkpoint, step.source.step) == ("run", "step-000002", 2)
    assert step.source.restored
    assert step.source.reference == capture.BEFORE
    assert step.source.reward_weights == {"even_digits": 1.0}
    assert str(run.parent) not in json.dumps(dataclasses.asdict(step))


def test_without_a_kl_a_new_model_is_its_own_reference(run, monkeypatch):
    """The run has kept none, and the first KL is 0."""
    monkeypatch.setattr(capture, "base_of", lambda *_: None)
    found = capture.capture(run, updates=2, device="cpu")
    assert found.source.checkpoint == "step-000003"  # the newest
    assert found.source.reference == capture.AT_START
    assert numbers.compute(found, numbers.settings_of(found)).kl_mean == 0


def test_an_adapter(tmp_path):
    pytest.importorskip("peft", reason="the test trains an adapter")
    options = {**EVEN, "steps": 1, "name": "run", "objective": "dapo", "use_peft": True}
    model = given_model(tmp_path)
    train.train(tiny(tmp_path, **options, model=str(model), learning_rate=1e-2))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "training_state.json").unlink()
    found = capture.capture(tmp_path / "run", updates=1, device="cpu")
    assert not found.source.restored
    assert found.source.model == "given"
    assert found.ref_logps != found.logps[0]  # of the base model
    assert found.logps[1] != found.logps[0]


def in_float64(one, settings):
    """The same numbers by the specification: advantages, coefficients and the loss."""
    G = len(settings.rewards)
    rewards = torch.tensor(settings.rewards, dtype=torch.float64)
    centred = rewards - rewards.mean()
    scaled = centred if one.scale_rewards == "none" else centred / (rewards.std() + 1e-4)

    def wide(rows):
        return numbers.padded(rows[:G])[0].double()

    logps, mask = wide(one.logps[settings.update - 1]), numbers.padded(one.logps[0][:G])[1]
    logps.requires_grad_()
    loss = reference.policy_loss(
        logps,
        advantages=scaled,
        mask=mask,
        old_logps=wide(one.logps[0]),
        ref_logps=wide(one.ref_logps),
        objective=numbers.objective_of(one, settings),
    )
    (coefficients,) = torch.autograd.grad(loss, logps)
    return scaled, coefficients[mask], loss.item()


CHANGES = {
    "as recorded": ("token_mean", {}),
    "third update": ("sequence_mean", {"update": 3}),
    "narrow": ("token_mean", {"update": 3, "epsilon_low": 0.02, "epsilon_high": 0.05}),
    "kl": ("sequence_sum", {"update": 2, "beta": 0.3}),
    "kl, few": ("sequence_mean", {"update": 3, "beta": 0.1, "rewards": [0.2, 1.0, -1.5]}),
    "without a scale": ("fixed_length", {"update": 2, "rewards": [0.2, 1.0, -1.5]}),
    "equal": ("token_mean", {"update": 2, "rewards": [0.7] * 8}),
    "kl, equal": ("fixed_length", {"update": 2, "rewards": [0.7] * 8, "beta": 0.1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_are_those_of_the_specification(shipped, change):
    reduction, changes = CHANGES[change]
    length = 16 if reduction == "fixed_length" else None
    options = {**shipped.objective, "reduction": reduction, "max_length": length}
    scale = "none" if length else "group"
    one = dataclasses.replace(shipped, objective=options, scale_rewards=scale)
    settings = numbers.settings_of(one)._replace(**changes)
    found = numbers.compute(one, settings)
    advantages, coefficients, loss = in_float64(one, settings)
    close = {"abs": 1e-6, "rel": 1e-6}
    assert found.advantages == pytest.approx(advantages.tolist(), **close)
    assert [x for row in found.coefficients for x in row] == pytest.approx(
        coefficients.tolist(), **close
    )
    assert found.loss == pytest.approx(loss, **close)
    stopped = [bool(x) for row in found.clipped for x in row]
    assert found.clip_fraction == pytest.approx(sum(stopped) / len(stopped))
    if not settings.beta:
        silent = [x == 0 for x in coefficients.tolist()]
        assert silent == [x or change == "equal" for x in stopped]


def test_which_objectives_are_explained():
    for name, options in PAPERS.items():
        length = {"max_length": 8} if options.get("reduction") == "fixed_length" else {}
        objective = Objective.preset(name, **length)
        if name in ("grpo", "dapo", "dr_grpo", "bnpo"):
            numbers.check(objective, name)
        else:
            with pytest.raises(ValueError, match=f"objective='{name}' is not explained: its "):
                numbers.check(objective, name)
    numbers.check(Objective.preset("trl/dapo"), "trl/dapo")  # its KL estimator has no effect
    with pytest.raises(ValueError, match="its kl is 'k3_unbiased'"):
        numbers.check(Objective.preset("trl/dapo", beta=0.1), "trl/dapo")
    with pytest.raises(ValueError, match="dapo_zv"):
        numbers.check(Objective.preset("dapo"), "dapo_zv")


def test_a_record_survives_its_file(step, tmp_path):
    record.save(step, tmp_path / "step.json")
    assert record.load(tmp_path / "step.json") == step


def test_the_shipped_record(shipped):
    content = record.SHIPPED.read_text()
    assert len(content) < 200_000
    assert not re.search(r'"[^"\s]*(/[^"\s/]+){2,}"', content)  # no path
    assert shipped.source.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len({c.reward for c in shipped.completions}) > 3
    assert numbers.compute(shipped, numbers.settings_of(shipped, 2)).clip_fraction > 0.1


BROKEN = {
    "not JSON": (lambda x: x.clear(), "not a record of the format"),
    "another version": (lambda x: x.update(format="grpo-fast explain 0"), "not a record"),
    "a field is missing": (lambda x: x.pop("logps"), "'logps' is missing"),
    "a field is unknown": (lambda x: x["source"].update(colour=1), "source: 'colour' is unknown"),
    "a type": (lambda x: x["completions"][2].update(reward="1"),
               r"completions\[2\]\.reward: want float, got '1'"),
    "null": (lambda x: x["updates"][0].update(loss=None), r"updates\[0\]\.loss: want float, got None"),
    "infinity": (lambda x: x["updates"][0].update(loss=float("inf")), "want float, got inf"),
    "too few log-probs": (lambda x: x["logps"][1][0].pop(), r"logps\[1\]: want one number per token"),
    "too few updates": (lambda x: x["logps"].pop(), "logps: want 4 lists, got 3"),
    "a probability above 1": (lambda x: x["ref_logps"][0].__setitem__(0, 0.5), "is above 0"),
    "an objective": (lambda x: x["objective"].update(surrogate="x"), "surrogate"),
    "an option": (lambda x: x["objective"].pop("delta"), "objective: delta is missing"),
    "one completion": (lambda x: x.update(completions=x["completions"][:1]), "at least two"),
    "a list": (lambda x: x.update(again=[]), "again: want 8 completions for each update"),
    "a reward": (lambda x: x["completions"][3]["rewards"].pop("short"), "completions: their rewards"),
    "a token": (lambda x: x["completions"][1]["tokens"].pop(), r"completions\[1\]\.tokens"),
    "a scale": (lambda x: x.update(scale_rewards="x"), "scale_rewards='x'"),
    "a temperature": (lambda x: x.update(temperature=0), "temperature"),
    "no object": (lambda x: x.update(source=[]), r"source: want an object, got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records(tmp_path, name, capsys):
    change, message = BROKEN[name]
    content = json.loads(record.SHIPPED.read_text())
    change(content)
    path = tmp_path / "step.json"
    path.write_text(json.dumps(content) if content else "{")
    with pytest.raises(ValueError, match=message if content else "step.json: ") as caught:
        record.load(path)
    assert str(path) in str(caught.value)


def test_no_group_with_a_signal(run):
    with pytest.raises(
        ValueError, match=r"none of the next 0 prompts .* take an earlier checkpoint"
    ):
        capture.capture(run, device="cpu", tries=0)


def test_groups_without_a_signal_are_passed_over(run, step, monkeypatch):
    """So are those in which a completion has no reward."""
    own = capture.sampled
    seen = []

    def equal_at_first(policy, task, config, row, seeds):
        rollout, scores = own(policy, task, config, row, seeds)
        seen.append(row["prompt"])
        if len(seen) == 1:
            scores = scores._replace(total=torch.ones_like(scores.total))
        if len(seen) == 2:
            total = scores.total.clone()
            total[0] = float("nan")
            scores = scores._replace(total=total)
        return rollout, scores

    monkeypatch.setattr(capture, "sampled", equal_at_first)
    found = capture.capture(run / "checkpoints" / "step-000002", updates=2, device="cpu")
    assert seen[0] == step.prompt[0].content
    assert len(set(seen)) >= 3
    assert found.prompt[0].content == seen[-1] not in seen[:2]  # it was sampled again at last


def explain(*arguments):
    return cli.main(["explain", *map(str, arguments)])


def test_a_page_and_a_record_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = files(run)
    assert explain(run, "--record", "one.json", "--updates", 2, "--device", "cpu") == 0
    assert capsys.readouterr().out == "explain.html\n"  # what the trainer says goes to stderr
    assert files(run) == before
    assert len(record.load(tmp_path / "one.json").updates) == 2
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", lambda x: opened.append(x) or True)
    assert explain("--run", "one.json", "--output", "two.html", "--open") == 0
    assert (tmp_path / "two.html").read_text() == (tmp_path / "explain.html").read_text()
    assert opened == [(tmp_path / "two.html").as_uri()]
    monkeypatch.setattr(command.webbrowser, "open", lambda x: False)
    assert explain("one.json", "--open") == 1
    assert "no browser was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "--run", "b"], "run: given twice, as 'a' and as 'b'"),
        (["--text", "--open"], "--open has no effect with --text"),
        (["--text", "--output", "x"], "--output has no effect with --text"),
        (["--updates", "2"], "updates=2 has no effect on a recorded step"),
        (["--device", "cpu"], "device='cpu' has no effect"),
        (["RUN", "--updates", "0"], "updates: want at least 2, as many as the run makes, got 0"),
        (["EMPTY"], "not a run with a checkpoint"),
        (["MODEL"], "has no config.yaml"),
        (["GSPO"], "objective='gspo' is not explained"),
    ],
)
def test_arguments_that_cannot_be_used(run, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    for name, options in {"model": None, "gspo": "objective: gspo\n"}.items():
        folder = tmp_path / name / "checkpoints" / "step-000001"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if options:
            (tmp_path / name / "config.yaml").write_text(options)
    model = tmp_path / "model" / "checkpoints" / "step-000001"
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "MODEL": model, "GSPO": tmp_path / "gspo"}
    assert explain(*(places.get(x, x) for x in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named(capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(command, "explain", missing)
    assert explain("--text") == 1
    assert "[train]" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert explain(tmp_path / "none.json") == 1
    assert "none.json: No such file" in capsys.readouterr().err
    assert explain("--output", tmp_path / "no" / "page.html") == 1


def shown(one, width=100):
    out = io.StringIO()
    text.show(one, text.console(out, width))
    return out.getvalue()


def test_the_terminal_has_every_stage_and_number(step, shipped):
    for one in (step, shipped):
        found = shown(one)
        for k, stage in enumerate(stages(one), 1):
            assert f"{k}. {stage.title} " in found
            assert all(line in found for line in stage.formula.splitlines())
        first = numbers.compute(one, numbers.settings_of(one))
        last = numbers.compute(one, numbers.settings_of(one, len(one.updates)))
        expected = [f"{x:+.3f}" for x in first.advantages] + [f"{first.loss:+.6f}"]
        expected += [f"={x:.3f}" for row in last.ratios for x in row]
        expected += [f"={x:.3f}" for row in first.kl for x in row]
        expected += [f"={1000 * x:+.2f}" for row in last.coefficients for x in row]
        assert not [x for x in expected if x not in found]
        assert all(c.text.split()[0] in found for c in one.completions if c.text.split())
        assert max(map(len, found.splitlines())) <= 100


def test_no_text_commands_the_terminal(shipped):
    hostile = "\x1b[2J [bold]x[/bold] \u202eabc\r\n\ud800"
    one = dataclasses.replace(shipped.completions[0], text=hostile)
    found = shown(dataclasses.replace(shipped, completions=[one, *shipped.completions[1:]]))
    assert "[U+001B][2J [bold]x[/bold] [U+202E]abc[U+000D]⏎[U+D800]" in found
    assert not set("\x1b\r\u202e\ud800") & set(found)


def test_printing_it_from_the_command_line(capsys, shipped):
    assert explain("--text") == 0
    found = capsys.readouterr().out
    assert "8. Update" in found
    assert shipped.completions[0].text in found


def test_a_page_refuses_what_it_cannot_compute(shipped):
    gspo = dataclasses.asdict(Objective.preset("gspo"))
    source = dataclasses.replace(shipped.source, preset="gspo")
    one = dataclasses.replace(shipped, objective=gspo, source=source)
    for refuse in (page.page, shown):
        with pytest.raises(ValueError, match="objective='gspo' is not explained: its ratio"):
            refuse(one)
