//! What a device can do at most.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::Device;

/// 0 where nothing is assumed.
static ASSUMED: AtomicUsize = AtomicUsize::new(0);

/// The largest buffer that a kernel on this device reads or writes, in bytes; `None` on the CPU.
pub fn largest_buffer(device: &Device) -> Option<usize> {
    let largest = known(device)?;
    match ASSUMED.load(Ordering::Relaxed) {
        0 => Some(largest),
        assumed => Some(assumed),
    }
}

/// Has every GPU of this process taken for one with this [`largest_buffer`], until it is dropped: for counting, on
/// whatever device there is, what a larger one would be asked for. Work on larger buffers than the device has fails.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct AssumedBuffer(());

impl AssumedBuffer {
    /// Assumes `bytes` from here on.
    pub fn new(bytes: usize) -> Self {
        ASSUMED.store(bytes, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for AssumedBuffer {
    fn drop(&mut self) {
        ASSUMED.store(0, Ordering::Relaxed);
    }
}

#[cfg(feature = "cube")]
fn known(device: &Device) -> Option<usize> {
    use burn::backend::DispatchDevice;
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => {
            let largest = device.client().properties().memory.max_page_size;
            usize::try_from(largest).ok()
        }
        _ => None,
    }
}

#[cfg(not(feature = "cube"))]
fn known(_device: &Device) -> Option<usize> {
    None
}
