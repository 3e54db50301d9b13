//! axolotl's keys without counterpart: those without effect on the training, and those that are rejected.
//!
//! Names and meanings follow axolotl 0.18's `utils/schemas`.

use super::super::value::Value;

/// Keys that do not change the training here: speed, devices, kernels, reports.
const WITHOUT_EFFECT: &[&str] = &[
    "accelerator_config",
    "activation_offloading",
    "attn_implementation",
    "auto_find_batch_size",
    "axolotl_config_path",
    "batch_flattening",
    "bench_dataset",
    "bench_split",
    "bnb_config_kwargs",
    "chunked_cross_entropy",
    "chunked_cross_entropy_num_chunks",
    "context_parallel_size",
    "cut_cross_entropy",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataset_keep_in_memory",
    "dataset_num_proc",
    "dataset_prepared_path",
    "dataset_processes",
    "ddp",
    "debug",
    "deepcompile",
    "deepspeed",
    "device",
    "device_map",
    "do_bench_eval",
    "do_causal_lm_eval",
    "dp_replicate_size",
    "dp_shard_size",
    "eager_attention",
    "embeddings_skip_upcast",
    "eval_batch_size",
    "eval_causal_lm_metrics",
    "eval_max_new_tokens",
    "eval_sample_packing",
    "eval_table_size",
    "experimental_skip_move_to_device",
    "flash_attention",
    "flash_optimum",
    "flex_attention",
    "flex_attn_compile_kwargs",
    "fsdp",
    "fused_attn_kernel",
    "gc_collect_steps",
    "gc_steps",
    "gpu_memory_limit",
    "gradient_checkpointing_kwargs",
    "heads_k_stride",
    "hf_mlflow_log_artifacts",
    "hf_use_auth_token",
    "include_tkps",
    "include_tokens_per_second",
    "is_falcon_derived_model",
    "is_llama_derived_model",
    "is_mistral_derived_model",
    "is_qwen_derived_model",
    "large_head_attention",
    "layer_offloading",
    "local_rank",
    "logging_steps",
    "lora_embedding_kernel",
    "lora_mlp_kernel",
    "lora_o_kernel",
    "lora_on_cpu",
    "lora_qkv_kernel",
    "loraplus_lr_embedding",
    "loss_watchdog_patience",
    "loss_watchdog_threshold",
    "low_cpu_mem_usage",
    "max_memory",
    "mean_resizing_embeddings",
    "merge_lora",
    "merge_method",
    "model_type",
    "multipack_real_batches",
    "num_dataset_shards_to_save",
    "pad_to_multiple_of",
    "pad_to_sequence_len",
    "push_dataset_to_hub",
    "qlora_sharded_model_loading",
    "remove_unused_columns",
    "resources_per_worker",
    "ring_attn_func",
    "sample_packing_bin_size",
    "sample_packing_eff_est",
    "sample_packing_group_size",
    "sample_packing_mp_start_method",
    "sample_packing_sequentially",
    "save_first_step",
    "save_only_model",
    "save_safetensors",
    "sdp_attention",
    "sdpa_varlen",
    "selective_checkpointing",
    "sequence_parallel_degree",
    "shuffle_before_merging_datasets",
    "shuffle_merged_datasets",
    "strict",
    "tensor_parallel_size",
    "tiled_mlp",
    "tiled_mlp_num_shards",
    "tiled_mlp_use_original_mlp",
    "tokenizer_legacy",
    "tokenizer_save_jinja_files",
    "tokenizer_type",
    "tokenizer_use_fast",
    "torch_empty_cache_steps",
    "trust_remote_code",
    "type_of_model",
    "use_comet",
    "use_mlflow",
    "use_otel_metrics",
    "use_ray",
    "use_tensorboard",
    "use_trackio",
    "use_wandb",
    "world_size",
    "xformers_attention",
];

/// Prefixes of further such keys.
const WITHOUT_EFFECT_FAMILIES: &[&str] = &[
    "bnb_4bit_",
    "comet_",
    "ddp_",
    "flash_attn_",
    "fsdp_",
    "generate_samples",
    "generation_",
    "gradio_",
    "hub_",
    "liger_",
    "mlflow_",
    "num_generation_samples",
    "otel_",
    "profiler_",
    "ray_",
    "torch_compile",
    "trackio_",
    "wandb_",
];

const TAKE_OUT: &str = "changes the training and is not supported here; remove it";
const MODEL_FILES: &str = "changes the model's tokenizer; set it in the model folder's tokenizer_config.json and remove \
    it here";
