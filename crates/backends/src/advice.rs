//! What to install when a backend does not start, or to use instead. Each text ends a message.

/// CUDA without NVIDIA's driver, or with one that finds no device.
pub const CUDA_DRIVER: &str =
    "install or update NVIDIA's driver, or use --backend wgpu or --backend cpu";

/// CUDA with a driver and without `libdevice.10.bc`.
pub const CUDA_TOOLKIT: &str = "install the CUDA toolkit, or set CUDA_PATH to its folder, or use \
                                --backend wgpu or --backend cpu";

/// wgpu without a graphics adapter.
pub const GRAPHICS_DRIVER: &str = "install your GPU's Vulkan driver (Debian, Ubuntu: \
                                   mesa-vulkan-drivers, which also brings a slow software one), or \
                                   use --backend cpu";

/// SPIR-V without a GPU: lavapipe crashes on such kernels, and SwiftShader computes wrong numbers.
pub const GPU_FOR_SPIRV: &str = "install your GPU's driver, or use --backend wgpu (slow, but \
                                 correct) or --backend cpu";
