//! The GPUs that are compiled for, as CubeCL's runtimes would describe them.

use cubecl::cmma::MatrixLayout;
use cubecl::ir::features::{AtomicUsage, MmaConfig, Plane, TypeUsage};
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, TargetProperties, Type, VectorSize,
};
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::CudaCmmaCompiler;
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use cubecl_cpp::shared::{register_mma_features, register_supported_types, register_wmma_features};
use cubecl_llvm::shared::lowered_features::{GpuTarget, restrict_features};

use gpu_offline::occupancy::{MULTIPROCESSORS, Multiprocessor, WARP};

/// Which of CubeCL's two compilers for CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compiler {
    /// LLVM, which makes PTX. The default of Burn.
    Llvm,
    /// CUDA C++ and NVRTC.
    Nvrtc,
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// An NVIDIA GPU with CUDA.
    Cuda(Compiler, Multiprocessor),
    /// A GPU with Vulkan.
    Vulkan,
}

const VULKAN: u16 = 100;
const NVRTC: u16 = 10;

impl Target {
    /// The number of the device that stands for it.
    pub fn index(self) -> u16 {
        match self {
            Self::Vulkan => VULKAN,
            Self::Cuda(compiler, multiprocessor) => {
                let place = MULTIPROCESSORS.iter().position(|it| *it == multiprocessor);
                let first = if compiler == Compiler::Nvrtc {
                    NVRTC
                } else {
                    0
                };
                first + place.unwrap_or(0) as u16
            }
        }
    }

    /// The target of [`Target::index`].
    pub fn of_index(index: u16) -> Self {
        let multiprocessor = |place: u16| MULTIPROCESSORS[usize::from(place)];
        match index {
            VULKAN => Self::Vulkan,
            index if index >= NVRTC => Self::Cuda(Compiler::Nvrtc, multiprocessor(index - NVRTC)),
            index => Self::Cuda(Compiler::Llvm, multiprocessor(index)),
        }
    }

    /// As the runtime fills them in from the driver.
    pub fn device_properties(self) -> DeviceProperties {
        let max_shared = match self {
            Self::Cuda(_, multiprocessor) => multiprocessor.shared_of_a_block() as usize,
            // What common GPUs have.
            Self::Vulkan => 48 * 1024,
        };
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: WARP,
            plane_size_max: WARP,
            max_bindings: 1024,
            max_shared_memory_size: max_shared,
            max_cube_count: (i32::MAX as u32, u32::from(u16::MAX), u32::from(u16::MAX)),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(100),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: match self {
                Self::Cuda(..) => VectorSize::MAX,
                Self::Vulkan => 4,
            },
            cube_mma_reserved_shared_memory: 0,
        };
        let memory = 80 << 30;
        let mut properties = DeviceProperties::new(
            Default::default(),
            MemoryDeviceProperties::new(memory / 4, 512).with_max_memory(memory),
            hardware,
            TimingMethod::System,
            DeviceIdentity {
                name: format!("{self:?}"),
                fingerprint: format!("{self:?}"),
                physical: None,
            },
        );
        register_supported_types(&mut properties);
        properties.features.plane.insert(Plane::Sync);
        properties.features.plane.insert(Plane::Ops);
        properties.features.device_memory_scope = true;
        match self {
            Self::Cuda(compiler, multiprocessor) => {
                cuda_features(&mut properties, multiprocessor.version);
                if compiler == Compiler::Llvm {
                    restrict_features(&mut properties, GpuTarget::Nvptx);
                }
            }
            Self::Vulkan => vulkan_features(&mut properties),
        }
        properties
    }

    /// CubeCL's description of the instructions.
    pub fn target_properties(self) -> TargetProperties {
        TargetProperties {
            mma: MmaProperties {
                register_size_bits: 32,
                const_plane_size: WARP,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        }
    }
}

/// What every NVIDIA GPU since the A100 has, and of newer ones what kernels of ours could ask for.
fn cuda_features(properties: &mut DeviceProperties, version: u32) {
    let architecture = CudaArchitecture {
        version,
        tensor_cores: true,
    };
    let half = Type::new(ElemType::Float(FloatKind::F16));
    let (scalar, pair) = (Type::atomic(half), Type::atomic(half.with_vector_size(2)));
    properties.register_atomic_type_usage(scalar, AtomicUsage::Add);
    properties.register_atomic_type_usage(pair, AtomicUsage::Add | AtomicUsage::LoadStore);
    let tf32 = ElemType::Float(FloatKind::TF32);
    properties.register_type_usage(tf32, TypeUsage::Conversion);
    let features = &mut properties.features;
    features.copy_async = true;
    features.memory_reinterpret = true;
    features.alignment = true;
    features.plane.insert(Plane::NonUniformControlFlow);
    for kind in [FloatKind::F16, FloatKind::BF16] {
        features.matmul.ldmatrix.insert(ElemType::Float(kind));
        if version >= 90 {
            features.matmul.stmatrix.insert(ElemType::Float(kind));
        }
    }
    let cmma = CudaCmmaCompiler::Cpp.supported_cmma_combinations(&architecture);
    register_wmma_features(cmma, properties);
    register_mma_features(
        cubecl_cpp::cuda::supported_mma_combinations(&architecture),
        properties,
    );
}

/// Cooperative matrices as NVIDIA's Vulkan driver has them.
fn vulkan_features(properties: &mut DeviceProperties) {
    for kind in [FloatKind::F16, FloatKind::BF16] {
        properties.features.matmul.cmma.insert(MmaConfig {
            a_type: ElemType::Float(kind),
            b_type: ElemType::Float(kind),
            cd_type: ElemType::Float(FloatKind::F32),
            m: 16,
            n: 16,
            k: 16,
        });
    }
}
