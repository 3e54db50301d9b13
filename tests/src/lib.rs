//! Helpers of the workspace's tests: paths of fixtures, the devices to test, the program.

pub mod allocator;
pub mod hostile;
pub mod hub_server;
pub mod mutate;
pub mod program;
pub mod reliability;
pub mod runs;
pub mod workspace;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use device::Backend;

/// A folder of `fixtures/`.
///
/// # Panics
///
/// If it does not exist.
pub fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name);
    assert!(folder.is_dir(), "{} is not there", folder.display());
    folder
}

/// A file of `assets/`.
///
/// # Panics
///
/// If it cannot be read.
pub fn embedded_asset(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../assets")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folder of the stories260k model, which is not part of the repository.
pub fn stories260k() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/stories260k");
    if folder.join("model.safetensors").is_file() {
        Some(folder)
    } else {
        println!("skipped: {} is not there", folder.display());
        None
    }
}

/// Every device of this build that starts on this machine, the CPU first, with its name.
///
/// A backend that does not start gets a printed line. With `LORA_REQUIRE_WGPU=1` in the
/// environment, as in CI, a missing `wgpu` fails the test instead.
///
/// # Panics
///
/// If a backend computes wrong numbers, or `wgpu` is required and missing.
pub fn devices() -> Vec<(String, Device)> {
    let backends = [
        Backend::Cpu,
        Backend::Wgpu,
        Backend::Vulkan,
        Backend::Metal,
        Backend::Cuda,
    ];
    let required = |backend| {
        backend == Backend::Wgpu
            && std::env::var("LORA_REQUIRE_WGPU").is_ok_and(|value| value == "1")
    };
    let mut devices = Vec::new();
    for backend in backends {
        if !device::is_compiled_in(backend) && !required(backend) {
            continue;
        }
        match device::select(backend) {
            Ok(selected) => {
                if let Err(error) = device::self_test(&selected) {
                    panic!("{error}");
                }
                devices.push((selected.name, selected.device));
            }
            Err(error) if required(backend) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
            Err(error) => println!("skipped: {error}"),
        }
    }
    devices
}
