"""The sources of other trainers, where they are found, and an import of them without what they require.

`make` puts the wheels of some hosts beside the environment, without their requirements. A folder that the
environment variable HOST_CHECKOUTS names may hold checkouts of any of them, in folders `<host>` or
`<host>-<release or commit>`, for example `nemo_rl-0.7.0`.

A host's modules are its own files. What they import and the losses do not need, of other packages (Ray, vLLM,
Megatron, ...) and of the host, is replaced by stubs: modules in which every name exists.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import typing_extensions

FOLDERS = "HOST_CHECKOUTS"
BESIDE = Path(sys.prefix) / "oracles"


class Host(NamedTuple):
    """A trainer, and how its modules are imported.

    Args:
        modules: what the adapter reaches, and the tests compare with.
        stubs: modules that are replaced, each with all that is below it.
        bare: packages whose `__init__` does not run.
        folders: where a checkout has its packages.
        wheel: whether `make` installs the host.
    """

    package: str
    modules: tuple[str, ...]
    stubs: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    folders: tuple[str, ...] = (".",)
    wheel: bool = False


HOSTS = {
    "verl": Host(
        "verl",
        (
            "verl.trainer.ppo.core_algos",
            "verl.utils.torch_functional",
            "verl.utils.kernel.linear_cross_entropy",
        ),
        (
            *("omegaconf", "ray", "tensordict", "verl.trainer.config", "verl.utils.device"),
            *("verl.utils.debug", "verl.utils.npu_utils", "verl.workers"),
        ),
        ("verl", "verl.trainer", "verl.trainer.ppo"),
        wheel=True,
    ),
    "skyrl": Host(
        "skyrl",
        (
            "skyrl.backends.skyrl_train.utils.ppo_utils",
            "skyrl.backends.skyrl_train.utils.off_policy_correction_utils",
            "skyrl.train.config",
        ),
        ("ray", "jaxtyping", "loguru", "omegaconf", "skyrl_gym"),
        ("skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"),
        wheel=True,
    ),
    "openrlhf": Host(
        "openrlhf",
        ("openrlhf.models.loss", "openrlhf.trainer.ray.ppo_actor", "openrlhf.cli.train_ppo_ray"),
        (
            *("aiohttp", "deepspeed", "flash_attn", "pylatexenc", "ray", "torchdata", "vllm"),
            *("openrlhf.datasets", "openrlhf.models.actor", "openrlhf.models.model"),
            *("openrlhf.utils.vlm_utils", "openrlhf.utils.deepspeed"),
        ),
        wheel=True,
    ),
    "areal": Host(
        "areal",
        ("areal.utils.functional.functional", "areal.trainer.ppo.actor"),
        (
            *("areal.api", "areal.engine", "areal.experimental", "areal.infra", "areal.utils.data"),
            *("areal.utils.logging", "areal.utils.perf_tracer", "areal.utils.stats_tracker"),
        ),
        ("areal", "areal.utils", "areal.trainer", "areal.trainer.ppo"),
        wheel=True,
    ),
    "nemo_rl": Host(
        "nemo_rl",
        ("nemo_rl.algorithms.loss.loss_functions",),
        (
            *("ray", "nemo_rl.data", "nemo_rl.models", "nemo_rl.utils"),
            "nemo_rl.algorithms.x_token",
            "nemo_rl.distributed.batched_data_dict",
        ),
        ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", "nemo_rl.distributed"),
    ),
    "prime_rl": Host(
        "prime_rl",
        ("prime_rl.trainer.rl.loss",),
        ("beartype", "jaxtyping", "prime_rl.configs", "prime_rl.utils"),
        folders=("src", "packages/prime-rl-configs/src"),
    ),
    "slime": Host(
        "slime",
        ("slime.backends.megatron_utils.loss",),
        ("httpx", "megatron", "slime.utils.distributed_utils", "slime.utils.types"),
        ("slime", "slime.backends", "slime.backends.megatron_utils", "slime.utils"),
    ),
    "miles": Host(
        "miles",
        (
            "miles.backends.training_utils.loss",
            "miles.backends.training_utils.loss_hub.losses",
            "miles.backends.training_utils.parallel",
        ),
        ("miles.utils.audit_utils", "miles.utils.multi_lora", "httpx", "ray"),
        ("miles", "miles.backends", "miles.backends.training_utils", "miles.utils"),
    ),
    "xtuner": Host(
        "xtuner",
        ("xtuner.v1.rl.loss.loss_fn",),
        bare=("xtuner", "xtuner.v1", "xtuner.v1.rl", "xtuner.v1.rl.loss"),
    ),
}


class Source(NamedTuple):
    """The sources of a release of a host: `name` is the folder's, `how` says what kind it is."""

    host: str
    release: str
    folder: Path
    how: str


def sources(host: str) -> list[Source]:
    """Find a host that is installed, its wheel beside the environment, and checkouts in FOLDERS' folder."""
    found = []
    for path in (sys.path, [str(BESIDE)]):
        for wheel in importlib.metadata.distributions(name=HOSTS[host].package, path=path):
            folder = Path(str(wheel.locate_file("")))
            if (
                folder / HOSTS[host].package
            ).is_dir():  # a placeholder of that name may have nothing
                found.append(Source(host, wheel.version, folder, "wheel"))
    given = os.environ.get(FOLDERS)
    for folder in sorted(Path(given).iterdir()) if given else ():
        name, _, release = folder.name.partition("-")
        if name == host:
            found.append(Source(host, release or "a checkout", folder, "sources"))
    return found


class _Anything:
    """Stands for a function, class, decorator or type of a stub."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        decorates = len(arguments) == 1 and callable(arguments[0]) and not options
        return arguments[0] if decorates else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __bool__(self) -> bool:  # nothing is initialised or available
        return False

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, value := _Anything())
        return value


def _is_below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of a host in its folders, and stubs."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.roots = [str(folder / inside) for inside in host.folders]

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if _is_below(name, self.host.stubs):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name in self.host.bare:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            last = name.rpartition(".")[2]
            spec.submodule_search_locations = [f"{x}/{last}" for x in path or self.roots]
            return spec
        if name == self.host.package:
            return importlib.machinery.PathFinder.find_spec(name, self.roots)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def imported(source: Source) -> Iterator[dict[str, ModuleType]]:
    """Import the modules of a host, by their names; they can be imported until the end of the context."""
    host = HOSTS[source.host]
    finder = _Finder(host, source.folder)
    owned = (host.package, *host.stubs)

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if _is_below(name, owned)}

    find_version = importlib.metadata.version

    def version(name: str) -> str:
        if name != host.package:
            return find_version(name)
        if "." in source.release:
            return source.release
        raise importlib.metadata.PackageNotFoundError(name)  # a commit

    before = take_out()
    sys.meta_path.insert(0, finder)
    # Before Python 3.12 pydantic takes the other TypedDict alone.
    typed = mock.patch.object(typing, "TypedDict", typing_extensions.TypedDict)
    try:
        with typed, mock.patch.object(importlib.metadata, "version", version):
            yield {name: importlib.import_module(name) for name in host.modules}
    finally:
        sys.meta_path.remove(finder)
        take_out()
        sys.modules.update(before)
