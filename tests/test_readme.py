"""The README's example, run as it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]


class Model(torch.nn.Module):
    """As little of a causal LM as the example needs."""

    def __init__(self, V=20, D=8):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V)

    def forward(self, ids):
        return SimpleNamespace(logits=self.head(self.embed(ids)))


def test_the_example_of_the_loss_runs_and_learns(device, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    model, ref_model = Model().to(device), Model().to(device)
    before = [x.detach().clone() for x in model.parameters()]
    completion_ids = torch.randint(20, (4, 5), device=device)
    scope = {
        "model": model,
        "ref_model": ref_model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "prompt_ids": torch.randint(20, (4, 3), device=device),
        "completion_ids": completion_ids,
        "mask": torch.ones(4, 5, dtype=torch.bool, device=device),
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.0], device=device),
        "G": 2,
        "mu": 2,
    }
    exec(code, scope)
    assert "'clip_fraction_low'" in capsys.readouterr().out
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        if ".venv" in path.parts or "site-packages" in path.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
