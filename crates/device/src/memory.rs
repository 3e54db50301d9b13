//! The memory of a device: queried from a driver that reports it, configured with `device_memory`
//! otherwise.

use super::{Backend, Selected};
use crate::process_memory as memory;

/// The share of a device's total memory that a run may plan with. The rest is used by the driver
/// and its kernels, by the screen and other programs, and by pages that Burn's pools hold half
/// filled.
const OF_TOTAL: f64 = 0.85;

/// As [`OF_TOTAL`] if other programs' memory is already subtracted: only the pools' idle pages
/// remain.
const OF_FREE: f64 = 0.92;

/// The memory of a device, and where the number comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes.
    pub bytes: u64,
    /// Where the number comes from.
    pub known: Known,
}

/// Where the size of a device's memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// From the setting `device_memory`.
    Stated,
    /// The driver reports the total.
    Total,
    /// The driver, or on the CPU the system, reports the free memory.
    Free,
}

impl DeviceMemory {
    /// Bytes that a run may plan with.
    pub fn usable(self, backend: Backend) -> u64 {
        let share = match (backend, self.known) {
            // The system's own figure. The plan leaves a part of it free anyway.
            (Backend::Cpu, _) => 1.0,
            (_, Known::Free) => OF_FREE,
            (_, Known::Stated | Known::Total) => OF_TOTAL,
        };
        (self.bytes as f64 * share) as u64
    }
}

/// The memory of a device: `stated` if the user sets it, else the free memory (CUDA, the CPU), else
/// the total (Vulkan and Metal with native shaders). `None` if it is unknown: WebGPU cannot report
/// it.
pub fn device_memory(selected: &Selected, stated: Option<u64>) -> Option<DeviceMemory> {
    let of = |known| move |bytes| DeviceMemory { bytes, known };
    let total = || total(selected).map(of(Known::Total));
    let found = || match selected.backend {
        Backend::Cpu => memory::available().map(of(Known::Free)),
        Backend::Cuda => super::cuda::free_memory()
            .map(of(Known::Free))
            .or_else(total),
        _ => total(),
    };
    stated.map(of(Known::Stated)).or_else(found)
}

/// Bytes of the largest buffer that a device can allocate and bind; `None` on the CPU, which has no
/// such limit.
pub fn largest_buffer(selected: &Selected) -> Option<u64> {
    let largest = kernels::largest_buffer(&selected.device)?;
    u64::try_from(largest).ok()
}

/// The total memory as CubeCL reports it.
#[cfg(any(
    feature = "wgpu",
    feature = "vulkan",
    feature = "metal",
    feature = "cuda"
))]
fn total(selected: &Selected) -> Option<u64> {
    use burn::backend::DispatchDevice;

    let device = selected.device.clone().without_autodiff();
    let DispatchDevice::Cube(device) = device.as_dispatch() else {
        return None;
    };
    let client = device.client();
    client.properties().memory.max_memory()
}

#[cfg(not(any(
    feature = "wgpu",
    feature = "vulkan",
    feature = "metal",
    feature = "cuda"
)))]
fn total(_selected: &Selected) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stated_counts_before_what_is_found_and_some_is_left_to_others() {
        let cpu = super::super::select(Backend::Cpu).unwrap();
        let stated = device_memory(&cpu, Some(8 << 30)).unwrap();
        assert_eq!((stated.bytes, stated.known), (8 << 30, Known::Stated));
        assert_eq!(stated.usable(Backend::Cpu), 8 << 30);
        let usable = stated.usable(Backend::Wgpu);
        assert!(usable < 7 << 30 && usable > 6 << 30, "{usable}");
        assert_eq!(largest_buffer(&cpu), None);
        #[cfg(target_os = "linux")]
        assert_eq!(device_memory(&cpu, None).unwrap().known, Known::Free);
    }
}
