"""Wan's transformer block as a LoRA training runs it: the arithmetic of diffusers' block, with a backward pass of its own.

Autograd over diffusers' block and PEFT's layers keeps about 29 tensors of tokens x width a block. The gradient of a LoRA
over frozen weights needs fewer: frozen Linears need no input, q, k and v share one, and norms, modulation, rotary
embedding and GELU are cheap to compute again. What a block keeps between its forward and its backward pass is one of
`KEEPS`; what it does not keep, the backward pass computes again with the same operations, so all give equal numbers.

Modules, names and weights stay diffusers' own. Nothing is computed that no adapted layer needs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch.nn import functional

from wantrain import lora
from wantrain.models.quantised import QuantisedLinear
from wantrain.models.short_text import ShortText
from wantrain.terms import TEXT_LEN

KEEPS = ("all", "attention", "inputs")
"""all: whatever a matrix product or self-attention computed, up to the feed-forward's inner values. attention: the
block's input and what self-attention answered. inputs: the block's input."""


@dataclass(slots=True)
class Product:
    """A frozen Linear, and the LoRA on it: down [rank, in] and up [out, rank], None where there is none."""

    linear: torch.nn.Linear
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]."""
        return self.linear.dequantised(dtype) if isinstance(self.linear, QuantisedLinear) else self.linear.weight.to(dtype)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else len(self.down)


def product_of(layer: torch.nn.Module) -> Product | None:
    """The layer as a Product; None where its adapter is of another kind than a LoRA."""
    if isinstance(layer, torch.nn.Linear):
        return Product(layer)
    pair = lora.pair_of(layer)
    return None if pair is None else Product(*pair)


class Products:
    """Linears with one input in common, and one product for the down halves of all their LoRAs."""

    def __init__(self, products: Sequence[Product], dtype: torch.dtype) -> None:
        self.products, self.dtype = products, dtype
        downs = [p.down.to(dtype) for p in products if p.down is not None]
        self.downs = torch.cat(downs) if downs else None
        self.low: torch.Tensor | None = None  # input @ downs.T

    def forward(self, given: torch.Tensor) -> list[torch.Tensor]:
        """[..., in] -> [..., out] of each."""
        if self.downs is not None:
            self.low = functional.linear(given, self.downs)
        outputs, at = [], 0
        for p in self.products:
            bias = None if p.linear.bias is None else p.linear.bias.to(self.dtype)
            outputs.append(output := functional.linear(given, p.weight(self.dtype), bias))
            if p.up is not None:
                assert self.low is not None, "an up half has its down half"
                output.flatten(0, -2).addmm_(self.low[..., at: at + p.rank].flatten(0, -2), p.up.to(self.dtype).T,
                                             alpha=p.scale)
                at += p.rank
        return outputs

    def backward(self, gradients: Sequence[torch.Tensor], given: Callable[[], torch.Tensor], asks_input: bool
                 ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradient for the input (None unless asked for), and for down and up of each product.

        `given` gives the input, and is called only where a LoRA needs it.
        """
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        weights: list[torch.Tensor | None] = []
        low_gradient: torch.Tensor | None = None
        if self.downs is not None:
            low = (functional.linear(given(), self.downs) if self.low is None else self.low).flatten(0, -2)
            low_gradient, at = torch.empty_like(low), 0
            for p, gradient in zip(self.products, flat, strict=True):
                if p.up is None or p.down is None:
                    weights += [None, None]
                    continue
                here = slice(at, at := at + p.rank)
                low_gradient[:, here] = (gradient @ p.up.to(self.dtype)).mul_(p.scale)
                weights += [None, (gradient.T @ low[:, here]).mul_(p.scale).to(p.up.dtype)]
            downs = low_gradient.T @ given().flatten(0, -2)
            at = 0
            for number, p in enumerate(self.products):
                if p.down is not None:
                    weights[2 * number] = downs[at: at + p.rank].to(p.down.dtype)
                    at += p.rank
        else:
            weights = [None] * (2 * len(self.products))
        if not asks_input:
            return None, weights
        total = flat[0] @ self.products[0].weight(self.dtype)
        for p, gradient in zip(self.products[1:], flat[1:], strict=True):
            total.addmm_(gradient, p.weight(self.dtype))
        if low_gradient is not None:
            total.addmm_(low_gradient, self.downs)
        return total.view(*gradients[0].shape[:-1], -1), weights


# Norms, rotary embedding: forward, and the gradient for the input. All in float32, whatever comes and goes.

def normed(x: torch.Tensor, eps: float, factor: torch.Tensor | None, offset: torch.Tensor | None, dtype: torch.dtype
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, times `factor`, plus `offset`; and its mean and 1 / standard deviation.

    `factor` and `offset` broadcast against x; None leaves them out.
    """
    width = x.shape[-1]
    if factor is None or offset is None:
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], None, None, eps)
    elif factor.numel() == width:  # one row for all tokens: fused
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], factor.view(width), offset.view(width), eps)
    else:
        out, mean, rstd = torch.native_layer_norm(x.float(), [width], None, None, eps)
        out = out.mul_(factor).add_(offset)
    return out.to(dtype), mean, rstd


