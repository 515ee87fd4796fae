"""Tiny Transformers checkpoints of families whose stored keys differ from the network's own."""

import networks
import torch
import transformers

EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def text(name, architecture, **more):
    config = getattr(transformers, f"{name}Config")
    return config(**networks.TEXT, use_cache=False, architectures=[architecture], **more)


CONFIGS = {
    "vit": networks.vit_config,
    "gpt2": networks.gpt2_config,
    "neox": lambda: text("GPTNeoX", "GPTNeoXForCausalLM"),
    "mixtral": lambda: text("Mixtral", "MixtralForCausalLM", **EXPERTS),
    "deepseek": lambda: text("DeepseekV3", "DeepseekV3ForCausalLM", **DEEPSEEK),
    "llama": networks.llama_config,
    "llama_tied": lambda: text("Llama", "LlamaForCausalLM", tie_word_embeddings=True),
    "bert": networks.bert_config,
}


def model_class(config):
    return getattr(transformers, config.architectures[0])


def save(name, folder, *, dtype=torch.float32, **options):
    """Writes a checkpoint with random weights of every size, norms and biases too; returns its configuration."""
    config = CONFIGS[name]()
    torch.manual_seed(3)
    model = model_class(config)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, **options)
    return config
