//! Kernels for GPUs, in CubeCL's language: one source for CUDA, Vulkan, Metal and WebGPU.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `product.rs` | products with packed weights, with the sum and the low-rank term added |
//! | `plane_product.rs` | the same for software drivers |
//! | `joint_product.rs` | sums of products with several weights, one launch for all |
//! | `ending.rs` | what products do with their sums: SwiGLU, for instance |
//! | `few_rows.rs` | the same for few rows, as in decoding |
//! | `attention.rs` | attention tile by tile |
//! | `plane_attention.rs` | the same for software drivers |
//! | `matrix_product.rs`, `matrix_attention.rs` | products and attention on matrix units, for 16-bit tensors |
//! | `fragment.rs` | matrix units |
//! | `choice.rs` | which kernel computes a product |
//! | `low_rank.rs` | the adapters' products of low rank, of up to three layers per launch |
//! | `rows.rs` | RMSNorm and cross entropy, a workgroup per row |
//! | `rope.rs` | rotary position embeddings |
//! | `swiglu.rs` | SwiGLU |
//! | `optimizer.rs` | AdamW and the sum of squares, over one flat tensor |
//! | `operations.rs` | [`GpuOps`]: the kernels as operations on a backend's tensors, outside an autodiff graph |
//! | `launch.rs` | what the launches share |
//! | `fault.rs` | kernels made wrong on purpose, for a test of the tests |
//!
//! The crate `kernels` decides when they run, and compares each with the CPU. `docs/decisions/gpu-kernels.md` explains
//! the tiles.
#![cfg(feature = "cube")]

mod attention;
mod choice;
mod ending;
mod fault;
mod few_rows;
mod fragment;
mod joint_product;
mod launch;
mod low_rank;
mod matrix_attention;
mod matrix_product;
mod operations;
mod optimizer;
mod plane_attention;
mod plane_product;
mod product;
mod rope;
mod rows;
mod swiglu;

use std::sync::atomic::{AtomicBool, Ordering};

use cubecl::client::Client;

pub use attention::Shape as AttentionShape;
pub use choice::{Candidate, Product, burn_is_faster, force as force_product};
pub use fault::{Fault, inject};
pub use few_rows::FEW_ROWS;
pub use low_rank::MEMBERS;
pub use operations::{GpuOps, Group, Joint, Terms, TiledAttention};
pub use optimizer::AdamWNumbers;

static SOFTWARE: AtomicBool = AtomicBool::new(false);

/// Chooses kernels for a driver that emulates a GPU on a CPU and has operations across a plane (a subgroup).
pub fn set_software_driver(software: bool) {
    SOFTWARE.store(software, Ordering::Relaxed);
}

fn is_software_driver() -> bool {
    SOFTWARE.load(Ordering::Relaxed)
}

/// The units of a plane on a software driver, whose planes are the lanes of a SIMD instruction.
fn plane_of_software_driver(client: &Client) -> Option<usize> {
    let hardware = &client.properties().hardware;
    let known = hardware.plane_size_min == hardware.plane_size_max;
    (is_software_driver() && known).then_some(hardware.plane_size_min as usize)
}
