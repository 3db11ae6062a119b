"""Wan's transformer block as a LoRA training runs it: diffusers' arithmetic, with a backward pass of its own.

Autograd over diffusers' block and PEFT's layers keeps about 27 tensors of tokens x width a block. The gradient of a
LoRA over frozen weights needs fewer: frozen Linears need no input, q, k and v share one, and norms, modulation, rotary
embedding, GELU and cross-attention are cheap to compute again. What a block keeps between its forward and its backward
pass is one of `KEEPS`; what it does not keep, the backward pass computes again with the same operations, so all give
equal numbers.

Modules, names and weights stay diffusers' own. Nothing is computed that no adapted layer needs.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.nn import functional

from wantrain.models.block_operations import EAGER, Attention, Operations, split
from wantrain.models.driven import WanDrivenTransformer3DModel
from wantrain.models.offload import Offload, Parcel
from wantrain.models.products import Product, Products, product_of
from wantrain.models.quantised import QuantisedLinear
from wantrain.models.short_text import ShortText
from wantrain.models.swap import Swap, spread
from wantrain.terms import TEXT_LEN

KEEPS = ("all", "attention", "inputs")
"""all: whatever a matrix product or self-attention computed, up to the feed-forward's inner values. attention: the
block's input and what self-attention answered. inputs: the block's input."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What a block is given: x [B, L, D]; text [B, L text, D], behind image tokens where the model has those; temb
    [B, 6, D], or a row for each token [B, L, 6, D]; and `turns` of Turns.
    """

    x: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    turns: torch.Tensor


@dataclass(frozen=True, slots=True)
class Policy:
    """What a block keeps for its backward pass, one of KEEPS, and what takes that to the host meanwhile, if it goes
    there. Where its weights wait in host memory: what brings them, and its number among those blocks. `operations`
    compute what is no matrix product.
    """

    keep: str
    operations: Operations = EAGER
    offload: Offload | None = None
    swap: Swap | None = None
    number: int = 0

    def acquire(self, step: int) -> None:
        """The block's weights are there for what follows, going forward (1) or backward (-1)."""
        if self.swap is not None:
            self.swap.acquire(self.number, step)


_KEPT = ("x", "q", "k", "v", "x1", "q2", "x2", "inner")


