"""Named shapes of the Prismatic VLM: `nano` trains on a laptop's CPU, `openvla_7b` is the published model."""

import dataclasses

from vla_oft.vlm import llama, prismatic, tokens, vit

LLAMA2_TOKENS = tokens.Config(bos=1, stop=2, pad=32000, empty=29871, num_tokens=32000)


def nano(token_ids: tokens.Config) -> prismatic.Config:
    """About 3 M parameters: 64-px cameras in 8-px patches, towers 96 wide, decoder 160 wide, FiLM."""
    siglip = vit.Config(image_size=64, patch_size=8, width=96, depth=5, num_heads=3, mlp_dim=288)
    return prismatic.Config(
        dino=dataclasses.replace(siglip, num_registers=4, class_token=True, layer_scale=True),
        siglip=siglip,
        llm=llama.Config(vocab_size=token_ids.num_tokens, width=160, depth=4, num_heads=4, num_kv_heads=4, mlp_dim=448),
        tokens=token_ids,
        film=True,
    )


def openvla_7b(*, film: bool, unread_weights: bool = True) -> prismatic.Config:
    """DINOv2-L with registers, SigLIP-SO400M, Llama-2-7B; 224-px images in 14-px patches."""
    return prismatic.Config(
        dino=vit.Config(
            image_size=224,
            patch_size=14,
            width=1024,
            depth=24,
            num_heads=16,
            mlp_dim=4096,
            num_registers=4,
            class_token=True,
            layer_scale=True,
            unread_weights=unread_weights,
        ),
        siglip=vit.Config(
            image_size=224,
            patch_size=14,
            width=1152,
            depth=27,
            num_heads=16,
            mlp_dim=4304,
            attention_pool=True,
            unread_weights=unread_weights,
        ),
        llm=llama.Config(vocab_size=32064, width=4096, depth=32, num_heads=32, num_kv_heads=32, mlp_dim=11008),
        tokens=LLAMA2_TOKENS,
        film=film,
    )
