"""The model given with --model: load it, and refuse one that is incomplete or no causal language model."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from grpo_fast.shared_prompt.recompute import checkpointed_layers
from grpo_fast.trainer import packaged

# What transformers says, and what it means here: code and pickles that come with a model do not run.
REFUSED = {
    "contains custom code": "it needs code of its own (trust_remote_code), which is not run",
    "named model.safetensors": "no model.safetensors. Weights in other files may be pickles, which are not "
    "read: load the model with transformers, and save it with save_pretrained",
}
OLD_BUFFERS = (".masked_bias",)  # constants that transformers once saved with GPT-2


def load(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer from a folder or a hub id.

    Args:
        dtype: the precision of the weights. options: further arguments of `from_pretrained`.

    Raises:
        ValueError: it cannot be read, is incomplete, not finite, or no causal LM; the message says which.
    """
    try:
        where = locate(name)
        tokenizer = read(AutoTokenizer, where, "tokenizer")
        model, info = read(
            AutoModelForCausalLM,
            where,
            "weights",
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and refused below, by name
            **options,
        )
        check_loaded(info)
        if where != name and packaged.install(name):  # what an adapter's files call its model
            model.name_or_path = model.config._name_or_path = name
        check_finite(model)
        check_causal(model)
    except ValueError as error:
        raise ValueError(f"model={name!r}: {error}") from error
    return model, tokenizer


def locate(name: str) -> str:
    """Return the folder with the model, or the hub id; some models come in a Python package.

    Raises:
        ValueError: `name` can only be a folder, and it does not exist or has no model in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError("a file; want the folder that it is in")
        # Hub ids are `name` and `owner/name`.
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name:
            raise ValueError("no such folder")
        return str(packaged.folder(name) or name)
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "an adapter; merge it into its model (peft: merge_and_unload) and give the folder of the result"
        )
    if (folder / "checkpoints").is_dir():
        raise ValueError("a run; give one of its checkpoints, <run>/checkpoints/step-<n>")
    raise ValueError("a folder without config.json, so no model of transformers")


def read(kind: Any, where: str, what: str, **options: Any) -> Any:
    """Call `kind.from_pretrained(where)` without the code of the model; its errors become one line."""
    try:
        return kind.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # of whatever the files' readers raise
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
                command = packaged.install(where)
                raise ValueError(
                    "no such folder, and the hub cannot be reached; give a folder with the model, or "
                    "check the connection"
                    + (f", or install the package that has the model: {command}" if command else "")
                ) from error
            if isinstance(cause, HFValidationError):
                raise ValueError("no such folder, and not a hub id") from error
            cause = cause.__cause__ or cause.__context__
        text = refusal(error) or " ".join(str(error).split()) or type(error).__name__
        if "Unrecognized configuration class" in text:
            text = f"{text.split(' for this kind')[0]}: not a causal language model"
        raise ValueError(f"{what}: {text}") from error


def refusal(error: Exception) -> str:
    """Say in our words that a model was refused for its code or its pickles; "" for other errors."""
    return next((words for text, words in REFUSED.items() if text in str(error)), "")


def check_loaded(info: dict[str, Any]) -> None:
    """Refuse a model with weights that are not in the checkpoint.

    Tensors that the model does not use are named on stderr. The weights of a value head do no harm, but those
    of a layer that config.json does not count would.

    Raises:
        ValueError: tensors are missing or have other shapes; the message names them.
    """
    unused = sorted(k for k in info["unexpected_keys"] if not k.endswith(OLD_BUFFERS))
    if unused:
        print(
            f"tensors of the checkpoint that the model does not use: {listed(unused)}",
            file=sys.stderr,
        )
    missing = sorted(info["missing_keys"])
    wrong = [f"missing tensors: {listed(missing)}"] if missing else []
    if shapes := sorted(info["mismatched_keys"], key=str):
        wrong.append(
            "tensors of another shape: "
            + listed([f"{n} {tuple(got)}, want {tuple(want)}" for n, got, want in shapes])
        )
    if wrong:
        raise ValueError(f"the checkpoint does not fit its config.json; {'; '.join(wrong)}")


def check_finite(model: Any) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ValueError: there are some; the message names the tensors.
    """
    floats = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    # The extremes are NaN if any weight is. `isfinite` of all weights takes 30 times as long on a CPU.
    bad = [
        name
        for name, p in floats
        if type(p) is torch.nn.Parameter and not torch.stack(p.aminmax()).isfinite().all()
    ]
    if bad:
        raise ValueError(f"NaN or infinite weights: {listed(bad)}")


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a model whose logits at a token depend on the tokens after it.

    Raises:
        ValueError: they do, or the model is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("an encoder-decoder, not a causal language model")
    ids = torch.tensor([[0, 1, 2], [0, 1, 0]], device=model.device)
    first = model.eval()(input_ids=ids).logits[:, :2].float()
    # In halves a row's bits depend on the products' shapes, which are the same for both.
    if (first[0] - first[1]).abs().max() > 1e-4 * first.abs().max():
        raise ValueError(
            "its logits depend on later tokens (an encoder like BERT?): not a causal language model"
        )


def listed(names: list[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_layers(model: Any) -> None:
    """Refuse a model whose activations cannot be recomputed.

    Raises:
        ValueError: it has no layers for which transformers can do this.
    """
    if not checkpointed_layers(model):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that can be recomputed"
        )


def quantization(name: str) -> Any:
    """Return the quantisation of `from_pretrained` for an option of `--quantize`.

    Raises:
        ValueError: its library is not installed.
    """
    package = "torchao" if name.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantize={name!r}: {package} is not installed; pip install {package}")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    four = name == "bnb-4bit"
    return BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
