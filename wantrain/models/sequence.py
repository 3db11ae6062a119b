"""One sample's tokens on several processes, for clips too long for one: diffusers' context parallelism, in training.

Each process of a group has its part of the tokens. For self-attention (Ulysses: Jacobs et al. 2023) they exchange them
for all tokens of a part of the heads, and exchange back. Of what diffusers has, only this has a backward pass with the
attention that every device has; what was tried, and with what numbers, is in docs/sequence-parallel.md.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from typing import Any

import torch
from diffusers import ContextParallelConfig, ParallelConfig, WanTransformer3DModel
from diffusers.hooks import apply_context_parallel
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.attention_dispatch import TemplatedUlyssesAttention
from torch.distributed.device_mesh import init_device_mesh

from wantrain.models.variants import Variant
from wantrain.terms import UserError

KEY = "train.sequence_parallel"

_PLAIN = WanTransformer3DModel._cp_plan
_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
PLANS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": _PLAIN,
    # Later vace_blocks get the first one's output, already a part; of hidden_states only the first reads anything.
    "WanVACETransformer3DModel": {**_PLAIN, "vace_blocks.0": {"hidden_states": _TOKENS,
                                                              "control_hidden_states": _TOKENS}},
}
"""Where diffusers' hooks divide tokens and join them again, by transformer class. diffusers has no plan for Animate."""


class InOnePrecision(TemplatedUlyssesAttention):  # type: ignore[misc]
    """diffusers' exchange and attention, on q, k and v in the dtype that autocast gives its attention anyway.

    Its backward pass calls attention again, where autocast is off; a GPU's autocast leaves q and k in float32 (after
    their norms) and v in bfloat16, which attention refuses. It also halves what is sent.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        """query, key, value [B, tokens here, heads, D] -> [B, tokens here, heads, D]."""
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return TemplatedUlyssesAttention.forward(ctx, query, key, value, *rest)


def check(variant: Variant, num_parts: int, num_tokens: Collection[int]) -> None:
    """Raise UserError where tokens of this variant, in clips of these lengths, cannot be shared by so many processes.
    """
    if variant.transformer_class not in PLANS:
        raise UserError(f"{KEY} = {num_parts}: diffusers cannot divide the tokens of {variant.name} "
                        f"({variant.transformer_class}). Allowed: 1", f"set {KEY}=1 and "
                        "memory.keep=inputs, or data.max_tokens_per_clip")
    heads = variant.architecture.num_heads
    if heads % num_parts:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{KEY} = {num_parts} does not divide the {heads} attention heads of {variant.name}. Allowed: "
                        f"{allowed}", f"set {KEY} to one of them")
    if uneven := sorted(n for n in num_tokens if n % num_parts):
        raise UserError(f"{KEY} = {num_parts} does not divide clips of {', '.join(map(str, uneven))} tokens (latent "
                        f"frames x height / {variant.multiple_px} x width / {variant.multiple_px})",
                        "choose data.resolutions of which the product is a multiple of it: wantrain check lists tokens")
    backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value
    if backend != "native":
        raise UserError(f"{KEY} = {num_parts}: DIFFUSERS_ATTN_BACKEND = {backend}. Allowed: native, the only one that "
                        "was tested so", "unset DIFFUSERS_ATTN_BACKEND")


def share_tokens(transformer: torch.nn.Module, num_parts: int) -> None:
    """From now on `num_parts` processes of consecutive index compute each call together, with equal arguments.

    All get the whole output. Gradients are right as an engine leaves them that averages over all processes: each has
    the part of its tokens, so those of a group have to be added, and its output's gradient is multiplied by num_parts.
    Call it after the adapter is in place, in every process, with the process group started; see `check`.
    """
    _quiet()
    attention_dispatch.TemplatedUlyssesAttention = InOnePrecision
    num_processes, device = torch.distributed.get_world_size(), next(transformer.parameters()).device
    mesh = init_device_mesh(device.type, (num_processes // num_parts, 1, num_parts),
                            mesh_dim_names=("data", "ring", "ulysses"))
    context = ContextParallelConfig(ulysses_degree=num_parts, mesh=mesh)
    # What transformer.enable_parallelism does, which divides by the number of accelerators: there is none on a CPU.
    config = ParallelConfig(context_parallel_config=context)
    config.setup(torch.distributed.get_rank(), num_processes, device, mesh=mesh)
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(transformer, context, PLANS[type(transformer).__name__])

    def add_up(_: torch.nn.Module, __: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * num_parts)

    transformer.register_forward_hook(add_up)


def _quiet() -> None:
    """diffusers says at the first call that one timestep a sample is not divided (it need not be), and calls a
    collective by a name that torch deprecates.
    """
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*all_gather_tensor. is deprecated", category=FutureWarning)
