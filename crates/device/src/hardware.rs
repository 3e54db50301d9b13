//! Properties of a device: types, memory, limits, features. For reports only; no decision depends
//! on them.

use std::collections::BTreeMap;

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

use super::{Backend, Selected, compute_dtype, dtype_name};

/// Properties of a device as its driver reports them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Hardware {
    /// The name that `--backend` accepts.
    pub backend: String,
    /// As [`Selected::name`].
    pub name: String,
    /// As [`Selected::driver`].
    pub driver: String,
    /// Whether it is a graphics driver that computes on the CPU.
    pub is_software: bool,
    /// The target that kernels are compiled for, in CubeCL's words; empty on the CPU.
    pub target: String,
    /// The types that it can train in; the first one is the choice of `auto`.
    pub types: Vec<String>,
    /// Bytes of memory that may be allocated in total; `None` if the driver does not report it.
    pub memory_bytes: Option<u64>,
    /// The shapes and types of its matrix units, as `cmma f16·f16→f32 16×16×16`.
    pub matrix_units: Vec<String>,
    /// Names of limits with their values, in bytes or counts.
    pub limits: BTreeMap<String, u64>,
    /// Optional features of the device.
    pub features: Vec<String>,
}

/// Queries the device and its driver.
pub fn hardware(selected: &Selected) -> Hardware {
    let mut hardware = Hardware {
        backend: selected.backend.name().into(),
        name: selected.name.clone(),
        driver: selected.driver.clone(),
        is_software: selected.is_software,
        types: types(selected).into_iter().map(type_name).collect(),
        ..Hardware::default()
    };
    #[cfg(any(
        feature = "cuda",
        feature = "wgpu",
        feature = "vulkan",
        feature = "metal"
    ))]
    cubecl::describe(selected, &mut hardware);
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    if matches!(
        selected.backend,
        Backend::Wgpu | Backend::Vulkan | Backend::Metal
    ) {
        adapter::describe(selected, &mut hardware);
    }
    if selected.backend == Backend::Cpu {
        hardware.memory_bytes = crate::process_memory::available();
    }
    hardware
}

/// The types that the device can train in; the first one is the choice of `auto`.
pub fn types(selected: &Selected) -> Vec<FloatDType> {
    let has = |dtype: &FloatDType| compute_dtype(selected, Some(*dtype)).is_ok();
    let mut types: Vec<FloatDType> = compute_dtype(selected, None).into_iter().collect();
    for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
        if has(&dtype) && !types.contains(&dtype) {
            types.push(dtype);
        }
    }
    types
}

/// A type's name as in a configuration.
pub fn type_name(dtype: FloatDType) -> String {
    dtype_name(dtype).into()
}

#[cfg(any(
    feature = "cuda",
    feature = "wgpu",
    feature = "vulkan",
    feature = "metal"
))]
mod cubecl {
    use burn::backend::DispatchDevice;

    use super::{Hardware, Selected};

