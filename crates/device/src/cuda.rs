//! CUDA: what the machine needs before Burn's backend may be used, and the device's free memory.

use std::ffi::{c_int, c_uint, c_void};

use backends::advice;
use backends::cuda::{Driver, LIBDEVICE, LIBRARY};

use super::{Backend, DeviceError, Selected};

/// Asks NVIDIA's driver for its devices and looks for the toolkit's math library.
///
/// # Errors
///
/// [`DeviceError::NoHardware`] without a driver, a device or the library.
pub fn driver() -> Result<Driver, DeviceError> {
    let missing = |missing: String, advice: &str| DeviceError::NoHardware {
        backend: Backend::Cuda,
        missing,
        advice: advice.to_owned(),
    };
    let driver = backends::cuda::driver()
        .map_err(|error| missing(error.to_string(), advice::CUDA_DRIVER))?;
    if backends::cuda::libdevice().is_none() {
        return Err(missing(
            format!(
                "{} was found, but the CUDA toolkit's {LIBDEVICE} was not",
                driver.name()
            ),
            advice::CUDA_TOOLKIT,
        ));
    }
    Ok(driver)
}

/// Bytes that are free on the first device, or all its memory if the driver reports no more; `None` without a
/// driver.
pub fn free_memory() -> Option<u64> {
    type Init = unsafe extern "system" fn(c_uint) -> c_int;
    type Get = unsafe extern "system" fn(*mut c_int, c_int) -> c_int;
    type Retain = unsafe extern "system" fn(*mut *mut c_void, c_int) -> c_int;
    type Push = unsafe extern "system" fn(*mut c_void) -> c_int;
    type Pop = unsafe extern "system" fn(*mut *mut c_void) -> c_int;
    type Release = unsafe extern "system" fn(c_int) -> c_int;
    type Info = unsafe extern "system" fn(*mut usize, *mut usize) -> c_int;
    type Total = unsafe extern "system" fn(*mut usize, c_int) -> c_int;

    // SAFETY: as in `backends::cuda::driver`; the names with `_v2` are what `cuda.h` has meant by those without since CUDA 4 (the
    // release since 11), with `size_t` for bytes. The context that is made current here is taken off again on the
    // same thread, and what was retained is released.
    unsafe {
        let library = libloading::Library::new(LIBRARY).ok()?;
        let init = library.get::<Init>(b"cuInit\0").ok()?;
        let get = library.get::<Get>(b"cuDeviceGet\0").ok()?;
        let mut device = 0;
        if init(0) != 0 || get(&mut device, 0) != 0 {
            return None;
        }
        let free = || {
            // The driver reports the free memory of the current context.
            let retain = library.get::<Retain>(b"cuDevicePrimaryCtxRetain\0").ok()?;
            let release = library
                .get::<Release>(b"cuDevicePrimaryCtxRelease_v2\0")
                .ok()?;
            let push = library.get::<Push>(b"cuCtxPushCurrent_v2\0").ok()?;
            let pop = library.get::<Pop>(b"cuCtxPopCurrent_v2\0").ok()?;
            let info = library.get::<Info>(b"cuMemGetInfo_v2\0").ok()?;
            let mut context = std::ptr::null_mut();
            if retain(&mut context, device) != 0 {
                return None;
            }
            let (mut free, mut total) = (0, 0);
            let mut told = push(context) == 0;
            if told {
                told = info(&mut free, &mut total) == 0;
                pop(&mut context);
            }
            release(device);
            told.then_some(free as u64)
        };
        free().or_else(|| {
            let total = library.get::<Total>(b"cuDeviceTotalMem_v2\0").ok()?;
            let mut bytes = 0;
            (total(&mut bytes, device) == 0).then_some(bytes as u64)
        })
    }
}

/// Starts Burn's backend on the first device.
#[cfg(feature = "cuda")]
pub fn start(driver: &Driver) -> Result<Selected, DeviceError> {
    let name = format!("CUDA: {}", driver.name());
    let device = super::quiet::catch(|| {
        let device = burn::tensor::Device::cuda(0);
        // Opens the device.
        device.identity();
        device
    });
    match device {
        Ok(device) => Ok(Selected {
            device,
            backend: Backend::Cuda,
            name,
            driver: format!(
                "NVIDIA's for CUDA {}.{}",
                driver.version / 1000,
                driver.version % 1000 / 10
            ),
            reason: String::new(),
            is_software: false,
        }),
        Err(message) => Err(DeviceError::Initialization { name, message }),
    }
}

/// A build without CUDA has nothing to start.
#[cfg(not(feature = "cuda"))]
pub fn start(_driver: &Driver) -> Result<Selected, DeviceError> {
    Err(DeviceError::NotCompiled {
        backend: Backend::Cuda,
    })
}