def normed_backward(gradient: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
                    factor: torch.Tensor | None) -> torch.Tensor:
    """float32."""
    width, gradient = x.shape[-1], gradient.float()
    weight = None
    if factor is not None and factor.numel() == width:
        weight = factor.view(width)
    elif factor is not None:
        gradient = gradient * factor
    return torch.ops.aten.native_layer_norm_backward(
        gradient, x.float(), [width], mean, rstd, weight, None, [True, False, False])[0]


def in_heads(x: torch.Tensor, norm: torch.nn.RMSNorm, heads: int, turns: torch.Tensor | None, dtype: torch.dtype
             ) -> torch.Tensor:
    """RMSNorm over the width of all heads, then the rotary embedding: [B, L, D] -> [B, L, heads, D / heads].

    `turns` [1, L, 1, D / heads / 2] complex: what each pair of numbers is multiplied with; None turns nothing.
    """
    wide = x.float()
    scale = _rms_scale(wide, norm.eps)
    out = wide * norm.weight.float()
    if turns is None:
        return out.mul_(scale).to(dtype).unflatten(-1, (heads, -1))
    pairs = torch.view_as_complex(out.view(*x.shape[:-1], heads, -1, 2))
    pairs.mul_(turns * scale.unsqueeze(-1))
    return out.to(dtype).unflatten(-1, (heads, -1))


def in_heads_backward(gradient: torch.Tensor, x: torch.Tensor, norm: torch.nn.RMSNorm, turns: torch.Tensor | None,
                      dtype: torch.dtype) -> torch.Tensor:
    """The gradient for x, of `dtype`."""
    wide = x.float()
    scale = _rms_scale(wide, norm.eps)
    if turns is None:
        back = gradient.flatten(-2) * norm.weight.float()
    else:
        pairs = torch.view_as_complex(gradient.float().unflatten(-1, (-1, 2)).contiguous())
        back = torch.view_as_real(pairs * turns.conj()).flatten(-3).mul_(norm.weight.float())
    along = torch.linalg.vecdot(back, wide).unsqueeze(-1)
    back = back.mul_(scale).addcmul_(wide, along * scale.pow(3) / x.shape[-1], value=-1)
    return back.to(dtype)


def _rms_scale(wide: torch.Tensor, eps: float | None) -> torch.Tensor:
    """1 / root mean square over the last dimension, kept."""
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
    return mean_square.add_(torch.finfo(torch.float32).eps if eps is None else eps).rsqrt_()