    /// CubeCL's properties of the device.
    pub fn describe(selected: &Selected, hardware: &mut Hardware) {
        let DispatchDevice::Cube(device) = selected.device.as_dispatch() else {
            return;
        };
        let client = device.client();
        let properties = client.properties();
        hardware.target = properties.identity.fingerprint.clone();
        hardware.memory_bytes = properties.memory.max_memory();
        let of = &properties.hardware;
        let limits = [
            ("largest allocation", properties.memory.max_page_size),
            ("workgroup memory", of.max_shared_memory_size as u64),
            ("threads of a workgroup", of.max_units_per_cube.into()),
            ("smallest subgroup", of.plane_size_min.into()),
            ("largest subgroup", of.plane_size_max.into()),
            ("buffers of a kernel", of.max_bindings.into()),
        ];
        let told = [
            (
                "multiprocessors",
                of.num_streaming_multiprocessors.map(u64::from),
            ),
            (
                "last-level cache",
                of.last_level_cache_size.map(|bytes| bytes as u64),
            ),
        ];
        let told = told
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        let all = limits.into_iter().chain(told);
        hardware
            .limits
            .extend(all.map(|(name, value)| (name.to_owned(), value)));

        let features = &properties.features;
        let matmul = &features.matmul;
        for (instruction, configurations) in [("cmma", &matmul.cmma), ("mma", &matmul.mma)] {
            let shapes = configurations.iter().map(|it| {
                let (m, n, k) = (it.m, it.n, it.k);
                format!(
                    "{instruction} {}·{}→{} {m}×{n}×{k}",
                    it.a_type, it.b_type, it.cd_type
                )
            });
            hardware.matrix_units.extend(shapes);
        }
        let has = [
            ("clusters", features.cube_cluster),
            ("asynchronous copies", features.copy_async),
            ("tensor memory accelerator", !features.tma.is_empty()),
        ];
        let subgroups = features.plane.iter().map(|it| format!("subgroups: {it:?}"));
        let has = has.into_iter().filter(|(_, there)| *there);
        let stored = features.types.elem.keys().map(|it| format!("type {it}"));
        hardware.features = subgroups
            .chain(has.map(|(name, _)| name.to_owned()))
            .chain(stored)
            .collect();
    }
}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod adapter {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use burn::tensor::wgpu::wgpu;

    use super::{Hardware, Selected};
    use crate::quiet;

    /// The limits and features of the GPU of that name, as wgpu reports them.
    pub fn describe(selected: &Selected, hardware: &mut Hardware) {
        let Ok(Some(adapters)) = quiet::catch(enumerate) else {
            return;
        };
        let named = |adapter: &&wgpu::Adapter| selected.name.contains(&adapter.get_info().name);
        let Some(adapter) = adapters.iter().find(named) else {
            return;
        };
        let limits = adapter.limits();
        let limits = [
            ("wgpu: buffer", limits.max_buffer_size),
            (
                "wgpu: storage binding",
                limits.max_storage_buffer_binding_size,
            ),
            (
                "wgpu: workgroup memory",
                limits.max_compute_workgroup_storage_size.into(),
            ),
            (
                "wgpu: threads of a workgroup",
                limits.max_compute_invocations_per_workgroup.into(),
            ),
            (
                "wgpu: workgroups in a dimension",
                limits.max_compute_workgroups_per_dimension.into(),
            ),
            (
                "wgpu: storage buffers of a kernel",
                limits.max_storage_buffers_per_shader_stage.into(),
            ),
        ];
        hardware
            .limits
            .extend(limits.map(|(name, value)| (name.to_owned(), value)));
        let features = adapter.features();
        let names = features.iter_names().map(|(name, _)| name);
        // Of some sixty names, most of them about drawing.
        let about_computing = [
            "SHADER",
            "SUBGROUP",
            "TIMESTAMP",
            "COOPERATIVE",
            "MATRIX",
            "MAPPABLE",
        ];
        let names = names.filter(|name| about_computing.iter().any(|part| name.contains(part)));
        hardware
            .features
            .extend(names.map(|name| format!("wgpu: {name}")));
    }

    fn enumerate() -> Option<Vec<wgpu::Adapter>> {
        let descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        let instance = wgpu::Instance::new(descriptor);
        // Outside browsers these futures are ready when they are made.
        let future = pin!(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(adapters) => Some(adapters),
            Poll::Pending => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select;

    #[test]
    fn the_cpu_says_what_it_computes_in() {
        let selected = select(Backend::Cpu).unwrap();
        let hardware = hardware(&selected);
        assert_eq!(hardware.types[0], "f32");
        assert_eq!(hardware.name, selected.name);
        assert!(hardware.matrix_units.is_empty() && hardware.target.is_empty());
    }

    #[cfg(all(feature = "wgpu", not(feature = "vulkan"), not(feature = "metal")))]
    #[test]
    fn an_adapter_says_its_limits() {
        // If it is missing, other tests fail in CI.
        let Ok(selected) = select(Backend::Wgpu) else {
            return;
        };
        let hardware = hardware(&selected);
        for name in ["workgroup memory", "wgpu: storage binding"] {
            assert!(hardware.limits[name] > 0, "{name}: {hardware:?}");
        }
        assert!(hardware.features.iter().any(|it| it == "type f32"));
        assert!(!hardware.target.is_empty());
    }
}
