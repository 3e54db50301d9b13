//! The operations of a LoRA training step, with kernels for the backends where they are faster than Burn's operations.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `dispatch.rs` | [`Kernels`]: a trait with every operation; the default bodies are compositions of Burn's operations |
//! | `composed/` | those compositions, for any backend |
//! | `cpu/` | the CPU's kernels |
//! | `gpu/` | kernels for GPUs |
//! | `frozen_linear.rs`, `gpu_products.rs` | operations that work in Burn's autodiff graph too: backend extensions |
//! | `rms_norm.rs`, `rope.rs`, `swiglu.rs`, `attention.rs`, `kv_cache.rs`, `vocab.rs`, `loss.rs`, `products.rs`, `adamw.rs` | the functions that callers use, one file per operation |
//! | `quantize.rs`, `integers.rs` | 8- and 4-bit weights |
//! | `ranges.rs`, `uploads.rs` | which tokens attend to which; a batch's index tables on the device |
//! | `fusion.rs`, `limits.rs` | what Burn fuses on GPUs; the limits and features of a device |
//! | `switches.rs` | switches kernels for GPUs off |
//! | `spoil.rs` | fault injection: makes an operation wrong, for tests of the checks |
//! | `random.rs`, `init.rs` | seeded numbers, the same on every device |
//!
//! These functions compute outside an autodiff graph: forward and backward passes are separate functions, and what a
//! backward pass needs is a value that the forward pass returns. Exceptions are [`frozen_linear`] and [`product`],
//! which work in a graph too, and [`attention_in_graph`].
//!
//! A caller names no backend. The device of the first tensor decides which implementation of [`Kernels`] runs. To add
//! a kernel for a backend, override a method of [`Kernels`] for that backend; the composition stays as the fallback and
//! as the reference that the kernel is tested against.

mod adamw;
mod attention;
mod composed;
pub mod cpu;
mod dispatch;
mod frozen_linear;
mod fusion;
#[cfg(feature = "cube")]
pub mod gpu;
mod gpu_products;
mod init;
mod integers;
mod kv_cache;
mod limits;
mod loss;
mod low_rank;
mod products;
mod quantize;
mod random;
mod ranges;
mod rms_norm;
mod rope;
pub mod spoil;
mod swiglu;
mod switches;
mod uploads;
mod vocab;

pub use adamw::{AdamWSettings, AdamWState, adamw, sums_of_squares};
pub use attention::{
    AttentionLayout, Heads, PlannedAttention, SavedAttention, attention, attention_backward,
    attention_in_graph, query_scale,
};
pub use composed::SCORES_AT_ONCE;
pub use cpu::{has_bf16_products, heads_apart, use_bf16_products};
pub use dispatch::Kernels;
pub use frozen_linear::{
    Direction, JointTerm, adapted_product, for_each_product_kernel, frozen_linear,
    frozen_linear_backward, frozen_product, joint_product,
};
pub use fusion::{Fusion, set_fusion};
pub use gpu_products::{is_exact_f32, product, use_exact_f32};
pub use init::{kaiming_uniform, normal};
pub use integers::IntegerWeight;
pub use kv_cache::{KvCache, PromptTokens, kv_cache};
pub use limits::{AssumedBuffer, has_f16_matrix_units, has_tf32, largest_buffer, limit_launches};
pub use loss::{
    CrossEntropy, LOGITS_BYTES, LOGITS_BYTES_GPU, LossTerms, Targets, cross_entropy, logits_bytes,
};
pub use low_rank::{
    LowRankPart, LowRankTerm, Normalized, low_rank_columns, low_rank_gradients,
    low_rank_gradients_of_norm,
};
pub use products::{multiply_add, multiply_in_f32, transposes_low_rank};
pub use quantize::{
    AlreadyQuantized, BLOCK, Quantization, QuantizationError, compact, quantize, quantize_data,
    quantize_on_device,
};
pub use random::CounterRng;
pub use ranges::{AttentionRanges, Segment, SegmentRanges, offsets, starts};
pub use rms_norm::{
    InverseRms, gain_row, inverse_rms, rms_norm, rms_norm_again, rms_norm_backward,
};
pub use rope::{PlannedRotary, RotaryTables, Rotation, rotate, rotate_in_graph};
pub use swiglu::{gated_product, gated_product_backward, swiglu, swiglu_backward};
pub use switches::{Kernel, switch_off};
pub use uploads::{Floats, Ints, Uploaded, Uploads};
pub use vocab::{table_dtype, table_logits, table_logits_backward, widens_tables};
