"""The environments of `python -m tests.versions`: which versions, and which tests run with them."""

from typing import NamedTuple

LIBRARY = [
    "loss/test_loss.py",
    "loss/test_errors.py",
    "loss/test_shapes.py",
    "ops/test_logprob.py",
    "ops/test_grpo.py",
    "ops/test_linear_grpo.py",
    "ops/test_policy_loss.py",
    "ops/test_group_advantage.py",
    "weights/test_weights.py",
    "ops/test_compile.py",
    "ops/test_compiled_rows.py",
]
KERNELS = [
    "loss/test_loss.py",
    "ops/test_logprob.py",
    "ops/test_grpo.py",
    "ops/test_group_advantage.py",
    "ops/test_linear_grpo.py",
]
MODELS = ["integrations/test_transformers.py", "integrations/test_transformers_heads.py"]
TRL = ["integrations/test_trl_loss.py", "integrations/test_trl_trainer.py"]
TRAINER = ["trainer/test_update.py", "trainer/test_trainer_models.py", "trainer/test_resume.py"]
# Where Triton's interpreter, before 3.7, needs an older NumPy.
OLDER_NUMPY = "numpy<2.4"


class Environment(NamedTuple):
    """One environment.

    Attributes:
        name: what `--only` takes.
        python: its version, as 3.11.
        pins: what pip is asked for beside the library, as requirements.
        extras: the extras of the library.
        files: the files of tests, below tests/.
    """

    name: str
    python: str
    pins: tuple[str, ...]
    extras: tuple[str, ...] = ()
    files: tuple[str, ...] = tuple(LIBRARY)

    @property
    def requirements(self) -> str:
        """The pins as a cell of the table."""
        return ", ".join(f"`{pin}`" for pin in self.pins) or "none"


EVERYTHING = (*LIBRARY, *MODELS, *TRL, *TRAINER)


def triton(version: str, *pins: str) -> Environment:
    """The pinned PyTorch with another Triton."""
    pins = ("torch==2.13.0", f"triton=={version}", *pins)
    return Environment(f"triton-{version}", "3.11", pins, files=tuple(KERNELS))


def hugging_face(transformers: str, trl: str) -> Environment:
    """The pinned PyTorch with another transformers and TRL."""
    pins = (
        "torch==2.13.0",
        "triton==3.7.1",
        f"transformers=={transformers}",
        f"trl=={trl}",
        "peft",
    )
    files = (*MODELS, *TRL, *TRAINER)
    return Environment(f"transformers-{transformers}", "3.11", pins, ("train", "trl"), files)


ENVIRONMENTS = (
    Environment("oldest", "3.10", ("torch==2.8.0", "einops==0.8.0", OLDER_NUMPY)),
    Environment("newest", "3.13", (), ("train", "trl"), EVERYTHING),
    hugging_face("5.17.0", "1.15.0"),
    Environment(
        "torch-2.11",
        "3.12",
        ("torch==2.11.0", "trl==1.16.0", OLDER_NUMPY),
        ("train", "trl"),
        EVERYTHING,
    ),
    triton("3.4.0", OLDER_NUMPY),
    triton("3.6.0", OLDER_NUMPY),
    triton("3.8.0"),
    triton("3.9.0"),
    hugging_face("5.24.0", "1.16.0"),
    Environment("torch-2.9", "3.12", ("torch==2.9.1", OLDER_NUMPY)),
    Environment("torch-2.10", "3.13", ("torch==2.10.0", OLDER_NUMPY)),
    Environment("torch-2.12", "3.10", ("torch==2.12.0", OLDER_NUMPY)),
    Environment("torch-2.14", "3.11", ("torch==2.14.1",)),
    # With the pinned transformers, 5.23, the whole suite runs.
    hugging_face("5.18.0", "1.16.0"),
    hugging_face("5.19.0", "1.16.0"),
    hugging_face("5.20.2", "1.16.0"),
    hugging_face("5.21.1", "1.16.0"),
    hugging_face("5.22.2", "1.16.0"),
)
