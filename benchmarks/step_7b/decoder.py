"""A Qwen2 decoder in plain PyTorch: it stands before the head, the same for every provider.

Module names are those of transformers' `Qwen2ForCausalLM`; a test loads its weights and compares
the outputs. Not transformers itself, so that a machine with PyTorch alone can run the step.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a Qwen2; Qwen2.5-7B's by default."""

    layers: int = 28
    D: int = 3584
    heads: int = 28
    kv_heads: int = 4
    ffn: int = 18_944
    V: int = 152_064
    theta: float = 1e6
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.D // self.heads


QWEN_7B = Config()
TINY = Config(layers=2, D=64, heads=4, kv_heads=2, ffn=128, V=1003, theta=1e4)


class Linear(nn.Linear):
    """A linear layer with an optional low-rank adapter, which may be switched off."""

    adapted: bool = False

    def add_adapter(self, rank: int) -> None:
        like = self.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, self.in_features).normal_(0, 0.02))
        self.lora_b = nn.Parameter(like.new_empty(self.out_features, rank).normal_(0, 0.02))
        self.adapted = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.adapted:
            out = out + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return out


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.D, c.heads * c.head_dim)
        self.k_proj = Linear(c.D, c.kv_heads * c.head_dim)
        self.v_proj = Linear(c.D, c.kv_heads * c.head_dim)
        self.o_proj = Linear(c.heads * c.head_dim, c.D, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (
            part(x).view(B, L, -1, self.c.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        groups = self.c.heads // self.c.kv_heads
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class Mlp(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(c.D, c.ffn, bias=False)
        self.up_proj = Linear(c.D, c.ffn, bias=False)
        self.down_proj = Linear(c.ffn, c.D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.D, eps=c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.D, eps=c.eps)
        self.mlp = Mlp(c)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.V, c.D)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.D, eps=c.eps)


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.model = Body(c)
        self.lm_head = nn.Linear(c.D, c.V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute hidden states (B, L, D) before the head; gradients are checkpointed by layer."""
        x = self.model.embed_tokens(ids)
        rotation = self.rotation(ids.shape[1], x)
        for layer in self.model.layers:
            if torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, use_reentrant=False)
            else:
                x = layer(x, rotation)
        return self.model.norm(x)

    def rotation(self, L: int, like: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.c.head_dim, 2, device=like.device).float() / self.c.head_dim
        angle = torch.arange(L, device=like.device).float()[:, None] * self.c.theta**-half
        angle = torch.cat([angle, angle], 1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def make(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """Make a decoder with random weights on the device, "meta" included."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.fill_(1.0) if "norm" in name else x.normal_(0, 0.02)
    return model


def add_lora(model: Decoder, rank: int) -> None:
    """Freeze the model and put adapters on every projection of its layers."""
    model.requires_grad_(False)
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.add_adapter(rank)


def switch_adapters(model: Decoder, on: bool) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.adapted = on and hasattr(module, "lora_a")
