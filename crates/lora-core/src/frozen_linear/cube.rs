//! CubeCL backends (CUDA, ROCm, Vulkan, Metal, WebGPU).
//!
//! Dequantize, then the backend's float product, in both directions: the trait's bodies. The dense
//! weight lives for the one product only and its buffer is used again for the next. Burn's fused
//! quantized product reads fewer bytes, but its kernel is chosen for single rows; see
//! docs/decisions/quantized-weights.md.

use burn_cubecl::CubeBackend;

use super::FrozenLinearOps;

impl FrozenLinearOps for CubeBackend {}
