//! The backends that `--backend` names, and what each needs on a machine.
//!
//! This crate does not depend on Burn: xtask uses it before Burn is compiled, and `device` uses it
//! in the programs.
//!
//! | module | what it holds |
//! | --- | --- |
//! | backend | names, platforms, cargo features, help texts |
//! | [`cuda`] | NVIDIA's driver and the CUDA toolkit's math library on this machine |
//! | [`advice`] | what to install for each backend, or to use instead |

pub mod advice;
mod backend;
pub mod cuda;

pub use backend::{Backend, UnknownBackend};
