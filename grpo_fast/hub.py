"""Write the library in the layout of Hugging Face's kernel hub: `python -m grpo_fast.hub FOLDER`.

It writes FOLDER/build/torch-universal, pure Python for every backend, with its `metadata.json`, and
a README. `kernels.get_local_kernel(FOLDER)` loads it (kernels 0.17.2). Once FOLDER is a repository
on the hub, `get_kernel` loads it. The hub loads a package under another name, perhaps next to an
installed grpo_fast. So imports are made relative, and the operators get a namespace that depends on
the sources.
"""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

import grpo_fast

SOURCE = Path(grpo_fast.__file__).parent
LEFT_OUT = {"doctor", "trainer", "hub.py", "__pycache__"}
# Of `integrations`: what `check_invariance` and `shared_prompt` need. The others are adapters of trainers.
NEEDED = {"__init__.py", "shared", "transformers.py"}
VERSION = 1  # of the kernel package, an int: raise it with every publication that breaks callers
README = """---
library_name: kernels
license: apache-2.0
---
# grpo_fast

The loss stage of GRPO-style post-training, fused: `grpo_loss`, `linear_grpo_loss`, `policy_loss`, `logprob`,
`linear_logprob`, `group_advantage`, `Objective`.

```python
from kernels import get_kernel

grpo_fast = get_kernel("<this repository>", version={version}, trust_remote_code=True)
loss = grpo_fast.grpo_loss(logits, completion_ids, advantages=advantages, mask=mask).loss
```
"""


def modules() -> dict[Path, str]:
    """Return the text of every module of the kernel package, by its path in the package."""
    found = {}
    # In a checkout `kernels` is a link, which rglob does not follow.
    for path in sorted({*SOURCE.rglob("*.py"), *(SOURCE / "kernels").glob("*.py")}):
        relative = path.relative_to(SOURCE)
        if _is_kept(relative):
            found[relative] = path.read_text()
    return found


def _is_kept(path: Path) -> bool:
    """Tell whether a module of this path in the package is part of the kernel package."""
    adapter = path.parts[0] == "integrations" and path.parts[1] not in NEEDED
    return not (adapter or LEFT_OUT & set(path.parts) or path.name == "__main__.py")


def relocated(text: str, depth: int, namespace: str) -> str:
    """Return a module's text for a package of any name.

    Imports become relative, and operators get the `namespace`.

    Args:
        depth: how many folders of the package the module is in.
    """
    here = "." * (depth + 1)
    text = re.sub(r"^(\s*from )grpo_fast( import )", rf"\1{here}\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*from )grpo_fast\.", rf"\1{here}", text, flags=re.MULTILINE)
    return text.replace('"grpo_fast::', f'"{namespace}::')


def build(folder: Path) -> Path:
    """Write the kernel package into `folder`, and return the folder of its one variant.

    A variant that is there already is deleted first.
    """
    found = modules()
    digest = hashlib.sha256("".join(f"{k}{v}" for k, v in found.items()).encode()).hexdigest()[:8]
    name = f"grpo_fast_{digest}"
    variant = folder / "build" / "torch-universal"
    if variant.exists():
        shutil.rmtree(variant)
    for path, text in found.items():
        target = variant / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relocated(text, len(path.parts) - 1, name))
    metadata = {
        "id": name,
        "name": "grpo-fast",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": ["einops"],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / "README.md").write_text(README.replace("{version}", str(VERSION)))
    return variant


def main() -> None:
    """Build the package in the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))


if __name__ == "__main__":
    main()
