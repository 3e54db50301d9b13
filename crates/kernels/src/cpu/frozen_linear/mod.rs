//! Products with frozen weights on the CPU: 8-bit, 16-bit and f32, unpacked on the way.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
mod columns;
mod decode;
pub mod dense;
mod f32_tiles;
pub mod few_rows;
mod few_scores;
pub mod flex;
pub mod half;
mod panels;
mod precision;
mod tiles;

pub use precision::{has_bf16_products, use_bf16_products};

use crate::frozen_linear::Direction;
