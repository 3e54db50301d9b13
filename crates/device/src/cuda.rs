//! CUDA: what the machine needs before Burn's backend may be used.
//!
//! cubecl-cuda panics if the driver is missing, and fails in the middle of a run if the toolkit's
//! math library is missing: its kernels are compiled by LLVM, which links `exp`, `sin` and similar
//! functions from `libdevice.10.bc` (cubecl-llvm 0.11.3, `nvptx/libdevice.rs`). NVRTC is not used.

use std::env;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

use super::{Backend, DeviceError, Selected};

/// NVIDIA's driver's description of its first device.
pub struct Driver {
    /// The card's name; with several cards, also how to pick another one.
    pub name: String,
    /// The newest CUDA version that the driver supports, 1000 · major + 10 · minor.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "used by builds with CUDA")
    )]
    pub version: i32,
}

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
    let driver = ask().map_err(|what| {
        missing(
            what,
            "install or update NVIDIA's driver, or use --backend wgpu or --backend cpu",
        )
    })?;
    if libdevice().is_none() {
        return Err(missing(
            format!(
                "{} was found, but the CUDA toolkit's nvvm/libdevice/libdevice.10.bc was not",
                driver.name
            ),
            "install the CUDA toolkit, or set CUDA_PATH to its folder, or use --backend wgpu or \
             --backend cpu",
        ));
    }
    Ok(driver)
}

/// `libdevice.10.bc`, at the places where cubecl-llvm looks for it.
fn libdevice() -> Option<PathBuf> {
    let roots = match env::var_os("CUDA_PATH") {
        Some(root) => vec![PathBuf::from(root)],
        None => ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"]
            .map(PathBuf::from)
            .to_vec(),
    };
    roots
        .iter()
        .map(|root| root.join(Path::new("nvvm/libdevice/libdevice.10.bc")))
        .find(|file| file.is_file())
}

/// Loads the driver and counts its devices; an error is a sentence that names what is missing.
fn ask() -> Result<Driver, String> {
    type Version = unsafe extern "system" fn(*mut c_int) -> c_int;
    type Init = unsafe extern "system" fn(c_uint) -> c_int;
    type Count = unsafe extern "system" fn(*mut c_int) -> c_int;
    type Get = unsafe extern "system" fn(*mut c_int, c_int) -> c_int;
    type Name = unsafe extern "system" fn(*mut c_char, c_int, c_int) -> c_int;

    let file = file();
    // SAFETY: the functions have had these signatures since CUDA 2 (`cuda.h`: `CUresult` and
    // `CUdevice` are `int`); every pointer is to a local that outlives its call; the library stays
    // loaded while they are used. It runs its own initialisers when it is loaded, as in any program
    // that uses CUDA.
    unsafe {
        let library = libloading::Library::new(file)
            .map_err(|_| format!("NVIDIA's driver ({file}) is not installed"))?;
        let get = |name: &str| format!("NVIDIA's driver ({file}) lacks {name}");
        let init = library
            .get::<Init>(b"cuInit\0")
            .map_err(|_| get("cuInit"))?;
        let count = library
            .get::<Count>(b"cuDeviceGetCount\0")
            .map_err(|_| get("cuDeviceGetCount"))?;
        let device = library
            .get::<Get>(b"cuDeviceGet\0")
            .map_err(|_| get("cuDeviceGet"))?;
        let name = library
            .get::<Name>(b"cuDeviceGetName\0")
            .map_err(|_| get("cuDeviceGetName"))?;

        let version = library
            .get::<Version>(b"cuDriverGetVersion\0")
            .map_err(|_| get("cuDriverGetVersion"))?;

        let no_device = |code| format!("NVIDIA's driver finds no device (CUDA error {code})");
        let (mut newest, mut devices, mut first) = (0, 0, 0);
        for code in [
            init(0),
            version(&mut newest),
            count(&mut devices),
            device(&mut first, 0),
        ] {
            // A later call repeats the error of an earlier one.
            if code != 0 {
                return Err(no_device(code));
            }
        }
        let mut text = [0 as c_char; 256];
        let code = name(text.as_mut_ptr(), 255, first);
        if code != 0 {
            return Err(no_device(code));
        }
        // The last byte stays zero whatever the driver writes.
        let name = CStr::from_ptr(text.as_ptr()).to_string_lossy();
        Ok(Driver {
            version: newest,
            name: match devices {
                1 => name.into_owned(),
                n => format!("{name} (the first of {n}; CUDA_VISIBLE_DEVICES picks another)"),
            },
        })
    }
}

/// Free bytes on the first device, or its total if the driver does not report more; `None` without
/// a driver.
pub fn free_memory() -> Option<u64> {
    type Init = unsafe extern "system" fn(c_uint) -> c_int;
    type Get = unsafe extern "system" fn(*mut c_int, c_int) -> c_int;
    type Retain = unsafe extern "system" fn(*mut *mut c_void, c_int) -> c_int;
    type Push = unsafe extern "system" fn(*mut c_void) -> c_int;
    type Pop = unsafe extern "system" fn(*mut *mut c_void) -> c_int;
    type Release = unsafe extern "system" fn(c_int) -> c_int;
    type Info = unsafe extern "system" fn(*mut usize, *mut usize) -> c_int;
    type Total = unsafe extern "system" fn(*mut usize, c_int) -> c_int;

    // SAFETY: as in `ask`; the names with `_v2` are what `cuda.h` has meant by those without since CUDA 4 (the
    // release since 11), with `size_t` for bytes. The context that is made current here is taken off again on the
    // same thread, and what was retained is released.
    unsafe {
        let library = libloading::Library::new(file()).ok()?;
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

/// NVIDIA's driver.
fn file() -> &'static str {
    if cfg!(windows) {
        "nvcuda.dll"
    } else {
        "libcuda.so.1"
    }
}

/// Starts Burn's backend on the first device.
#[cfg(feature = "cuda")]
pub fn start(driver: &Driver) -> Result<Selected, DeviceError> {
    let name = format!("CUDA: {}", driver.name);
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