const PREFERENCES: &str =
    "this trainer trains on answers, not on preferences or rewards; remove it, or use axolotl";

/// Keys that are rejected unless they are off, each with a remedy.
const REFUSED: &[(&str, &str)] = &[
    ("adam_beta3", TAKE_OUT),
    ("adam_epsilon2", TAKE_OUT),
    ("added_tokens_overrides", MODEL_FILES),
    (
        "auto_resume_from_checkpoints",
        "remove it; cargo xtask train --resume DIR resumes a run",
    ),
    (
        "base_model_config",
        "the model's own config.json is read; remove it",
    ),
    ("chat_template_kwargs", TAKE_OUT),
    ("cls_model_config", TAKE_OUT),
    ("cosine_constant_lr_ratio", TAKE_OUT),
    ("cosine_min_lr_ratio", TAKE_OUT),
    ("cpo_alpha", PREFERENCES),
    ("curriculum_sampling", TAKE_OUT),
    ("dataloader_drop_last", TAKE_OUT),
    (
        "dataset_exact_deduplication",
        "remove repeated examples from the data file, and remove the key here",
    ),
    (
        "dataset_shard_idx",
        "write a data file with these examples only",
    ),
    (
        "dataset_shard_num",
        "write a data file with these examples only",
    ),
    ("default_system_message", TAKE_OUT),
    ("dynamic_checkpoint", TAKE_OUT),
    (
        "early_stopping_patience",
        "runs are not stopped early here; remove it, and set load_best_model_at_end: true to keep the adapter with \
         the lowest validation loss",
    ),
    ("ebft", PREFERENCES),
    ("embedding_lr", TAKE_OUT),
    ("embedding_lr_scale", TAKE_OUT),
    (
        "experts_implementation",
        "models with experts are not supported",
    ),
    ("fix_untrained_tokens", TAKE_OUT),
    ("fp32_norm_classes", TAKE_OUT),
    ("fp32_norms", TAKE_OUT),
    ("fp8", "use bf16: auto"),
    ("freeze_mm_modules", "only text is trained on"),
    ("greater_is_better", TAKE_OUT),
    (
        "group_by_length",
        "batches are drawn from all examples here; remove it",
    ),
    ("image_resize_algorithm", "only text is trained on"),
    ("image_size", "only text is trained on"),
    ("lora_fan_in_fan_out", "Llama has no such layers; remove it"),
    (
        "lora_target_parameters",
        "name modules in lora_target_modules",
    ),
    ("lr_div_factor", TAKE_OUT),
    ("lr_groups", TAKE_OUT),
    ("lr_quadratic_warmup", TAKE_OUT),
    ("lr_scheduler_kwargs", TAKE_OUT),
    ("max_packed_sequence_len", "write sequence_len"),
    ("max_prompt_len", PREFERENCES),
    (
        "model_config",
        "the model's own config.json is read; remove it",
    ),
    ("model_kwargs", TAKE_OUT),
    (
        "model_quantization_config",
        "write load_in_8bit or load_in_4bit",
    ),
    ("neftune_noise_alpha", TAKE_OUT),
    ("noisy_embedding_alpha", TAKE_OUT),
    ("num_labels", PREFERENCES),
    (
        "optim_args",
        "write adam_beta1, adam_beta2 and adam_epsilon",
    ),
    ("optim_target_modules", TAKE_OUT),
    ("orpo_alpha", PREFERENCES),
    (
        "overrides_of_model_config",
        "the model's own config.json is read; remove it",
    ),
    ("overrides_of_model_kwargs", TAKE_OUT),
    ("peft", TAKE_OUT),
    ("peft_ensure_weight_tying", TAKE_OUT),
    ("peft_layer_replication", TAKE_OUT),
    (
        "peft_layers_pattern",
        "name the layers by number in peft_layers_to_transform",
    ),
    ("peft_trainable_token_indices", TAKE_OUT),
    ("precompute_ref_log_probs", PREFERENCES),
    (
        "pretraining_dataset",
        "name a data file in datasets, with type: completion",
    ),
    ("pretraining_sample_concatenation", TAKE_OUT),
    ("process_reward_model", PREFERENCES),
    ("processor_kwargs", "only text is trained on"),
    ("processor_type", "only text is trained on"),
    ("qat", TAKE_OUT),
    ("quantization", TAKE_OUT),
    (
        "quantize_moe_experts",
        "models with experts are not supported",
    ),
    ("reinit_weights", TAKE_OUT),
    ("resize_token_embeddings_to_32x", TAKE_OUT),
    (
        "resume_from_checkpoint",
        "remove it; cargo xtask train --resume DIR resumes a run of this trainer",
    ),
    ("reward_model", PREFERENCES),
    ("rl", PREFERENCES),
    ("rl_beta", PREFERENCES),
    ("role_boundaries", "only text is trained on"),
    (
        "rope_scaling",
        "the model's own config.json is read; set it there and remove it here",
    ),
    ("s2_attention", TAKE_OUT),
    (
        "sage_attention",
        "attention is not quantized here; remove it",
    ),
    (
        "sample_packing",
        "an optimizer step would take as many examples as fit into sequence_len tokens, which changes the training; set it \
         to false and set micro_batch_size to the examples per micro-batch (they are computed without padding, so nothing \
         is lost)",
    ),
    ("shrink_embeddings", TAKE_OUT),
    ("simpo_gamma", PREFERENCES),
    ("skip_prepare_dataset", TAKE_OUT),
    ("streaming", "name a data file in datasets"),
    (
        "tokenizer_config",
        "the tokenizer of the model's folder is read; remove it",
    ),
    (
        "tokenizer_use_mistral_common",
        "the model's tokenizer.json is read; remove it",
    ),
    ("tokens", MODEL_FILES),
    ("torchdistx_path", TAKE_OUT),
    ("trainer_cls", TAKE_OUT),
    ("trl", PREFERENCES),
    (
        "unfrozen_parameters",
        "only adapters are trained here; remove it",
    ),
    ("use_eaft", TAKE_OUT),
    ("use_kernels", TAKE_OUT),
    ("use_onebitllms", TAKE_OUT),
    ("use_pose", TAKE_OUT),
    ("vllm", PREFERENCES),
    ("center_rewards_coefficient", PREFERENCES),
    ("fp8_enable_fsdp_float8_all_gather", "use bf16: auto"),
    ("gemma4_hybrid_attn_impl", TAKE_OUT),
    ("is_preprocess", TAKE_OUT),
    (
        "llama4_linearized_experts",
        "models with experts are not supported",
    ),
    (
        "model_quantization_config_kwargs",
        "write load_in_8bit or load_in_4bit",
    ),
    ("preprocess_iterable", TAKE_OUT),
    ("rpo_alpha", PREFERENCES),
    (
        "streaming_multipack_buffer_size",
        "name a data file in datasets",
    ),
    ("total_num_tokens", TAKE_OUT),
    ("total_supervised_tokens", TAKE_OUT),
];

