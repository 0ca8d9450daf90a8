"""Which defects each stage of the chain goes around with code or flags of its own; what it patches it names itself.

For receipts: `qat.patches.registry.avoided(*AROUND["export"])`.
"""

from __future__ import annotations

AROUND: dict[str, tuple[str, ...]] = {
    # Conversations are rendered turn by turn, arguments parsed before.
    "data": (
        "chat_template_assistant_mask",
        "chat_template_html_quotes",
        "chat_template_string_arguments",
        "chat_template_think_supervision",
    ),
    # Tensors and configuration are copied from the base or packed by our own arithmetic; no library saves anything.
    "export": (
        "modelopt_amax_shared_late",
        "modelopt_architectures_none",
        "modelopt_name_sentinel",
        "nemotron_h_layer_pattern",
        "nemotron_h_mtp_dropped",
        "peft_merge_rounding",
        "transformers_backbone_rename",
        "transformers_float_tags",
        "transformers_quantized_moe_save",
        "transformers_tokenizer_class",
    ),
    # Flags of the server and the plugin in vLLM's environment.
    "serve/cpu": (
        "vllm_cpu_mamba_prefix_caching",
        "vllm_cpu_nvfp4_experts",
        "vllm_cpu_nvfp4_linear",
        "vllm_cpu_seeded_chunked_prefill",
        "vllm_cpu_ungated_experts",
        "vllm_nemotron_h_expert_lora",
    ),
    "serve/cuda": ("vllm_nemotron_h_expert_lora", "vllm_nvfp4_moe_backend"),
}
"""Stage (for serving, with the device) -> names of defects."""