class _Entry(torch.autograd.Function):
    """A tensor as the start of a graph that does not hold it: `anchor` is there to need a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Attention:
    """Attention of any back end with its graph, which keeps what its backward pass needs except q, k and v: these are
    handed to `backward` again.
    """

    def __init__(self, qkv: Sequence[torch.Tensor], attend: Callable[..., torch.Tensor]) -> None:
        self._again: list[torch.Tensor] = list(qkv)
        storages = [tensor.untyped_storage()._cdata for tensor in qkv]

        def pack(saved: torch.Tensor) -> object:
            for number, storage in enumerate(storages):
                if saved.untyped_storage()._cdata == storage and saved.dtype == qkv_dtype:
                    return number, saved.size(), saved.stride(), saved.storage_offset()
            return saved

        def unpack(kept: object) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            number, *where = cast("tuple[Any, ...]", kept)
            return self._again[number].as_strided(*where)

        qkv_dtype, anchor = qkv[0].dtype, torch.zeros((), requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            entries = [_entry(tensor, anchor) for tensor in qkv]
            self._edges = [torch.autograd.graph.get_gradient_edge(entry) for entry in entries]
            self._graph = attend(*entries)
        self.output = self._graph.detach().flatten(2)
        self._again = []

    def backward(self, gradient: torch.Tensor, qkv: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients for q, k and v, which are given again as they were. To be called once."""
        self._again = list(qkv)
        given = torch.autograd.grad(self._graph, self._edges, gradient.view_as(self._graph))
        self._again, self._graph = [], self._graph.detach()
        return given


_entry = cast("Callable[..., torch.Tensor]", _Entry.apply)


