//! The GPU kernels compiled for real GPUs, on a machine without one.
//!
//! The program records what our own launches hand to CubeCL, compiles it as CubeCL would on the GPU, and asks NVIDIA's
//! assembler what became of it: registers, spills, shared memory. From these follows how many workgroups a
//! multiprocessor can hold. No driver is needed.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `occupancy.rs` | how many workgroups fit on a multiprocessor, and what limits them |
//! | `assembly.rs` | reading what NVIDIA's assembler and disassembler print |
//! | `table.rs` | the table, in Markdown |
//! | `main.rs` | the program; needs the feature `compilers`, as do the next files |
//! | `cases.rs` | the kernels and their settings: **add a kernel here** |
//! | `recorder.rs` | a device that runs nothing and keeps the kernels that are launched on it |
//! | `targets.rs` | the properties of the GPUs that are compiled for |
//! | `cuda.rs` | from a kernel to machine code, through LLVM or through NVRTC |
//! | `spirv.rs` | from a kernel to SPIR-V, and its check by `spirv-val` |
//!
//! `setup` installs NVIDIA's tools, which are on PyPI.

pub mod assembly;
pub mod occupancy;
pub mod table;