class BlockPass:
    """One call of one block: forward once, and backward at most once."""

    def __init__(self, block: Any, policy: Policy, given: BlockInputs, products: dict[str, list[Product]]) -> None:
        self.block, self.policy, self.does = block, policy, policy.operations
        self.x, self.text, self.temb, self.turns = given.x, given.text, given.temb, given.turns
        device = self.x.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.x.dtype
        self.group = {name: Products(own, self.dtype) for name, own in products.items()}
        self.text_kv: list[torch.Tensor] | None = None
        self.scales: dict[str, torch.Tensor] = {}
        self.q = self.k = self.v = self.x1 = self.q2 = self.x2 = self.inner = cast("torch.Tensor", None)
        self.attention: Attention | None = None
        self.taken: list[str] = []
        self.parcel: Parcel | None = None

    # The arithmetic, in diffusers' order.

    def modulation(self, number: int) -> torch.Tensor:
        """shift, scale, gate of self-attention, then of the feed-forward; float32, broadcasts against x."""
        table = self.block.scale_shift_table
        if self.temb.ndim == 4:
            return table[:, number] + self.temb[:, :, number].float()
        return table[:, number: number + 1] + self.temb[:, number: number + 1].float()

    def norm1(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.does.normed(self.x, self.block.norm1.eps, 1 + self.modulation(1), self.modulation(0), self.dtype)

    def norm2(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm = self.block.norm2
        if isinstance(norm, torch.nn.Identity):
            return self.x1.to(self.dtype), self.x1, self.x1
        return self.does.normed(self.x1, norm.eps, norm.weight.float(), norm.bias.float(), self.dtype)

    def norm3(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.does.normed(self.x2, self.block.norm3.eps, 1 + self.modulation(4), self.modulation(3), self.dtype)

    def self_qkv(self) -> list[torch.Tensor]:
        """q, k and v as attention takes them, [B, L, heads, D / heads]."""
        own = self.block.attn1
        return [self.heads("q", self.q, own.norm_q, self.turns), self.heads("k", self.k, own.norm_k, self.turns),
                split(self.v, own.heads)]

    def heads(self, name: str, x: torch.Tensor, norm: torch.nn.RMSNorm, turns: torch.Tensor | None = None
              ) -> torch.Tensor:
        """A query or key as attention takes it; the scale of its norm, a number a token, is kept under this name."""
        if name not in self.scales:
            self.scales[name] = self.does.rms_scale(x, norm.eps)
        return self.does.in_heads(x, self.scales[name], norm.weight, turns, self.block.attn1.heads)

    def cross_qkv(self) -> list[torch.Tensor]:
        """q, then k and v of the text, then of the image, where there is one."""
        own, (k, v, *image) = self.block.attn2, self.text_products()
        qkv = [self.heads("q2", self.q2, own.norm_q), self.heads("text", k, own.norm_k), split(v, own.heads)]
        if image:
            qkv += [self.heads("image", image[0], own.norm_added_k), split(image[1], own.heads)]
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
            self.x1 = self.does.gated(self.x, out, self.modulation(2))
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
        self.policy.acquire(1)
        keep = self.policy.keep
        self.run(for_backward=has_backward and keep == "all", keeps_graph=has_backward and keep != "inputs")
        out, = self.group["ffn_out"].forward(functional.gelu(self.inner, approximate="tanh"))
        result = self.does.gated(self.x2, out, self.modulation(5))
        if keep != "all":
            self.x1 = self.x2 = self.inner = cast("torch.Tensor", None)
        for group in self.group.values():
            group.low = None
        if has_backward and self.policy.offload is not None:
            self.parcel = self.policy.offload.send(self.take())
        return result

    def take(self) -> list[torch.Tensor]:
        """All that is kept, which is forgotten here."""
        self.taken = [name for name in _KEPT if getattr(self, name) is not None]
        tensors = [getattr(self, name) for name in self.taken]
        for name in self.taken:
            setattr(self, name, None)
        if self.attention is not None:
            tensors += [self.attention.output, *self.attention.kept]
            self.attention.output, self.attention.kept = cast("torch.Tensor", None), []
        return tensors

    def give_back(self, tensors: Sequence[torch.Tensor]) -> None:
        """What `take` gave."""
        for name, tensor in zip(self.taken, tensors, strict=False):
            setattr(self, name, tensor)
        if self.attention is not None:
            self.attention.output, *self.attention.kept = tensors[len(self.taken):]

    # Its gradients.

    def backward(self, gradient: torch.Tensor, asks_x: bool, asks_text: bool, asks_temb: bool
                 ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients for x, text and temb, where asked for, and for down and up of each product in order of `group`."""
        self.policy.acquire(-1)
        if self.policy.offload is not None and self.parcel is not None:
            self.give_back(self.policy.offload.fetch(self.parcel))
        self.run(for_backward=True, keeps_graph=True)
        adapted = {name for name, group in self.group.items() if group.is_adapted}
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
        group = self.group["ffn_out"]
        asks_norm = asks_x2 or asks_temb
        asks_inner = asks_norm or self.group["ffn_in"].is_adapted
        gradients = [(total * self.modulation(5)).to(self.dtype)]
        low_gradient = group.low_gradient(gradients)
        given = group.input_gradient(gradients, low_gradient) if asks_inner else None
        if given is None:
            raised = functional.gelu(self.inner, approximate="tanh")
        else:
            raised, given = self.does.gelu_backward(self.inner, given)
        self.inner = cast("torch.Tensor", None)
        if asks_temb:
            self.modulations[5] = self.summed(total * group.forward(raised)[0])
        self.weights["ffn_out"] = group.weight_gradients(gradients, low_gradient, raised)
        del raised, gradients, low_gradient
        if given is None:
            return total
        out, mean, rstd = self.norm3()
        given, self.weights["ffn_in"] = self.group["ffn_in"].backward([given], out, asks_norm)
        if given is None:
            return total
        del out
        if asks_temb:
            self.modulations[3], self.modulations[4] = self.of_norm(given, self.x2, mean, rstd)
        return self.does.normed_backward(given, self.x2, mean, rstd, 1 + self.modulation(4)).add_(total)

    def cross_backward(self, total: torch.Tensor, asks_cross: bool, asks_x1: bool, asks_text: bool
                       ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the gradient for x2 to those for x1 and for the text."""
        own, qkv = self.block.attn2, self.cross_qkv()
        self.x2 = cast("torch.Tensor", None)
        attention = Attention(qkv, self.attend_cross)
        given, self.weights["cross_out"] = self.group["cross_out"].backward([total.to(self.dtype)],
                                                                            attention.output, asks_cross)
        if given is None:
            return total, None
        q_given, *kv_given = attention.backward(given, qkv)
        del qkv, attention, given
        text = self.text_backward(kv_given, asks_text)
        q_given = self.does.in_heads_backward(q_given, self.q2, self.scales["q2"], own.norm_q.weight, None)
        self.q2 = cast("torch.Tensor", None)
        out, mean, rstd = self.norm2()
        given, self.weights["cross_q"] = self.group["cross_q"].backward([q_given], out, asks_x1)
        if given is None:
            return total, text
        if isinstance(self.block.norm2, torch.nn.Identity):
            return total + given, text
        return self.does.normed_backward(given, self.x1, mean, rstd, self.block.norm2.weight.float()).add_(total), text

    def text_backward(self, gradients: Sequence[torch.Tensor], asks_text: bool) -> torch.Tensor | None:
        """From the gradients for keys and values of the text, and of the image, to that for both."""
        own, (image, text), found = self.block.attn2, self.texts(), []
        parts = [("text", own.norm_k, text)]
        if "image" in self.group:
            parts.append(("image", own.norm_added_k, image))
        for number, (name, norm, part) in enumerate(parts):
            group, (key, value) = self.group[name], gradients[2 * number: 2 * number + 2]
            if asks_text or group.is_adapted:
                product = self.text_products()[2 * number]
                key = self.does.in_heads_backward(key, product, self.scales[name], norm.weight, None)
                given, self.weights[name] = group.backward([key, value.flatten(2)], part, asks_text)
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
                                                    attention.output, asks_self)
        if given is None:
            return total
        q, k, v = attention.backward(given, self.self_qkv())
        self.attention = None
        q = self.does.in_heads_backward(q, self.q, self.scales["q"], own.norm_q.weight, self.turns)
        k = self.does.in_heads_backward(k, self.k, self.scales["k"], own.norm_k.weight, self.turns)
        self.q = self.k = self.v = cast("torch.Tensor", None)
        out, mean, rstd = self.norm1()
        given, self.weights["qkv"] = self.group["qkv"].backward([q, k, v.flatten(2)], out, asks_first)
        if given is None:
            return total
        if asks_temb:
            self.modulations[0], self.modulations[1] = self.of_norm(given, self.x, mean, rstd)
        return self.does.normed_backward(given, self.x, mean, rstd, 1 + self.modulation(1)).add_(total)

    def of_norm(self, given: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for shift and scale from that for what they gave."""
        given = given.float()
        return self.summed(given), self.summed(given * ((x.float() - mean) * rstd))

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Over the tokens that one row of temb serves."""
        return gradient if self.temb.ndim == 4 else gradient.sum(1, keepdim=True)


def _attend(own: Any, qkv: Sequence[torch.Tensor], *, is_self: bool) -> torch.Tensor:
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


def products_of(block: Any) -> dict[str, list[Product]] | None:
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


class Turns:
    """What rotary embedding multiplies pairs of numbers with, made once for all blocks of a call."""

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._turns = torch.empty(0)

    def of(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """diffusers' (cos, sin), each [1, L, 1, D / heads] with every number twice -> complex [1, L, 1, D / heads / 2].
        """
        cos, sin = rotary
        if cos is not self._cos:
            self._cos, self._turns = cos, torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
        return self._turns


def compute(block: Any, policy: Policy, given: BlockInputs) -> torch.Tensor:
    """What the block answers, [B, L, D]; see BlockPass."""
    products = products_of(block)
    assert products is not None, "train_blocks has looked"
    own = BlockPass(block, policy, given, products)
    weights = [half for group in products.values() for p in group for half in (p.down, p.up)]
    inputs = (given.x, given.text, given.temb)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *weights)):
        return _block_function(own, *inputs, *weights)
    with torch.autocast(given.x.device.type, enabled=False):
        return own.forward(has_backward=False)


def can_train(transformer: Any) -> bool:
    """Whether the blocks are plain ones and their adapters LoRAs, which this backward pass knows."""
    return not isinstance(transformer, WanDrivenTransformer3DModel) and all(
        products_of(block) is not None for block in blocks_of(transformer))


def blocks_of(transformer: Any) -> list[Any]:
    """The blocks in the order in which they run: VACE's own come first."""
    return [*getattr(transformer, "vace_blocks", ()), *transformer.blocks]


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """How the blocks of a transformer save memory: what each keeps for its backward pass (of KEEPS; one for all, or one
    a block in the order of blocks_of), of how many the weights wait in host memory, whether what is kept does too, and
    whether the weights on the host are the mapped file's.
    """

    keep: str | tuple[str, ...] = "all"
    swap: int = 0
    offload: bool = False
    mapped: bool = False


def train_blocks(transformer: Any, memory: BlockMemory, device: torch.device, operations: Operations = EAGER
                 ) -> Swap | None:
    """From now on the transformer's blocks compute so, with these operations. Where weights wait in host memory, all
    others are moved to `device`, and what brings those is returned.
    """
    turns, blocks = Turns(), blocks_of(transformer)
    swapped = spread(len(blocks), memory.swap)
    swap = swap_weights(transformer, [blocks[i] for i in swapped], device, memory.mapped) if swapped else None
    offload = Offload(device) if memory.offload else None
    keeps = (memory.keep,) * len(blocks) if isinstance(memory.keep, str) else memory.keep
    policies = {id(block): Policy(keep, operations, offload, *((swap, swapped.index(i)) if i in swapped else ()))
                for i, (block, keep) in enumerate(zip(blocks, keeps, strict=True))}

    def plain(self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
              rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        given = BlockInputs(hidden_states, encoder_hidden_states, temb, turns.of(rotary_emb))
        return compute(self, policies[id(self)], given)

    def vace(self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
             control_hidden_states: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        """diffusers' WanVACETransformerBlock: a block between two projections, for the control's own stream."""
        if self.proj_in is not None:
            control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
        control = plain(self, control_hidden_states, encoder_hidden_states, *rest)
        return None if self.proj_out is None else self.proj_out(control), control

    for block in blocks:
        block.forward = types.MethodType(vace if hasattr(block, "proj_in") else plain, block)
    return swap


def swap_weights(transformer: Any, blocks: Sequence[Any], device: torch.device, mapped: bool) -> Swap:
    """Put the large weights of these blocks into host memory, unless they stay mapped, and all others on the device."""
    weights = [frozen_weights(block) for block in blocks]
    swapped = {id(tensor) for own in weights for tensor in own}
    swap = Swap(weights, device, mapped=mapped)
    tensors = dict(itertools.chain(transformer.named_parameters(), transformer.named_buffers()))
    for tensor in tensors.values():
        if id(tensor) not in swapped:
            tensor.data = tensor.data.to(device)
    # DDP would send them from the first process to all, from where they are not.
    transformer._ddp_params_and_buffers_to_ignore = [name for name, t in tensors.items() if id(t) in swapped]
    return swap


def frozen_weights(block: Any) -> list[torch.Tensor]:
    """What of a block is large: the weights of its Linears, and the scales of those that are stored in a byte."""
    found: list[torch.Tensor] = []
    for p in itertools.chain.from_iterable((products_of(block) or {}).values()):
        found += [p.linear.weight, *([p.linear.scale] if isinstance(p.linear, QuantisedLinear) else [])]
    return found
