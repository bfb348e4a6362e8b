"""Plans of shared prompts: layouts by hand and by brute force, and what `plan` refuses."""

import dataclasses

import pytest
import torch
from torch import tensor

pytest.importorskip("transformers", reason="the models are Hugging Face's")
from grpo_fast.shared_prompt import plan

T, F = True, False


def same(got, want):
    """Equal values, shapes and dtypes."""
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class TestByHand:
    """Two prompts, [5 6] and [7]; the first has the completions 1 and 3 of four, which are not adjacent."""

    @pytest.fixture
    def shared(self):
        return plan(
            tensor([[5, 6], [0, 7], [5, 6], [9, 7]]),
            tensor([[11, 12, 13], [14, 0, 0], [15, 16, 0], [0, 0, 0]]),
            prompt_mask=tensor([[1, 1], [0, 1], [1, 1], [0, 1]]),
            completion_mask=tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]),
        )

    def test_plan(self, shared):
        want = {
            "prompt_ids": tensor([[5, 6], [0, 7]]),
            "prompt_mask": tensor([[T, T], [F, T]]),
            "prompt_positions": tensor([[0, 1], [0, 0]]),
            "completion_ids": tensor([[11, 12, 13], [14, 0, 0], [15, 16, 0], [0, 0, 0]]),
            "completion_mask": tensor([[T, T, T], [T, F, F], [T, T, F], [F, F, F]]),
            "completion_positions": tensor([[2, 3, 4], [1, 0, 0], [2, 3, 0], [0, 0, 0]]),
            "prompt_of": tensor([0, 1, 0, 1]),
            "prompt_lengths": tensor([2, 1]),
            "completion_lengths": tensor([3, 1, 2, 0]),
            "targets": tensor([11, 12, 13, 14, 15, 16]),
            "cu_seqlens": tensor([0, 3, 4, 6, 6], dtype=torch.int32),
            "where": tensor([0, 1, 2, 3, 6, 7]),
        }
        for name, x in want.items():
            same(getattr(shared, name), x)
        rest = {
            "given": (4, 3),
            "tokens_given": 20,
            "largest_id": 16,
            "last_positions": (0, 4),
        }
        for name, x in rest.items():
            assert getattr(shared, name) == x, name
        assert {x.name for x in dataclasses.fields(shared)} == want.keys() | rest.keys()
        assert shared.longest == (2, 3)

    def test_rows(self, shared):
        rows = shared.rows
        # The last tokens of completions are left out: 13, 14 and 16.
        want = {
            "ids": tensor([[5, 6, 11, 12, 15], [7, 0, 0, 0, 0]]),
            "positions": tensor([[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]),
            "first": tensor([[0, 0, 1, 1, 2], [0, -1, -1, -1, -1]]),
            "last": tensor([[2, 2, 1, 1, 2], [2, -1, -1, -1, -1]]),
            "predictors": tensor([1, 2, 3, 5, 1, 4]),
        }
        for name, x in want.items():
            same(getattr(rows, name), x)
        same(rows.depth[0], tensor([0, 1, 2, 3, 2]))
        assert rows.depth[1, 0] == 0
        assert rows._fields == ("ids", "positions", "depth", "first", "last", "predictors")
        assert shared.rows is rows

    def test_values_in_and_out_of_the_batch(self, shared):
        values = torch.arange(1.0, 7.0)
        same(shared.padded(values), tensor([[1.0, 2, 3], [4, 0, 0], [5, 6, 0], [0, 0, 0]]))
        same(shared.packed(shared.padded(values)), values)
        wide = torch.randn(6, 2, 5)
        assert shared.padded(wide).shape == (4, 3, 2, 5)
        same(shared.packed(shared.padded(wide)), wide)

    def test_a_prompt_and_its_completions(self, shared):
        part, which = shared.prompt(1)
        same(which, tensor([1, 3]))
        want = {
            "prompt_ids": tensor([[7]]),
            "prompt_mask": tensor([[T]]),
            "prompt_positions": tensor([[0]]),
            "completion_ids": tensor([[14], [0]]),
            "completion_mask": tensor([[T], [F]]),
            "completion_positions": tensor([[1], [0]]),
            "prompt_of": tensor([0, 0]),
            "prompt_lengths": tensor([1]),
            "completion_lengths": tensor([1, 0]),
            "targets": tensor([14]),
            "cu_seqlens": tensor([0, 1, 1], dtype=torch.int32),
            "where": tensor([3]),
        }
        for name, x in want.items():
            same(getattr(part, name), x)
        assert part.given == (4, 3)
        assert part.tokens_given == 10

    def test_some_completions(self, shared):
        part = shared.completions(tensor([2, 1]))
        same(part.completion_ids, tensor([[15, 16], [14, 0]]))
        same(part.prompt_of, tensor([0, 1]))
        same(part.targets, tensor([15, 16, 14]))
        same(part.where, tensor([6, 7, 3]))
        same(part.cu_seqlens, tensor([0, 2, 3], dtype=torch.int32))
        same(part.prompt_ids, shared.prompt_ids)


def ragged(seed):
    """A random batch: prompts that repeat, and padding of random size on random sides."""
    draw = torch.Generator().manual_seed(seed)

    def below(n, *shape):
        return torch.randint(n, shape, generator=draw)

    B, P, width = (int(below(6, 1)) + 1 for _ in range(3))
    known = [(below(4, int(below(P, 1)) + 1) + 1).tolist() for _ in range(3)]
    prompts = [known[int(below(3, 1))] for _ in range(B)]
    completions = [(below(50, int(below(width + 1, 1))) + 1).tolist() for _ in range(B)]
    given = {}
    for name, rows, size in (("prompt", prompts, P + 2), ("completion", completions, width)):
        ids = below(50, B, size) - 100
        mask = torch.zeros(B, size, dtype=torch.long)
        for b, row in enumerate(rows):
            start = int(below(size - len(row) + 1, 1))
            ids[b, start : start + len(row)] = tensor(row, dtype=torch.long)
            mask[b, start : start + len(row)] = 1
        given |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return given, prompts, completions


@pytest.mark.parametrize("seed", range(40))
class TestRandomBatches:
    def test_rows_hold_every_sequence(self, seed):
        """A token sees what comes before it in its own sequence, and nothing else."""
        given, prompts, completions = ragged(seed)
        shared = plan(**given)
        rows = shared.rows
        S = rows.ids.shape[1]
        expected = []  # per row: (id, depth, the sequence of ids up to it)
        distinct = [list(x) for x in dict.fromkeys(map(tuple, prompts))]
        predictors = {}
        for k, prompt in enumerate(distinct):
            tokens = [(prompt[: i + 1], None) for i in range(len(prompt))]
            for b, own in enumerate(prompts):
                if own == prompt:
                    predictors[b] = [k * S + len(prompt) - 1]
                    for i in range(len(completions[b]) - 1):
                        predictors[b].append(k * S + len(tokens))
                        tokens.append((prompt + completions[b][: i + 1], b))
                    predictors[b] = predictors[b][: len(completions[b])]
            expected.append(tokens)
        assert max(map(len, expected)) == S
        for k, tokens in enumerate(expected):
            for i in range(S):
                if i >= len(tokens):
                    assert (rows.first[k, i], rows.last[k, i], rows.ids[k, i]) == (-1, -1, 0)
                    continue
                history, b = tokens[i]
                assert rows.ids[k, i] == history[-1]
                assert rows.depth[k, i] == rows.positions[k, i] == len(history) - 1
                own = rows.first[k, i]
                for j in range(S):
                    seen = j <= i and bool(rows.first[k, j] <= own <= rows.last[k, j])
                    related = j < len(tokens) and j <= i and tokens[j][1] in (None, b)
                    assert seen == related, (k, i, j)
        flat = [x for b in range(len(prompts)) for x in predictors[b]]
        same(rows.predictors, tensor(flat, dtype=torch.long))

    def test_targets_and_places(self, seed):
        given, prompts, completions = ragged(seed)
        shared = plan(**given)
        flat = [x for row in completions for x in row]
        same(shared.targets, tensor(flat, dtype=torch.long))
        ids = given["completion_ids"].flatten()
        same(ids[shared.where], shared.targets)
        same(shared.padded(shared.targets), given["completion_ids"] * given["completion_mask"])
        same(shared.packed(given["completion_ids"]), shared.targets)
        ends = [sum(map(len, completions[:b])) for b in range(len(completions) + 1)]
        same(shared.cu_seqlens, tensor(ends, dtype=torch.int32))
        assert shared.largest_id == max(x for row in prompts + completions for x in row)

    @pytest.mark.parametrize("per_row", [1, 2, 3])
    def test_split(self, seed, per_row):
        """Each row has its own prompt, few completions, and about as many tokens as the others of it."""
        given, prompts, completions = ragged(seed)
        shared = plan(**given)
        split, which = shared.split(per_row)
        assert shared.split(per_row)[0] is split
        assert shared.split_size(per_row) == tuple(split.tails.ids.shape)
        same(which[split.prompt_of], shared.prompt_of)
        same(split.prompt_ids, shared.prompt_ids[which])
        same(split.prompt_mask, shared.prompt_mask[which])
        same(split.prompt_lengths, shared.prompt_lengths[which])
        fed = [max(0, len(x) - 1) for x in completions]
        for k in range(len(shared.prompt_lengths)):
            alive = sum(fed[b] > 0 for b in range(len(prompts)) if shared.prompt_of[b] == k)
            rows = [r for r in range(len(which)) if which[r] == k]
            assert len(rows) == max(1, -(-alive // per_row))
            sums = []
            for r in rows:
                own = [fed[b] for b in range(len(prompts)) if split.prompt_of[b] == r]
                assert sum(x > 0 for x in own) <= per_row
                sums.append(sum(own))
            assert max(sums) - min(sums) <= max(fed)

    def test_the_longest_row(self, seed):
        shared = plan(**ragged(seed)[0])
        assert shared.row_length == shared.rows.ids.shape[1]

    def test_parts(self, seed):
        """The plan of a part is that of the same completions alone, but for where they were."""
        given, prompts, completions = ragged(seed)
        shared = plan(**given)
        count = 0
        for k in range(len(shared.prompt_lengths)):
            part, which = shared.prompt(k)
            count += len(which)
            chosen = {name: x[which] for name, x in given.items()}
            alone = plan(**chosen)
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_positions"):
                same(getattr(part, name), getattr(alone, name))
            for name in ("targets", "cu_seqlens", "prompt_of", "completion_lengths"):
                same(getattr(part, name), getattr(alone, name))
            for name, x in alone.rows._asdict().items():
                if name != "depth":
                    same(getattr(part.rows, name), x)
            same(shared.targets, shared.packed(given["completion_ids"]))
            same(part.packed(given["completion_ids"]), part.targets)
            for local in torch.arange(len(which)).split(2):
                smaller = part.completions(local)
                same(smaller.packed(given["completion_ids"]), smaller.targets)
                assert smaller.completion_mask.sum() == len(smaller.targets)
                assert [prompts[b] for b in which[local]] == [
                    smaller.prompt_ids[0].tolist() for _ in local
                ]
                assert smaller.completion_lengths.tolist() == [
                    len(completions[b]) for b in which[local]
                ]
        assert count == len(prompts)


class TestWhatIsShared:
    def test_a_row_for_each_prompt(self):
        """`group_size`, `prompt_of` and equal prompts say the same."""
        prompts, completions = tensor([[5, 6], [7, 8]]), torch.arange(8).view(4, 2) + 10
        for shared in (
            plan(prompts, completions, group_size=2),
            plan(prompts, completions, prompt_of=tensor([0, 0, 1, 1])),
            plan(prompts, completions, prompt_of=[0, 0, 1, 1]),
            plan(prompts.repeat_interleave(2, 0), completions),
            plan(prompts.repeat_interleave(2, 0), completions, group_size=2),
        ):
            same(shared.prompt_ids, prompts)
            same(shared.prompt_of, tensor([0, 0, 1, 1]))
            assert shared.tokens_given == 16

    def test_groups_of_different_sizes(self):
        """Prompts are numbered by their first completion, and those without one are left out."""
        shared = plan(
            tensor([[5], [6], [7], [8]]), tensor([[1], [2], [3]]), prompt_of=tensor([3, 0, 3])
        )
        same(shared.prompt_ids, tensor([[8], [5]]))
        same(shared.prompt_of, tensor([0, 1, 0]))

    def test_rows_with_the_same_tokens_are_one_prompt(self):
        shared = plan(tensor([[5, 6], [5, 6]]), torch.ones(4, 1).long(), group_size=2)
        same(shared.prompt_of, tensor([0, 0, 0, 0]))

    def test_padding_is_not_a_token(self):
        """A prompt that starts with token 0 is another than one that is padded with 0."""
        shared = plan(
            tensor([[0, 5], [0, 5], [5, 0]]),
            torch.ones(3, 1).long(),
            prompt_mask=tensor([[1, 1], [0, 1], [1, 0]]),
        )
        same(shared.prompt_of, tensor([0, 1, 1]))

    def test_other_positions_are_another_prompt(self):
        shared = plan(
            tensor([[5, 6]] * 3),
            tensor([[1, 2]] * 3),
            prompt_positions=tensor([[0, 1], [4, 5], [0, 1]]),
        )
        same(shared.prompt_of, tensor([0, 1, 0]))
        same(shared.prompt_positions, tensor([[0, 1], [4, 5]]))
        same(shared.completion_positions, tensor([[2, 3], [6, 7], [2, 3]]))
        same(shared.rows.positions, tensor([[0, 1, 2, 2], [4, 5, 6, 0]]))
        same(shared.rows.depth[0], tensor([0, 1, 2, 2]))
        assert shared.last_positions == (1, 7)

    def test_positions_of_padding_do_not_matter(self):
        shared = plan(
            tensor([[9, 5], [5, 9]]),
            tensor([[1], [1]]),
            prompt_mask=tensor([[0, 1], [1, 0]]),
            prompt_positions=tensor([[77, 3], [3, -1]]),
        )
        same(shared.prompt_of, tensor([0, 0]))
        same(shared.prompt_positions, tensor([[3]]))


class TestUnusualInputs:
    def test_nothing(self):
        for options in ({}, {"group_size": 2}, {"prompt_of": torch.zeros(0).long()}):
            shared = plan(torch.zeros(0, 3).long(), torch.zeros(0, 2).long(), **options)
            assert shared.longest == (0, 0)
            assert shared.rows.ids.shape == (0, 0)
            assert shared.rows.predictors.shape == shared.targets.shape == (0,)
            same(shared.cu_seqlens, tensor([0], dtype=torch.int32))
            assert shared.padded(torch.ones(0, 4)).shape == (0, 2, 4)
            assert shared.last_positions == (0, 0)

    @pytest.mark.parametrize("width", [0, 2])
    def test_no_completion_has_a_token(self, width):
        empty = torch.zeros(2, width)
        shared = plan(tensor([[5, 6], [7, 8]]), empty.long(), completion_mask=empty)
        assert shared.longest == (2, 0)
        same(shared.rows.ids, tensor([[5, 6], [7, 8]]))
        assert shared.rows.predictors.shape == (0,)
        same(shared.padded(torch.ones(0)), empty)
        part, which = shared.prompt(1)
        same(which, tensor([1]))
        assert part.targets.shape == (0,)

    def test_integers_of_32_bits(self):
        ids, mask = tensor([[5, 6], [5, 6]]), tensor([[1, 1], [0, 1]])
        wide = plan(ids, ids, prompt_mask=mask, completion_mask=mask)
        for kind in (torch.int32, torch.bool, torch.float32):
            tokens = torch.int32 if kind == torch.float32 else torch.int64
            narrow = plan(
                ids.to(tokens), ids.int(), prompt_mask=mask.to(kind), completion_mask=mask.to(kind)
            )
            same(narrow.targets, wide.targets)
            same(narrow.prompt_ids, wide.prompt_ids)
        same(plan(ids, ids, prompt_of=tensor([0, 1]).int()).prompt_of, tensor([0, 0]))

    def test_expanded_and_transposed_inputs(self):
        prompts, completions = tensor([5, 6]).expand(3, 2), tensor([[1, 2, 3], [4, 5, 6]]).T
        mask = torch.ones(1, 2).expand(3, 2)
        shared = plan(prompts, completions, prompt_mask=mask, completion_mask=mask)
        same(shared.prompt_ids, tensor([[5, 6]]))
        same(shared.targets, tensor([1, 4, 2, 5, 3, 6]))
        same(shared.padded(tensor([1, 4, 2, 5, 3, 6])), completions)

    def test_inputs_are_not_changed(self):
        given, _, _ = ragged(3)
        before = {name: x.clone() for name, x in given.items()}
        assert plan(**given).rows is not None
        for name, x in before.items():
            same(given[name], x)


IDS, MASK = tensor([[5, 6], [7, 8]]), tensor([[1, 1], [0, 1]])
REFUSED = {
    "not a tensor": (TypeError, {"prompt_ids": [[5]]}, "prompt_ids: want a tensor, got list"),
    "prompt shape": (
        ValueError,
        {"prompt_ids": IDS[0]},
        r"prompt_ids: want two dimensions, got \(2,\)",
    ),
    "completion shape": (
        ValueError,
        {"completion_ids": IDS[None]},
        r"completion_ids: want two dimensions, got \(1, 2, 2\)",
    ),
    "float ids": (
        TypeError,
        {"completion_ids": IDS.double()},
        "completion_ids: want int32 or int64, got torch.float64",
    ),
    "bool ids": (TypeError, {"prompt_ids": MASK.bool()}, "prompt_ids: .* got torch.bool"),
    "mask shape": (
        ValueError,
        {"prompt_mask": MASK[:, :1]},
        r"prompt_mask: want \(2, 2\), one per token, got \(2, 1\)",
    ),
    "mask type": (
        TypeError,
        {"completion_mask": [[1]]},
        "completion_mask: want a tensor, got list",
    ),
    "mask value": (ValueError, {"completion_mask": MASK * 2}, "completion_mask: want 0 and 1"),
    "mask nan": (ValueError, {"prompt_mask": MASK / 0.0}, "prompt_mask: want 0 and 1"),
    "mask hole": (
        ValueError,
        {
            "completion_ids": torch.ones(2, 3).long(),
            "completion_mask": tensor([[0, 1, 1], [1, 0, 1]]),
        },
        "completion_mask: row 1 has a 0 between two tokens",
    ),
    "empty prompt": (
        ValueError,
        {"prompt_mask": tensor([[1, 1], [0, 0]])},
        "prompt_mask: row 1 has no token",
    ),
    "no columns": (
        ValueError,
        {"prompt_ids": torch.zeros(2, 0).long()},
        "prompt_mask: row 0 has no token",
    ),
    "negative prompt": (
        ValueError,
        {"prompt_ids": tensor([[5, 6], [-7, 8]])},
        "prompt_ids: row 1 has a negative value, -7: if it is padding, let the mask be 0 there",
    ),
    "label": (
        ValueError,
        {"completion_ids": tensor([[5, -100], [7, 8]])},
        "completion_ids: row 0 has a negative value, -100",
    ),
    "position shape": (
        ValueError,
        {"prompt_positions": IDS[:, :1]},
        r"prompt_positions: want \(2, 2\), as prompt_ids, got \(2, 1\)",
    ),
    "position type": (
        TypeError,
        {"prompt_positions": IDS.float()},
        "prompt_positions: want int32 or int64, got torch.float32",
    ),
    "negative position": (
        ValueError,
        {"prompt_positions": tensor([[0, 1], [-1, 0]])},
        "prompt_positions: row 1 has a negative value, -1",
    ),
    "size zero": (ValueError, {"group_size": 0}, "group_size: want a positive integer, got 0"),
    "size bool": (
        ValueError,
        {"group_size": True},
        "group_size: want a positive integer, got True",
    ),
    "size float": (ValueError, {"group_size": 2.0}, "group_size: want a positive integer, got 2.0"),
    "size does not divide": (
        ValueError,
        {"group_size": 3},
        "group_size=3 does not divide 2 completions",
    ),
    "another prompt": (
        ValueError,
        {"group_size": 2},
        "group_size=2, but prompt 1 is another than the first of its group",
    ),
    "another by padding": (
        ValueError,
        {"group_size": 2, "prompt_ids": tensor([[0, 5], [0, 5]]), "prompt_mask": MASK},
        "group_size=2, but prompt 1 is another",
    ),
    "rows": (
        ValueError,
        {"prompt_ids": IDS[:1]},
        "prompt_ids has 1 rows and completion_ids 2: want one prompt per completion",
    ),
    "rows of groups": (
        ValueError,
        {"prompt_ids": IDS[:1], "group_size": 1},
        "prompt_ids has 1 rows and completion_ids 2",
    ),
    "both": (
        ValueError,
        {"group_size": 1, "prompt_of": tensor([0, 1])},
        "group_size=1 and prompt_of: want one of them",
    ),
    "prompt_of shape": (
        ValueError,
        {"prompt_of": tensor([0])},
        r"prompt_of: want \(2,\) integers, one per completion, got \(1,\) torch.int64",
    ),
    "prompt_of dtype": (
        ValueError,
        {"prompt_of": tensor([0.0, 1.0])},
        "prompt_of: .* torch.float32",
    ),
    "prompt_of bool": (ValueError, {"prompt_of": tensor([T, F])}, "prompt_of: .* torch.bool"),
    "prompt_of range": (
        ValueError,
        {"prompt_of": tensor([0, 2])},
        "prompt_of: want rows of prompt_ids, 0 to 1, got 0 to 2",
    ),
    "prompt_of negative": (ValueError, {"prompt_of": tensor([-1, 0])}, "prompt_of: .* got -1 to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """The message names the argument, and the row or the value."""
    error, given, message = REFUSED[case]
    with pytest.raises(error, match=r"^shared_prompt\.plan: " + message):
        plan(**{"prompt_ids": IDS, "completion_ids": IDS} | given)


def test_values_of_another_batch():
    shared = plan(IDS, IDS)
    with pytest.raises(ValueError, match=r"Plan.packed: values: want \(2, 2\) first.*got \(2, 3\)"):
        shared.packed(torch.ones(2, 3))
