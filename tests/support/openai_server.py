"""A small inference server that speaks vLLM's protocol, with a tiny model, and fails on demand.

Its answers have the fields, statuses and messages that vLLM 0.32.0 sent when it was asked the same. As vLLM
does, it takes the defaults of a generation config, adds no end token to those of a request with `ignore_eos`,
continues prompts from a prefix cache that ignores updates of the weights, and reads an adapter that was
loaded in place from its folder again at every request.
"""

import copy
import json
import threading
import uuid
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Fault = int | bytes | str | Callable[[dict], Any]
MAX_MODEL_LEN = 64
# What a generation_config.json would set, for requests that do not.
DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
NEUTRAL = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
KNOWN = {
    "model", "prompt", "n", "max_tokens", "seed", "logprobs", "stop_token_ids", "ignore_eos",
    "presence_penalty", "frequency_penalty", "return_token_ids", "return_tokens_as_token_ids",
    "cache_salt", *DEFAULTS,
}  # fmt: skip


class RefusedError(Exception):
    """An answer with a status of its own."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": status}}


class OpenAIServer:
    """A server on a free port of this machine, from `start` to `stop`, or in a `with` block.

    Args:
        folder: the model that it starts with.
        processed: `--logprobs-mode processed_logprobs`.
        dev: VLLM_SERVER_DEV_MODE, for updates of all weights.
        lora: `--enable-lora`, and VLLM_ALLOW_RUNTIME_LORA_UPDATING.

    Attributes:
        requests: the path, body and headers of each request.
        faults: by path, what goes wrong with its next requests: an int is the status of an error, bytes are
            sent in place of the answer, "hang" never answers, "lost" does what is asked and closes the
            connection, a function changes the answer, None does nothing.
    """

    def __init__(self, folder: Path, *, processed=False, dev=False, lora=False) -> None:
        self.folder, self.processed, self.dev, self.lora = folder, processed, dev, lora
        self.requests: list[tuple[str, dict, dict]] = []
        self.faults: dict[str, deque[Fault | None]] = {}
        self.lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> "OpenAIServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, path: str, *faults: Fault | None) -> None:
        self.faults[path] = deque(faults)

    def start(self) -> "OpenAIServer":
        """Listen; as a process that starts again does, with the first weights and no adapters."""
        self.base = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.adapters: dict[str, tuple[str, Any, bool]] = {}
        self.cache: dict[tuple, torch.Tensor] = {}
        self.over = threading.Event()
        self.http = _Listener(("127.0.0.1", self.port), _handler(self))
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, path: str, body: dict) -> Any:
        """Return the body of the answer: a dict, or a string for text."""
        routes: dict[str, Callable[[dict], Any]] = {
            "/v1/models": self.models,
            "/v1/completions": self.completions,
        }
        if self.dev:
            routes["/collective_rpc"] = self.collective_rpc
        if self.lora:
            routes["/v1/load_lora_adapter"] = self.load
            routes["/v1/unload_lora_adapter"] = self.unload
        if path not in routes:
            refusal = RefusedError(404, "")
            refusal.body = {"detail": "Not Found"}
            raise refusal
        with self.lock:
            return routes[path](body)

    def models(self, body: dict) -> dict:
        cards = [("policy", str(self.folder), None)]
        cards += [(name, path, "policy") for name, (path, _, _) in self.adapters.items()]
        data = [
            {"id": i, "object": "model", "owned_by": "vllm", "root": r, "parent": p}
            for i, r, p in cards
        ]
        return {"object": "list", "data": data}

    def collective_rpc(self, body: dict) -> dict:
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        try:
            self.base = AutoModelForCausalLM.from_pretrained(path).eval()
        except Exception as error:
            what = f"Call to collective_rpc method failed: Worker failed with error '{error}'"
            raise RefusedError(500, what, "InternalServerError") from error
        return {"results": [None]}

    def load(self, body: dict) -> str:
        name, path = body["lora_name"], body["lora_path"]
        inplace = body.get("load_inplace", False)
        if name in self.adapters and not inplace:
            what = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter"
            raise RefusedError(
                400, f"{what} in place, set 'load_inplace' to True.", "InvalidUserInput"
            )
        self.adapters[name] = path, self.adapted(name, path), inplace
        return f"Success: LoRA adapter '{name}' added successfully."

    def adapted(self, name: str, path: str) -> Any:
        from peft import PeftModel

        if not Path(path, "adapter_config.json").exists():
            what = f"Loading lora {name} failed: No adapter found for <path>"
            raise RefusedError(404, what, "NotFoundError")
        return PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()

    def unload(self, body: dict) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            what = f"The lora adapter '{body['lora_name']}' cannot be found."
            raise RefusedError(404, what, "NotFoundError")
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def completions(self, body: dict) -> dict:
        name, prompt, longest = body["model"], body["prompt"], body["max_tokens"]
        if name != "policy" and name not in self.adapters:
            what = f"The model `{name}` does not exist. Valid aliases: policy."
            raise RefusedError(404, what, "NotFoundError")
        if unknown := body.keys() - KNOWN:  # vLLM itself ignores them
            raise RefusedError(400, f"unknown fields {unknown}")
        if len(prompt) + longest > MAX_MODEL_LEN:
            raise RefusedError(
                400, f"max_tokens={longest} cannot be greater than max_model_len={MAX_MODEL_LEN}."
            )
        if max(prompt) >= self.base.config.vocab_size:
            raise RefusedError(400, f"Token id {max(prompt)} is out of vocabulary")
        sampling = {k: body.get(k, default) for k, default in DEFAULTS.items()}
        temperature = sampling.pop("temperature")
        if sampling != NEUTRAL:
            raise RefusedError(
                400, f"this server samples from the whole distribution, not {sampling}"
            )
        stops = body.get("stop_token_ids", [])
        stops = stops if body.get("ignore_eos") else [*stops, self.base.config.eos_token_id]
        ids, logps, tops = self.sample(body, temperature, stops)
        stopped = ids[-1] in stops
        tokens = [f"token_id:{i}" for i in ids]
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {
                "text_offset": [0] * len(ids),
                "token_logprobs": logps,
                "tokens": tokens,
                "top_logprobs": tops,
            },
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_logprobs": None,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
            "routed_experts": None,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {
            "id": f"cmpl-{uuid.uuid4().hex[:16]}",
            "object": "text_completion",
            "model": name,
            "choices": [choice],
            "usage": usage,
        }

    @torch.no_grad()
    def sample(
        self, body: dict, temperature: float, stops: list[int]
    ) -> tuple[list[int], list[float], list[dict[str, float]]]:
        name, prompt = body["model"], body["prompt"]
        path, model, inplace = self.adapters.get(name, ("", self.base, False))
        if inplace:
            model = self.adapted(name, path)
        generator = torch.Generator().manual_seed(body["seed"])
        ids: list[int] = []
        logps, tops = [], []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in stops):
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            if not ids:  # what the prefix cache has
                key = name, path, body.get("cache_salt"), tuple(prompt)
                logits = self.cache.setdefault(key, logits)
            scaled = logits / (temperature or 1)
            drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator).item()
            ids.append(drawn if temperature else int(logits.argmax()))
            shown = (scaled if self.processed else logits).log_softmax(-1)
            logps.append(shown[ids[-1]].item())
            best = shown.topk(body["logprobs"]).indices.tolist()
            tops.append({f"token_id:{i}": shown[i].item() for i in [ids[-1], *best]})
        return ids, logps, tops


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that went away."""


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict) -> None:
            with server.lock:
                server.requests.append((self.path, body, dict(self.headers)))
                faults = server.faults.get(self.path)
                fault = faults.popleft() if faults else None
            if fault == "hang":
                server.over.wait()
                return
            status, answer = 200, b""
            try:
                if isinstance(fault, int):
                    raise RefusedError(fault, f"made to fail with {fault}")
                answer = server.answer(self.path, body)
            except RefusedError as refusal:
                status, answer = refusal.status, refusal.body
            if fault == "lost":
                return
            if isinstance(fault, bytes):
                answer = fault
            elif callable(fault):
                answer = fault(answer) or answer
            if not isinstance(answer, bytes):
                answer = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    return Handler