/// Prefixes of further such keys.
const REFUSED_FAMILIES: &[(&str, &str)] = &[
    ("dion_", TAKE_OUT),
    ("dpo_", PREFERENCES),
    ("eaft_", TAKE_OUT),
    ("gptq", "give the model unquantized, or as GGUF; remove it"),
    ("jagged_restart_", TAKE_OUT),
    ("kto_", PREFERENCES),
    ("lisa_", TAKE_OUT),
    ("pose_", TAKE_OUT),
    ("pretrain_multipack_", "name a data file in datasets"),
    ("qgalore_", TAKE_OUT),
    ("relora", TAKE_OUT),
    ("scaling_softmax", TAKE_OUT),
];

/// Plugins that change kernels only.
pub(super) const PLUGINS_WITHOUT_EFFECT: [&str; 2] = [
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
];

/// Whether a key has no effect on the training here.
pub(super) fn is_without_effect(key: &str) -> bool {
    let mut families = WITHOUT_EFFECT_FAMILIES.iter();
    WITHOUT_EFFECT.contains(&key) || families.any(|family| key.starts_with(family))
}

/// The remedy for a key that is rejected.
pub(super) fn remedy(key: &str) -> Option<&'static str> {
    let found = REFUSED.iter().find(|(name, _)| *name == key);
    let mut families = REFUSED_FAMILIES.iter();
    let found = found.or_else(|| families.find(|(family, _)| key.starts_with(family)));
    found.map(|(_, remedy)| *remedy)
}

/// Every name in the lists above.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let refused = REFUSED.iter().map(|(name, _)| *name);
    WITHOUT_EFFECT.iter().copied().chain(refused)
}

/// Whether a value means that a key is off.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) | Value::Integer(0) => true,
        Value::Float(number) => *number == 0.0,
        Value::String(text) => text.trim().is_empty(),
        Value::List(items) => items.iter().all(is_off),
        Value::Table(entries) => entries.iter().all(|entry| is_off(&entry.value)),
        Value::Bool(true) | Value::Integer(_) | Value::Other(_) => false,
    }
}
