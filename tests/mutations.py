"""The changes that `tests/mutants.py` makes, the tests that see them, and those that no test can see."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "not triton and not processes and not forward_mode_is_refused"  # for `pytest -k`

# The test files for each file, the likeliest first, and which of their tests.
COVERS: dict[str, tuple[str, str]] = {
    "grpo_fast/ops/_arguments.py": ("errors linear_errors tensor_kinds strides", TORCH),
    "grpo_fast/ops/_autograd.py": ("derivatives inplace linear_errors", TORCH),
    "grpo_fast/ops/_backend.py": ("errors public_api loss tensor_kinds", TORCH),
    "grpo_fast/ops/_chunks.py": ("linear_grpo linear_logprob linear_edges", TORCH),
    "grpo_fast/ops/_head.py": ("linear_logprob linear_grpo linear_edges linear_errors", TORCH),
    "grpo_fast/ops/_head_arguments.py": ("linear_errors linear_logprob linear_edges", TORCH),
    "grpo_fast/ops/_metrics.py": ("loss rare_options", TORCH),
    "grpo_fast/ops/_phases.py": ("rare_options sequence_loss policy_loss grpo", TORCH),
    "grpo_fast/ops/_rows.py": ("logprob errors strides grpo", TORCH),
    "grpo_fast/ops/_selection.py": ("selection policy_loss weights", f"{TORCH} and not trl_modes"),
    "grpo_fast/ops/_terms.py": ("policy_loss sequence_loss preset_edges grpo", TORCH),
    "grpo_fast/ops/_tokens.py": ("loss errors rare_options", TORCH),
    "grpo_fast/ops/_vocab_parallel.py": ("vocab_parallel", "combine or 2-False"),
    "grpo_fast/ops/group_advantage.py": ("group_advantage rare_options errors", TORCH),
    "grpo_fast/ops/grpo.py": ("grpo inplace rare_options derivatives", TORCH),
    "grpo_fast/ops/linear_grpo.py": ("linear_grpo linear_edges linear_errors", TORCH),
    "grpo_fast/ops/linear_logprob.py": ("linear_logprob linear_edges linear_errors", TORCH),
    "grpo_fast/ops/logprob.py": ("logprob linear_logprob", "not processes and not any_shape"),
    "grpo_fast/ops/policy_loss.py": ("policy_loss loss rare_options", TORCH),
    "grpo_fast/ops/sequence_loss.py": ("sequence_loss policy_loss loss", TORCH),
    "grpo_fast/weights.py": ("weights", TORCH),
    "grpo_fast/presets.py": ("preset_values presets preset_edges verl", TORCH),
    "grpo_fast/integrations/trl.py": ("trl_loss trl", TORCH),
    "grpo_fast/integrations/verl.py": ("verl verl_options", TORCH),
    "kernels/tiles.py": (
        "policy_loss logprob",
        "triton and (every_objective or flags or infinite or confident or banned or offset)",
    ),
    "kernels/rows.py": (
        "logprob rows",
        "triton and (reference or banned or offset or masked or exact_zeros) or align",
    ),
    "kernels/grpo.py": (
        "grpo",
        "triton and every_objective and (default or everything or gspo or entropy)",
    ),
}
# Changes that no test on a CPU can see: in the statement's text, by regular expression.
EQUIVALENT = {
    r"block|warps|stages|eviction|cache_mod|num_ctas|SEGMENTS|SMALL|_WIDTH": "speed alone",
    r"device=|\.device|cuda|is_compiling|synchroni": "asks for the device; the tests have one",
    r"strict=|stacklevel|exist_ok|__all__|lru_cache": "never differs in a correct call",
    r"mutates_args|register_fake|torch\.library|new_empty|torch\.empty": "schemas and fakes",
    r"getattr\(dist": "the older or the newer name of one function",
    r"^(from|import|op = |assert )": "no behaviour",
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


def mutants(name):
    """(line, before, after, offsets of `before`) of all changes of a file that a test could see."""
    source = (ROOT / name).read_text()
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def visit(node, statement):
        if isinstance(node, SILENT):
            return
        statement = node if isinstance(node, ast.stmt) else statement
        prose = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if prose or (isinstance(node, ast.Call) and "check_" in ast.unparse(node.func)):
            return  # the names in the calls of checks are those of their errors
        if isinstance(node, ast.expr):
            at = (starts[node.lineno - 1] + node.col_offset,)
            at += (starts[node.end_lineno - 1] + node.end_col_offset,)
            whole = ast.unparse(statement) if not hasattr(statement, "body") else ast.unparse(node)
            if not any(re.search(pattern, whole) for pattern in EQUIVALENT):
                before = source.encode()[slice(*at)].decode()
                found.extend((node.lineno, before, after, at) for after in changes(node))
        if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, ast.Compare):
            test = node.test
            at = (starts[test.lineno - 1] + test.col_offset,)
            at += (starts[test.end_lineno - 1] + test.end_col_offset,)
            before = source.encode()[slice(*at)].decode()
            if "cuda" not in before:
                found.append((node.lineno, before, f"(not ({before}))", at))
        for field, child in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for x in child if isinstance(child, list) else [child]:
                if isinstance(x, ast.AST):
                    visit(x, statement)

    visit(ast.parse(source), None)
    return found
