//! Compositions of Burn's operations, for any backend: the default bodies of [`Kernels`](crate::Kernels).

pub mod adamw;
pub mod attention;
pub mod kv_cache;
pub mod loss;
pub mod padding;
pub mod products;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

pub use attention::SCORES_AT_ONCE;
