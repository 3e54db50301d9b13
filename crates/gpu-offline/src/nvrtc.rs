//! CubeCL's CUDA C++, compiled by NVIDIA's runtime compiler. It is loaded from a file and needs no driver.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use cubecl::Compiler as _;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures};
use cubecl_cpp::target::Cuda;
use libloading::Library;

use gpu_offline::occupancy::Multiprocessor;

use crate::cuda::{Ptx, architecture};
use crate::recorder::Kernel;

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// The compiler.
pub struct Nvrtc {
    library: Library,
    include: Vec<PathBuf>,
}

impl Nvrtc {
    /// Loads it from the folder `nvidia` of Python's packages.
    pub fn load(tools: &Path) -> Result<Self> {
        let path = tools.join("cuda_nvrtc/lib/libnvrtc.so.12");
        // SAFETY: NVIDIA's library has no requirement on when it is loaded.
        let library = unsafe { Library::new(&path) }
            .with_context(|| format!("cannot load {}", path.display()))?;
        let include = [
            "cuda_runtime/include",
            "cuda_nvcc/include",
            "cuda_cccl/include",
        ];
        Ok(Self {
            library,
            include: include.map(|folder| tools.join(folder)).to_vec(),
        })
    }

    /// Compiles a kernel to PTX.
    pub fn compile(&self, kernel: &Kernel, target: Multiprocessor) -> Result<Ptx> {
        let newest = target.version >= 90;
        let options = CompilationOptions {
            supports_features: CppSupportedFeatures {
                grid_constants: true,
                clusters: newest,
                fast_math: true,
                fast_tanh: true,
                elect_sync: newest,
                dp4a: true,
            },
            ..Default::default()
        };
        let definition = cubecl::define_kernel(&**kernel).map_err(|error| anyhow!("{error}"))?;
        let source = CppCompiler::<Cuda>::default()
            .compile(definition, &options)
            .map_err(|error| anyhow!("{error}"))?;
        let mut arguments = vec![format!(
            "--gpu-architecture={}",
            architecture(target.version)
        )];
        let include = self.include.iter();
        arguments.extend(include.map(|folder| format!("--include-path={}", folder.display())));
        Ok(Ptx {
            text: self.ptx(&source.to_string(), &arguments)?,
            dynamic_shared: u32::try_from(source.shared_memory_size)?,
        })
    }

    fn ptx(&self, source: &str, arguments: &[String]) -> Result<String> {
        let source = CString::new(source)?;
        let arguments: Vec<CString> = arguments
            .iter()
            .map(|argument| CString::new(argument.as_str()))
            .collect::<Result<_, _>>()?;
        let pointers: Vec<*const c_char> =
            arguments.iter().map(|argument| argument.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the functions have these types in nvrtc.h; every pointer outlives its call.
        unsafe {
            let create = self.library.get::<Create>(b"nvrtcCreateProgram\0")?;
            let compile = self.library.get::<Compile>(b"nvrtcCompileProgram\0")?;
            let destroy = self.library.get::<Destroy>(b"nvrtcDestroyProgram\0")?;
            let none = std::ptr::null();
            if create(
                &mut program,
                source.as_ptr(),
                none,
                0,
                std::ptr::null(),
                std::ptr::null(),
            ) != 0
            {
                bail!("NVRTC takes no program");
            }
            let failed = compile(program, pointers.len() as c_int, pointers.as_ptr()) != 0;
            let text = if failed {
                self.text(
                    program,
                    b"nvrtcGetProgramLogSize\0",
                    b"nvrtcGetProgramLog\0",
                )
            } else {
                self.text(program, b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0")
            };
            destroy(&mut program);
            if failed {
                bail!("NVRTC: {}", text?);
            }
            text
        }
    }

    /// A text of a program, from the functions with these names.
    ///
    /// # Safety
    ///
    /// The program is live, and the functions are NVRTC's for a size and a text.
    unsafe fn text(&self, program: Program, size_of: &[u8], text_of: &[u8]) -> Result<String> {
        let mut size = 0;
        // SAFETY: the caller's; the buffer has the size that NVRTC names.
        let bytes = unsafe {
            self.library.get::<Size>(size_of)?(program, &mut size);
            let mut bytes = vec![0u8; size + 1];
            self.library.get::<Text>(text_of)?(program, bytes.as_mut_ptr().cast());
            bytes
        };
        let text = CStr::from_bytes_until_nul(&bytes).context("a text without an end")?;
        Ok(text.to_string_lossy().into_owned())
    }
}