class BlockPass:
    """One call of one block: forward once, and backward at most once.

    x [B, L, D], text [B, L text, D] (behind image tokens, where the model has those), temb [B, 6, D] or a row for each
    token [B, L, 6, D], `rotary` (cos, sin) of diffusers. `keep` is one of KEEPS.
    """

    def __init__(self, block: WanTransformerBlock, keep: str, x: torch.Tensor, text: torch.Tensor, temb: torch.Tensor,
                 rotary: tuple[torch.Tensor, torch.Tensor], products: dict[str, list[Product]]) -> None:
        self.block, self.keep, self.x, self.text, self.temb = block, keep, x, text, temb
        device = x.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        self.group = {name: Products(own, self.dtype) for name, own in products.items()}
        cos, sin = rotary
        self.turns = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
        self.text_kv: list[torch.Tensor] | None = None
        self.q = self.k = self.v = self.x1 = self.q2 = self.x2 = self.inner = cast("torch.Tensor", None)
        self.attention: Attention | None = None

    # The arithmetic, in diffusers' order.

    def modulation(self, number: int) -> torch.Tensor:
        """shift, scale, gate of self-attention, then of the feed-forward; float32, broadcasts against x."""
        table = self.block.scale_shift_table
        if self.temb.ndim == 4:
            return table[:, number] + self.temb[:, :, number].float()
        return table[:, number: number + 1] + self.temb[:, number: number + 1].float()

    def norm1(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normed(self.x, self.block.norm1.eps, 1 + self.modulation(1), self.modulation(0), self.dtype)

    def norm2(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm = self.block.norm2
        if isinstance(norm, torch.nn.Identity):
            return self.x1.to(self.dtype), self.x1, self.x1
        return normed(self.x1, norm.eps, norm.weight, norm.bias, self.dtype)

    def norm3(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normed(self.x2, self.block.norm3.eps, 1 + self.modulation(4), self.modulation(3), self.dtype)

    def self_qkv(self) -> list[torch.Tensor]:
        """q, k and v as attention takes them, [B, L, heads, D / heads]."""
        own = self.block.attn1
        return [in_heads(self.q, own.norm_q, own.heads, self.turns, self.dtype),
                in_heads(self.k, own.norm_k, own.heads, self.turns, self.dtype), self.v.unflatten(-1, (own.heads, -1))]

    def cross_qkv(self) -> list[torch.Tensor]:
        """q, then k and v of the text, then of the image, where there is one."""
        own, (k, v, *image) = self.block.attn2, self.text_products()
        qkv = [in_heads(self.q2, own.norm_q, own.heads, None, self.dtype),
               in_heads(k, own.norm_k, own.heads, None, self.dtype), v.unflatten(-1, (own.heads, -1))]
        if image:
            qkv += [in_heads(image[0], own.norm_added_k, own.heads, None, self.dtype),
                    image[1].unflatten(-1, (own.heads, -1))]
        return qkv

    def text_products(self) -> list[torch.Tensor]:
        """Keys and values of the text, and of the image: computed once, and kept."""
        if self.text_kv is None:
            image, text = self.texts()
            self.text_kv = self.group["text"].forward(text)
            if "image" in self.group:
                self.text_kv += self.group["image"].forward(image)
        return self.text_kv

    def texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens and text tokens."""
        length = self.text.shape[1] - TEXT_LEN if "image" in self.group else 0
        text = self.text.to(self.dtype)
        return text[:, :length], text[:, length:]

    def attend(self, *qkv: torch.Tensor) -> torch.Tensor:
        return _attend(self.block.attn1, qkv, is_self=True)

    def attend_cross(self, *qkv: torch.Tensor) -> torch.Tensor:
        out = _attend(self.block.attn2, qkv[:3], is_self=False)
        return out + _attend(self.block.attn2, (qkv[0], *qkv[3:]), is_self=False) if len(qkv) > 3 else out

    def run(self, *, for_backward: bool, keeps_graph: bool) -> None:
        """Everything up to the feed-forward's inner values, from what is there already.

        `for_backward` leaves what the backward pass needs; `keeps_graph` what it needs of self-attention.
        """
        if self.q is None:
            self.q, self.k, self.v = self.group["qkv"].forward(self.norm1()[0])
        if self.x1 is None:
            if self.attention is None and (keeps_graph or for_backward):
                self.attention = Attention(self.self_qkv(), self.attend)
            attended = self.attention.output if self.attention else self.attend(*self.self_qkv()).flatten(2)
            if not for_backward:
                self.q = self.k = self.v = cast("torch.Tensor", None)
            out, = self.group["out"].forward(attended)
            del attended
            self.x1 = gated(self.x, out, self.modulation(2))
        if self.x2 is None:
            self.q2, = self.group["cross_q"].forward(self.norm2()[0])
            out, = self.group["cross_out"].forward(self.attend_cross(*self.cross_qkv()).flatten(2))
            if not for_backward:
                self.q2 = cast("torch.Tensor", None)
            self.x2 = self.x1 + out.to(self.x1.dtype)
            if not for_backward:
                self.x1 = cast("torch.Tensor", None)
        if self.inner is None:
            self.inner, = self.group["ffn_in"].forward(self.norm3()[0])

    def forward(self, *, has_backward: bool) -> torch.Tensor:
        """[B, L, D], in x's dtype."""
        self.run(for_backward=has_backward and self.keep == "all", keeps_graph=has_backward and self.keep != "inputs")
        out, = self.group["ffn_out"].forward(functional.gelu(self.inner, approximate="tanh"))
        result = gated(self.x2, out, self.modulation(5))
        if self.keep != "all":
            self.x1 = self.x2 = self.inner = cast("torch.Tensor", None)
            for name, group in self.group.items():
                if name not in ("text", "image"):
                    group.low = None
        return result

    # Its gradients.

    def backward(self, gradient: torch.Tensor, asks_x: bool, asks_text: bool, asks_temb: bool
                 ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients for x, text and temb, where asked for, and for down and up of each product in order of `group`."""
        self.run(for_backward=True, keeps_graph=True)
        adapted = {name for name, group in self.group.items() if group.downs is not None}
        asks_first = asks_x or asks_temb  # whether norm1's input matters
        asks_self = asks_first or "qkv" in adapted
        asks_x1 = asks_self or "out" in adapted
        asks_cross = asks_x1 or asks_text or bool(adapted & {"cross_q", "text", "image"})
        asks_x2 = asks_cross or "cross_out" in adapted
        self.weights: dict[str, list[torch.Tensor | None]] = {
            name: [None] * (2 * len(group.products)) for name, group in self.group.items()}
        self.modulations: dict[int, torch.Tensor] = {}
        text: torch.Tensor | None = None
        total = self.ffn_backward(gradient.float(), asks_x2, asks_temb)
        if asks_x2:
            total, text = self.cross_backward(total, asks_cross, asks_x1, asks_text)
        if asks_x1:
            total = self.self_backward(total, asks_self, asks_first, asks_temb)
        temb = torch.stack([self.modulations[n] for n in range(6)], dim=-2) if asks_temb else None
        if temb is not None and self.temb.ndim == 3:
            temb = temb.squeeze(1)
        return (total.to(self.x.dtype) if asks_x else None, text, temb if temb is None else temb.to(self.temb.dtype),
                [weight for own in self.weights.values() for weight in own])

    def ffn_backward(self, total: torch.Tensor, asks_x2: bool, asks_temb: bool) -> torch.Tensor:
        """From the gradient for the block's output to that for x2."""
        group, inner = self.group["ffn_out"], self.inner
        asks_norm = asks_x2 or asks_temb
        asks_inner = asks_norm or self.group["ffn_in"].downs is not None
        raised = functional.gelu(inner, approximate="tanh")
        if asks_temb:
            self.modulations[5] = self.summed(total * group.forward(raised)[0])
        given, self.weights["ffn_out"] = group.backward([(total * self.modulation(5)).to(self.dtype)], lambda: raised,
                                                        asks_inner)
        del raised
        self.inner = cast("torch.Tensor", None)
        if given is None:
            return total
        given = torch.ops.aten.gelu_backward(given, inner, approximate="tanh")
        del inner
        out, mean, rstd = self.norm3()
        given, self.weights["ffn_in"] = self.group["ffn_in"].backward([given], lambda: out, asks_norm)
        if given is None:
            return total
        del out
        if asks_temb:
            self.modulations[3], self.modulations[4] = self.of_norm(given, self.x2, mean, rstd)
        return total + normed_backward(given, self.x2, mean, rstd, 1 + self.modulation(4))

    def cross_backward(self, total: torch.Tensor, asks_cross: bool, asks_x1: bool, asks_text: bool
                       ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the gradient for x2 to those for x1 and for the text."""
        own, qkv = self.block.attn2, self.cross_qkv()
        self.x2 = cast("torch.Tensor", None)
        attention = Attention(qkv, self.attend_cross)
        given, self.weights["cross_out"] = self.group["cross_out"].backward([total.to(self.dtype)],
                                                                            lambda: attention.output, asks_cross)
        if given is None:
            return total, None
        q_given, *kv_given = attention.backward(given, qkv)
        del qkv, attention, given
        text = self.text_backward(kv_given, asks_text)
        q_given = in_heads_backward(q_given, self.q2, own.norm_q, None, self.dtype)
        self.q2 = cast("torch.Tensor", None)
        out, mean, rstd = self.norm2()
        given, self.weights["cross_q"] = self.group["cross_q"].backward([q_given], lambda: out, asks_x1)
        if given is None:
            return total, text
        if isinstance(self.block.norm2, torch.nn.Identity):
            return total + given, text
        return total + normed_backward(given, self.x1, mean, rstd, self.block.norm2.weight), text

    def text_backward(self, gradients: Sequence[torch.Tensor], asks_text: bool) -> torch.Tensor | None:
        """From the gradients for keys and values of the text, and of the image, to that for both."""
        own, parts, found = self.block.attn2, dict(zip(("image", "text"), self.texts(), strict=True)), []
        for number, (name, norm) in enumerate((("text", own.norm_k), ("image", getattr(own, "norm_added_k", None)))):
            if name not in self.group:
                continue
            group, (key, value) = self.group[name], gradients[2 * number: 2 * number + 2]
            if not asks_text and group.downs is None:
                continue
            key = in_heads_backward(key, self.text_products()[2 * number], norm, None, self.dtype)
            given, self.weights[name] = group.backward([key, value.flatten(2)], parts[name].clone, asks_text)
            found.append(given)
        return torch.cat([given for given in reversed(found) if given is not None], 1).to(self.text.dtype) \
            if asks_text else None

    def self_backward(self, total: torch.Tensor, asks_self: bool, asks_first: bool, asks_temb: bool) -> torch.Tensor:
        """From the gradient for x1 to that for x."""
        own, attention, group = self.block.attn1, self.attention, self.group["out"]
        assert attention is not None, "run has made it"
        if asks_temb:
            self.modulations[2] = self.summed(total * group.forward(attention.output)[0])
        given, self.weights["out"] = group.backward([(total * self.modulation(2)).to(self.dtype)],
                                                    lambda: attention.output, asks_self)
        if given is None:
            return total
        q, k, v = attention.backward(given, self.self_qkv())
        self.attention = None
        q = in_heads_backward(q, self.q, own.norm_q, self.turns, self.dtype)
        k = in_heads_backward(k, self.k, own.norm_k, self.turns, self.dtype)
        self.q = self.k = self.v = cast("torch.Tensor", None)
        out, mean, rstd = self.norm1()
        given, self.weights["qkv"] = self.group["qkv"].backward([q, k, v.flatten(2)], lambda: out, asks_first)
        if given is None:
            return total
        if asks_temb:
            self.modulations[0], self.modulations[1] = self.of_norm(given, self.x, mean, rstd)
        return total + normed_backward(given, self.x, mean, rstd, 1 + self.modulation(1))

    def of_norm(self, given: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for shift and scale from that for what they gave."""
        given = given.float()
        return self.summed(given), self.summed(given * ((x.float() - mean) * rstd))

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Over the tokens that one row of temb serves."""
        return gradient if self.temb.ndim == 4 else gradient.sum(1, keepdim=True)


def gated(x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + out * gate, computed in float32, in x's dtype."""
    return torch.addcmul(x.float(), out.float(), gate).to(x.dtype)


def _attend(own: WanAttention, qkv: Sequence[torch.Tensor], *, is_self: bool) -> torch.Tensor:
    """Attention [B, L, heads, D / heads] of the back end that diffusers uses, over all processes that share tokens."""
    processor, mask = own.processor, None
    if isinstance(processor, ShortText) and not is_self:
        mask = processor.bias_L.to(qkv[0].dtype).view(1, 1, 1, -1)
    return cast("torch.Tensor", dispatch_attention_fn(
        *qkv, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=processor._attention_backend,
        parallel_config=processor._parallel_config if is_self else None))


class _BlockFunction(torch.autograd.Function):
    """A BlockPass for autograd. The last arguments are down and up of each product, which it reads itself."""

    @staticmethod
    def forward(ctx: Any, own: BlockPass, x: torch.Tensor, text: torch.Tensor, temb: torch.Tensor,
                *weights: torch.Tensor | None) -> torch.Tensor:
        ctx.own = own
        with torch.autocast(x.device.type, enabled=False):
            return own.forward(has_backward=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own, ctx.own = ctx.own, None
        assert own is not None, "a block's backward pass runs once"
        with torch.autocast(gradients[0].device.type, enabled=False):
            x, text, temb, weights = own.backward(gradients[0], *ctx.needs_input_grad[1:4])
        return None, x, text, temb, *weights


_block_function = cast("Callable[..., torch.Tensor]", _BlockFunction.apply)

LAYERS = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "out": ("attn1.to_out.0",), "cross_q": ("attn2.to_q",),
    "text": ("attn2.to_k", "attn2.to_v"), "image": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "cross_out": ("attn2.to_out.0",), "ffn_in": ("ffn.net.0.proj",), "ffn_out": ("ffn.net.2",),
}
"""The Linears of a block in groups of one input."""


def products_of(block: torch.nn.Module) -> dict[str, list[Product]] | None:
    """The block's Linears by group; None where one has an adapter of another kind than a LoRA."""
    found: dict[str, list[Product]] = {}
    for group, names in LAYERS.items():
        if group == "image" and block.attn2.add_k_proj is None:
            continue
        products = [product_of(block.get_submodule(name)) for name in names]
        if None in products:
            return None
        found[group] = cast("list[Product]", products)
    return found


def compute(block: torch.nn.Module, keep: str, x: torch.Tensor, text: torch.Tensor, temb: torch.Tensor,
            rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What the block answers, [B, L, D]; see BlockPass."""
    products = products_of(block)
    assert products is not None, "train_blocks has looked"
    own = BlockPass(block, keep, x, text, temb, rotary, products)
    weights = [half for group in products.values() for p in group for half in (p.down, p.up)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, text, temb, *weights)):
        return _block_function(own, x, text, temb, *weights)
    with torch.autocast(x.device.type, enabled=False):
        return own.forward(has_backward=False)


def train_blocks(transformer: torch.nn.Module, keeps: Sequence[str]) -> None:
    """From now on the transformer's blocks compute so, each keeping what `keeps` says (one of KEEPS a block)."""
    for block, keep in zip(transformer.blocks, keeps, strict=True):
        def forward(self: torch.nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
                    temb: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor], *, keep: str = keep
                    ) -> torch.Tensor:
            return compute(self, keep, hidden_states, encoder_hidden_states, temb, rotary_emb)

        block.forward = types.MethodType(forward, block)
