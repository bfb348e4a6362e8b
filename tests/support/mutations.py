"""The changes that `mutants.py` makes, the tests that cover each file, and changes that no test can see."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "not triton and not processes and not forward_mode_is_refused"  # for `pytest -k`
LAUNCHES = f"({TORCH}) or (triton and every_objective and default)"  # kernels once, too
SHARED = f"({TORCH}) or ((two_processes or without_rows) and not kernels)"  # in processes, too

# The test files for each file, the likeliest first, and which of their tests.
COVERS: dict[str, tuple[str, str]] = {
    "grpo_fast/spelling.py": ("names", TORCH),
    "grpo_fast/objective.py": ("objective names preset_values kl", TORCH),
    "grpo_fast/operands.py": ("numbers errors sequence_loss policy_loss", TORCH),
    "grpo_fast/diagnostics.py": ("diagnostics nan masks shapes", TORCH),
    "grpo_fast/loss/output.py": ("loss policy_loss", TORCH),
    "grpo_fast/overwritten.py": ("inplace", TORCH),
    "grpo_fast/checks.py": (
        "errors linear_errors told_apart masks shapes tensor_kinds",
        TORCH,
    ),
    "grpo_fast/ops/autograd.py": ("derivatives inplace linear_errors", TORCH),
    "grpo_fast/ops/backend.py": (
        "errors public_api grpo logprob strides",
        f"{LAUNCHES} or (triton and (strided_logits or one_output or layouts and policy_loss))",
    ),
    "grpo_fast/ops/head/passes.py": (
        "linear_grpo linear_logprob linear_edges linear_upstream rare_options masks vocab_parallel",
        SHARED,
    ),
    "grpo_fast/ops/head/chunked.py": (
        "linear_logprob linear_grpo linear_mixed linear_edges linear_errors linear_dtypes",
        f"({TORCH}) or (linear_mixed and triton and plain)",  # the kernel that moves rows, too
    ),
    "grpo_fast/ops/head/arguments.py": (
        "linear_errors linear_logprob linear_edges linear_dtypes vocab_parallel",
        SHARED,
    ),
    "grpo_fast/metrics.py": ("policy_loss loss rare_options masks", TORCH),
    "grpo_fast/ops/coefficients.py": ("rare_options sequence_loss policy_loss grpo", TORCH),
    "grpo_fast/torch_kernels/rows.py": (
        "edges logprob errors strides grpo linear_logprob soft_cap",
        f"{TORCH} and not where_the",
    ),
    "grpo_fast/weights/live_tokens.py": (
        "selection policy_loss weights",
        f"({TORCH} and not trl_modes) or over_processes",
    ),
    "grpo_fast/torch_kernels/terms.py": (
        "policy_loss kl nan sequence_loss preset_edges loss grpo",
        TORCH,
    ),
    "grpo_fast/loss/arguments.py": (
        "loss errors rare_options told_apart masks policy_loss reduction_weights",
        TORCH,
    ),
    "grpo_fast/ops/head/vocab_parallel.py": (
        "vocab_parallel",
        "combine or whose or sends or ((two_processes or without_rows) and not kernels)",
    ),
    "grpo_fast/ops/group_advantage.py": (
        "group_advantage rare_options errors advantage_precision shapes",
        TORCH,
    ),
    "grpo_fast/ops/grpo.py": ("grpo inplace rare_options derivatives nan", LAUNCHES),
    "grpo_fast/ops/linear_grpo.py": (
        "linear_grpo linear_edges linear_errors linear_upstream rare_options vocab_parallel",
        SHARED,
    ),
    "grpo_fast/ops/linear_logprob.py": (
        "linear_logprob linear_edges linear_errors linear_dtypes",
        TORCH,
    ),
    "grpo_fast/ops/logprob.py": (
        "logprob linear_logprob",
        "not processes and not any_shape and (not triton or banned or offset)",
    ),
    "grpo_fast/ops/reduction_weights.py": ("reduction_weights masks loss", TORCH),
    "grpo_fast/ops/policy_loss.py": ("policy_loss errors loss rare_options masks", TORCH),
    "grpo_fast/ops/sequence_loss.py": ("sequence_loss policy_loss loss masks nan kl", TORCH),
    "grpo_fast/weights/importance.py": ("weights nan", TORCH),
    "grpo_fast/weights/divergence.py": ("weights nan shapes", TORCH),
    "grpo_fast/weights/selection.py": ("selection weights nan", f"{TORCH} and not trl_modes"),
    "grpo_fast/presets.py": ("preset_values presets preset_edges verl", TORCH),
    "grpo_fast/integrations/trl/options.py": ("trl trl_loss", TORCH),
    "grpo_fast/integrations/trl/metrics.py": ("trl_loss", TORCH),
    "grpo_fast/integrations/verl/losses.py": ("verl verl_options", TORCH),
    "grpo_fast/integrations/shared/options.py": ("shared verl_options", TORCH),
    "grpo_fast/records.py": ("compile linear_grpo grpo loss", TORCH),
    "grpo_fast/sequences.py": ("loss told_apart shapes errors sequence_loss selection", TORCH),
    "grpo_fast/loss/from_logits.py": ("grpo inplace loss errors rare_options", TORCH),
    "grpo_fast/loss/from_hidden.py": (
        "linear_grpo linear_edges linear_errors linear_upstream rare_options",
        SHARED,
    ),
    "grpo_fast/loss/from_log_probs.py": ("policy_loss loss errors", TORCH),
    "grpo_fast/loss/compaction.py": ("linear_grpo linear_edges rare_options", TORCH),
    "grpo_fast/ops/top_entropy.py": (
        "selection policy_loss masks",
        f"({TORCH} and not trl_modes) or over_processes",
    ),
    "grpo_fast/ops/head/float64.py": ("linear_dtypes", TORCH),
    "grpo_fast/ops/head/chunk_length.py": ("linear_logprob linear_grpo linear_edges", TORCH),
    "grpo_fast/ops/head/products.py": (
        "linear_logprob linear_grpo linear_mixed linear_edges linear_dtypes",
        TORCH,
    ),
    "grpo_fast/ops/head/gradients.py": (
        "linear_grpo linear_edges linear_upstream rare_options vocab_parallel",
        SHARED,
    ),
    "grpo_fast/torch_kernels/chunks.py": ("chunks", TORCH),
    "grpo_fast/torch_kernels/group_advantage.py": (
        "group_advantage rare_options errors advantage_precision shapes",
        TORCH,
    ),
    "grpo_fast/torch_kernels/grpo.py": ("grpo inplace rare_options nan", TORCH),
    "grpo_fast/torch_kernels/logprob.py": ("logprob linear_logprob", TORCH),
    "grpo_fast/torch_kernels/policy_loss.py": ("policy_loss metrics loss nan masks", TORCH),
    "grpo_fast/torch_kernels/reduction_weights.py": ("reduction_weights masks loss", TORCH),
    "grpo_fast/torch_kernels/scaling.py": ("grpo linear_upstream", TORCH),
    "grpo_fast/torch_kernels/sequence_loss.py": (
        "sequence_loss policy_loss loss masks nan kl",
        TORCH,
    ),
    "kernels/scoring.py": (
        "extreme_rows logprob grpo nan",
        "triton and (banned or offset or tiny_temp or among_large or large_numbers or masked or "
        "missing_number or reference)",
    ),
    "kernels/edges.py": (
        "edges overlap linear_mixed",
        "(triton and (23 or 8-)) or (where_the and (8- or 9-)) or kernels or overlap or "
        "(test_loss and triton and all)",
    ),
    "kernels/scaling.py": ("scaling traffic", "scale_rows or no_rows"),
    "kernels/chunks.py": ("chunks traffic", "move_rows"),
    "kernels/tiles.py": (
        "tiles policy_loss logprob extreme_rows group_advantage nan rows soft_cap",
        "triton and (log2_1p or soft_cap or (missing_number and (default or sapo)) or every_objective or "
        "flags or infinite or confident or banned or offset or tiny_temp or among_large or uniform or "
        "(large_numbers and 1e and 1000)) or (segments and 40001)",
    ),
    "kernels/reduction_weights.py": (
        "traffic reduction_weights",
        "(traffic and reduction_weights) or boundaries or "
        "(triton and (test_weights or negative_mask or counts_are))",
    ),
    "kernels/policy_loss.py": (
        "traffic policy_loss loss",
        "(traffic and (policy_loss or statistics)) or (triton and (metrics or statistics or "
        "every_objective))",
    ),
    "kernels/rows.py": (
        "logprob grpo rows overlap linear_logprob",
        "triton and (reference or banned or offset or masked or exact_zeros or optional) or "
        "(segments and 40001) or test_overlap",
    ),
    "kernels/grpo.py": (
        "grpo",
        "triton and ((every_objective and (default or everything or gspo or entropy)) or "
        "optional or scored_in or inplace_gives or exactly or strided or reference)",
    ),
    "kernels/on_chip.py": ("on_chip_build on_chip", "check_of_the or (on_chip and not long)"),
}
for _name in [x for x in COVERS if x.startswith("kernels/")]:
    _files, _which = COVERS[_name]
    COVERS[_name] = f"layout {_files}", f"masked_load or {_which}"
# Changes that no test on a CPU can see: in the statement's text, by regular expression.
EQUIVALENT = {
    r"block|warps|eviction|num_ctas|SMALL|WORKSPACE|MANY_ROWS": "speed alone",
    r"set_materialize_grads|CHUNK_COST|^LIFTED": "speed and memory, or head-room",
    r"device=|\.device|cuda|is_compiling": "asks for the device; the tests have one",
    r"MIXED_|out_dtype=": "products of halves on a GPU",
    r"strict=": "never differs in a correct call",
    r"mutates_args|five, six|torch\.library|new_empty|torch\.empty": "schemas and fakes",
    r"getattr\(dist": "the older or the newer name of one function",
    r"^(from|import|op = |assert )": "no behaviour",
}
# And single ones, (file, part of the line, what stands there then): the reason.
SAME = {
    ("kernels/reduction_weights.py", "new(dtype=torch.float32)", "new()"): "PyTorch's default",
    ("kernels/reduction_weights.py", "return tl.where(total == 0, 1.0", "1"): (
        "of no live token: nothing is divided by it"
    ),
    ("kernels/reduction_weights.py", "live = there & (tl.load(mask_ptr", "1"): "of no token",
    ("kernels/reduction_weights.py", "total = tl.sum(", "counts)"): "of one dimension",
    ("kernels/reduction_weights.py", "total = tl.sum(", "weighed)"): "of one dimension",
    ("kernels/chunks.py", "row = tl.load(outgoing.rows", "1"): "of rows that do not leave",
    ("kernels/chunks.py", "x = tl.load(", "1.0"): "of columns that are not stored",
    (
        "kernels/chunks.py",
        "n_out = n_in = stride_n = stride_d",
        "1",
    ): "of hidden states that are absent",
    (
        "kernels/scaling.py",
        "tl.store(ptr, scaled(tl.load(ptr",
        "1.0",
    ): "of entries that are not stored",
    ("kernels/grpo.py", "BACKWARDS: tl.constexpr", ""): "the order of the tiles, for the cache",
    ("kernels/grpo.py", "if over and softcap", ""): "the length of a tile, for the registers",
    (
        "kernels/grpo.py",
        "write_tile._replace(K=min(",
        "",
    ): "the length of a tile, for the registers",
    (
        "kernels/grpo.py",
        "side = 4 if out.entropy is None",
        "",
    ): "another schedule, the same numbers",
    ("kernels/grpo.py", "reading(V", "softcap is None"): "another schedule, the same numbers",
    ("kernels/edges.py", '    if ROWS == "units"', ""): "a hint to the compiler, true of all rows",
    ("kernels/edges.py", 'body = V // UNIT * UNIT if ROWS == "units"', "units"): (
        "a hint to the compiler: UNIT divides V there"
    ),
    ("kernels/edges.py", "z = tl.load(row.ptr + column, mask=there", "mask=there)"): (
        "what stands where nothing is read is replaced, or not stored"
    ),
    ("kernels/edges.py", "z = tl.load(row.ptr + column, mask=there", "(float('inf'))"): (
        "what stands where nothing is read is replaced, or not stored"
    ),
    ("kernels/edges.py", "OVERLAP", ""): "a barrier: the interpreter runs a program as one thread",
    ("kernels/scoring.py", "tl.store(outputs.kl + row, 0.0)", "1.0"): (
        "of a masked token, which statistics leave out"
    ),
    ("kernels/tiles.py", "series = 1.0 + w2", "10"): "below half a unit in the last place",
    ("kernels/tiles.py", "tl.where(x <= 0.25", "0.375"): "the series is as accurate there",
    ("kernels/tiles.py", "FAR = ", "1610612736.0"): (
        "between the thresholds both ways give the same bits: differences are 0, or underflow"
    ),
    ("kernels/tiles.py", "series = 1.0 + w2", "8"): "below half a unit in the last place",
    ("ops/autograd.py", "if not (sources and", "((sources) or"): (
        "without sources, or without gradients, the wrapped result is the constant itself"
    ),
    ("ops/head/passes.py", "UNIT = Objective(", "Objective()"): (
        "on policy the gradient of the clipped surrogate is the same"
    ),
    ("ops/head/passes.py", ".clamp(-100, 100)", "101"): "2^101 is as far inside float32's range",
    ("ops/head/products.py", "if fresh and alpha == 1", ""): "slabs of halves, on a GPU",
    ("ops/head/arguments.py", "widest=max(sizes)", "min(sizes)"): (
        "equal on all processes, too: the chunks are others, the numbers are not"
    ),
    (
        "grpo_fast/metrics.py",
        "count = torch.where(empty, 1, tokens)",
        "2",
    ): "0 divided by any other number is 0",
    (
        "grpo_fast/metrics.py",
        'torch.where(s["rho_squared"] == 0, 1, s["rho_squared"])',
        "2",
    ): "keeps from a division by 0 that is not used",
    **dict.fromkeys(
        (
            ("ops/coefficients.py", "tokens = replaced(", "tokens.weight), importance=None"),
            ("ops/coefficients.py", "tokens = replaced(", "old_logp=None, score=None"),
            ("ops/coefficients.py", "tokens = replaced(", "importance=None, coefficient=c"),
        ),
        "without a surrogate nobody reads what goes into its terms: leaving it out saves the reads",
    ),
    ("torch_kernels/rows.py", "BLOCK_ELEMENTS = 1 << 21", ""): "speed and memory",
    ("torch_kernels/rows.py", "together = max(1, step", "2"): "speed alone",
    ("torch_kernels/rows.py", "return max(1, (COMPILED_ELEMENTS", "2"): "speed and memory",
    ("torch_kernels/rows.py", "COMPILED_ELEMENTS = 1 << 23", ""): "speed and memory",
    (
        "torch_kernels/policy_loss.py",
        "x.sum(-1, dtype=torch.float32 if counts else precision)",
        "x.sum(-1)",
    ): "of numbers that are float32",
    (
        "ops/head/chunk_length.py",
        "    return min(",
        "max(",
    ): "other chunks, no longer than they may be",
    ("torch_kernels/rows.py", "if together > 1 and", "2"): "speed alone",
    ("torch_kernels/rows.py", "nothing = (dentropy == 0) |", "1"): "0 times a finite number is 0",
    (
        "torch_kernels/group_advantage.py",
        "exponent - 1)",
        "+ (1)",
    ): "another power of two as the unit",
    ("ops/policy_loss.py", "mark_non_differentiable(*output[1:])", "2"): (
        "the rest never leaves the operator"
    ),
    (
        "torch_kernels/rows.py",
        "x.expand(2, -1).sum(1",
        "3",
    ): "two rows or three, of which one is kept",
    ("grpo_fast/diagnostics.py", "outside = nothing if below", " and "): "both are None or none",
    ("ops/head/float64.py", "by_row = torch.where(live, by_row, 1)", "2"): "of masked tokens",
    ("ops/head/float64.py", "range(0, max(len(hidden), 1), step)", "2"): "a block without rows",
    ("grpo_fast/operands.py", "return replaced(", "ratio='token', entropy_reduction"): (
        "REINFORCE has no divergence"
    ),
    ("grpo_fast/operands.py", "return replaced(", "dppo_value='logp', has_penalty"): (
        "the weights of the entropy are computed before"
    ),
    ("ops/head/vocab_parallel.py", "NOBODY = 1.0", "1.5"): "any number above 0",
    ("ops/head/vocab_parallel.py", "LOWEST = ", ""): (
        "the maximum of no columns, whose sum of 0 says that it does not count"
    ),
    ("ops/linear_grpo.py", "elif x.dtype == dtype", ""): "a copy instead of work in place",
    ("ops/head/gradients.py", "x.new_zeros(n + 1)", "2"): "the entries beyond n are cut off",
    ("ops/head/gradients.py", 'if head.shard and way in ("token"', "((head.shard) or"): (
        "without a shard the way for shards is slower, and the same"
    ),
    ("ops/linear_logprob.py", "mark_non_differentiable(*output[2:])", "3"): (
        "the rest never leaves the operator"
    ),
    ("torch_kernels/sequence_loss.py", "count.where(count != 0, 1)", "1"): (
        "of sequences without a live token nothing is used"
    ),
}
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
FLIP = {ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "=="}
FLIP |= {ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
SWAP = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.BitAnd: "|", ast.BitOr: "&"}
OTHER = {"min": "max", "minimum": "maximum", "lesser": "greater", "amin": "amax"}
OTHER |= {b: a for a, b in OTHER.items()}


def changes(node):
    """The texts that may stand in for `node`."""
    text = ast.unparse
    if isinstance(node, ast.Constant):
        x = node.value
        if isinstance(x, bool):
            yield repr(not x)
        elif isinstance(x, (int, float)):
            yield repr(x + 1 if isinstance(x, int) or not x else x * 1.5)
        elif isinstance(x, str) and re.fullmatch(r"\w+", x):
            yield repr(x + "_")
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield f"({text(node.left)} {FLIP[type(node.ops[0])]} {text(node.comparators[0])})"
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAP:
        yield f"(({text(node.left)}) {SWAP[type(node.op)]} ({text(node.right)}))"
    elif isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield f"({word.join(f'({text(x)})' for x in node.values)})"
    elif isinstance(node, ast.UnaryOp):
        yield f"({text(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield f"({text(node.orelse)} if {text(node.test)} else {text(node.body)})"
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in OTHER:
            yield re.sub(rf"\b{name}\(", f"{OTHER[name]}(", text(node), count=1)
        for word in node.keywords:
            if word.arg in OTHER:
                yield text(node).replace(f"{word.arg}=", f"{OTHER[word.arg]}=")
            elif word.arg:
                kept = [x for x in node.keywords if x is not word]
                yield text(ast.Call(node.func, node.args, kept))


def mutants(name, used=None):
    """(line, before, after, offsets of `before`) of all changes of a file that a test could see.

    Args:
        used: a set that gets the entries of `SAME` that leave a change out.
    """
    used = set() if used is None else used
    source = (ROOT / name).read_text()
    lines, starts, found = source.splitlines(), [0], []
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def add(node, afters):
        at = (starts[node.lineno - 1] + node.col_offset,)
        at += (starts[node.end_lineno - 1] + node.end_col_offset,)
        before = source.encode()[slice(*at)].decode()
        same = [x for x in SAME if name.endswith(x[0]) and x[1] in lines[node.lineno - 1]]
        for after in afters:
            excused = [x for x in same if x[2] in after]
            used.update(excused)
            if not excused:
                found.append((node.lineno, before, after, at))

    def visit(node, head):
        """head: the text of the statement around, of a compound one without its body."""
        if isinstance(node, SILENT):
            return
        if isinstance(node, ast.FunctionDef) and "register_fake" in "".join(
            ast.unparse(x) for x in node.decorator_list
        ):
            return
        if isinstance(node, ast.stmt):
            shown = [x for x in ("test", "target", "iter", "items") if hasattr(node, x)]
            parts = [getattr(node, x) for x in shown] if hasattr(node, "body") else [node]
            parts = [y for x in parts for y in (x if isinstance(x, list) else [x])]
            head = " ".join(ast.unparse(x) for x in parts)
        prose = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if prose or (isinstance(node, ast.Call) and "check_" in ast.unparse(node.func)):
            return  # the names in the calls of checks are those of their errors
        if not any(re.search(pattern, head) for pattern in EQUIVALENT):
            if isinstance(node, ast.expr):
                add(node, changes(node))
            elif isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, ast.Compare):
                add(node.test, [f"(not ({ast.unparse(node.test)}))"])
        for field, child in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for x in child if isinstance(child, list) else [child]:
                if isinstance(x, ast.AST):
                    visit(x, head)

    visit(ast.parse(source), "")
    return found
