//! CUDA: NVIDIA's driver and the toolkit's math library, found without Burn.
//!
//! cubecl-cuda panics if the driver is missing, and fails in the middle of a run if the toolkit's
//! math library is missing: its kernels are compiled by LLVM, which links `exp`, `sin` and similar
//! functions from `libdevice.10.bc` (cubecl-llvm 0.11.3, `nvptx/libdevice.rs`). NVRTC is not used.

use std::env;
use std::ffi::{CStr, OsString, c_char, c_int, c_uint};
use std::path::{Path, PathBuf};

/// The file of NVIDIA's driver library.
pub const LIBRARY: &str = if cfg!(windows) {
    "nvcuda.dll"
} else {
    "libcuda.so.1"
};

/// The math library, below the folder of a CUDA toolkit.
pub const LIBDEVICE: &str = "nvvm/libdevice/libdevice.10.bc";

/// NVIDIA's driver and its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// Number of devices, at least 1.
    pub devices: usize,
    /// The name of the first device.
    pub first: String,
    /// The newest CUDA version that the driver supports, 1000 · major + 10 · minor.
    pub version: i32,
}

impl Driver {
    /// The first device's name; with several devices, also how to pick another.
    pub fn name(&self) -> String {
        match (self.devices, &self.first) {
            (1, first) => first.clone(),
            (n, first) => {
                format!("{first} (the first of {n}; CUDA_VISIBLE_DEVICES picks another)")
            }
        }
    }
}

/// Why the driver cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The library is missing.
    #[error("NVIDIA's driver ({LIBRARY}) is not installed")]
    NotInstalled,
    /// The library lacks a function that every driver since CUDA 2 has.
    #[error("NVIDIA's driver ({LIBRARY}) lacks {name}")]
    NoFunction {
        /// The function.
        name: &'static str,
    },
    /// The driver reports no device, or fails.
    #[error("NVIDIA's driver finds no device (CUDA error {code})")]
    NoDevice {
        /// `CUresult`, see `cuda.h`.
        code: i32,
    },
}

/// Loads NVIDIA's driver and reads its devices.
///
/// # Errors
///
/// [`DriverError`] without a driver or without a device.
pub fn driver() -> Result<Driver, DriverError> {
    type Version = unsafe extern "system" fn(*mut c_int) -> c_int;
    type Init = unsafe extern "system" fn(c_uint) -> c_int;
    type Count = unsafe extern "system" fn(*mut c_int) -> c_int;
    type Get = unsafe extern "system" fn(*mut c_int, c_int) -> c_int;
    type Name = unsafe extern "system" fn(*mut c_char, c_int, c_int) -> c_int;

    // SAFETY: the functions have had these signatures since CUDA 2 (`cuda.h`: `CUresult` and
    // `CUdevice` are `int`); every pointer is to a local that outlives its call; the library stays
    // loaded while they are used. It runs its own initialisers when it is loaded, as in any program
    // that uses CUDA.
    unsafe {
        let library = libloading::Library::new(LIBRARY).map_err(|_| DriverError::NotInstalled)?;
        let missing = |name| move |_| DriverError::NoFunction { name };
        let init = library.get::<Init>(b"cuInit\0");
        let init = init.map_err(missing("cuInit"))?;
        let count = library.get::<Count>(b"cuDeviceGetCount\0");
        let count = count.map_err(missing("cuDeviceGetCount"))?;
        let device = library.get::<Get>(b"cuDeviceGet\0");
        let device = device.map_err(missing("cuDeviceGet"))?;
        let name = library.get::<Name>(b"cuDeviceGetName\0");
        let name = name.map_err(missing("cuDeviceGetName"))?;
        let version = library.get::<Version>(b"cuDriverGetVersion\0");
        let version = version.map_err(missing("cuDriverGetVersion"))?;

        let (mut newest, mut devices, mut first) = (0, 0, 0);
        let mut text = [0 as c_char; 256];
        succeeded(init(0))?;
        succeeded(version(&mut newest))?;
        succeeded(count(&mut devices))?;
        succeeded(device(&mut first, 0))?;
        succeeded(name(text.as_mut_ptr(), 255, first))?;
        // The last byte stays zero whatever the driver writes.
        let first = CStr::from_ptr(text.as_ptr()).to_string_lossy();
        Ok(Driver {
            devices: usize::try_from(devices).unwrap_or(0),
            first: first.into_owned(),
            version: newest,
        })
    }
}

fn succeeded(code: c_int) -> Result<(), DriverError> {
    if code == 0 {
        Ok(())
    } else {
        Err(DriverError::NoDevice { code })
    }
}

/// The CUDA toolkit's `libdevice.10.bc`, at the places where cubecl-llvm looks for it: in `CUDA_PATH`,
/// else in the usual folders.
pub fn libdevice() -> Option<PathBuf> {
    libdevice_in(env::var_os("CUDA_PATH"))
}

fn libdevice_in(cuda_path: Option<OsString>) -> Option<PathBuf> {
    let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];
    let roots = match cuda_path {
        Some(root) => vec![root],
        None => usual.map(OsString::from).to_vec(),
    };
    let files = roots.iter().map(|root| Path::new(root).join(LIBDEVICE));
    { files }.find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_with_several_devices_names_the_first_and_how_to_pick_another() {
        let mut driver = Driver {
            devices: 1,
            first: "NVIDIA H100".into(),
            version: 12_040,
        };
        assert_eq!(driver.name(), "NVIDIA H100");
        driver.devices = 4;
        let name = driver.name();
        assert!(name.starts_with("NVIDIA H100 (the first of 4"), "{name}");
        assert!(name.contains("CUDA_VISIBLE_DEVICES"), "{name}");
    }

    #[test]
    fn an_error_code_of_the_driver_is_in_the_message() {
        assert_eq!(succeeded(0), Ok(()));
        let message = succeeded(100).unwrap_err().to_string();
        assert!(message.contains("CUDA error 100"), "{message}");
    }

    #[test]
    fn libdevice_is_looked_for_in_cuda_path_alone_where_that_is_set() {
        let root = env::temp_dir().join(format!("backends-libdevice-{}", std::process::id()));
        assert_eq!(libdevice_in(Some(root.clone().into())), None);
        let file = root.join(LIBDEVICE);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "").unwrap();
        assert_eq!(libdevice_in(Some(root.clone().into())), Some(file));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
