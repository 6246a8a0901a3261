"""The shape of a Stable Diffusion pipeline with everything the real one has, in small."""

from __future__ import annotations

from mii_serve.models.families import SD_V1_4, PipelineShape

TINY = PipelineShape(
    unet={
        **SD_V1_4.unet,
        "sample_size": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    },
    vae={**SD_V1_4.vae, "block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1},
    text_encoder={
        **SD_V1_4.text_encoder,
        "vocab_size": 200,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    safety_vision={
        **SD_V1_4.safety_vision,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "projection_dim": 8,
    },
    scheduler=SD_V1_4.scheduler,
)
