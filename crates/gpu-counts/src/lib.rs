//! Counts the work of a computation on a GPU: kernel launches, uploads, blocking reads, bytes of
//! memory traffic and floating-point operations, by kind of operation.
//!
//! [`count`] runs the work and watches two layers below it: CubeCL reports every kernel launch, and Burn's fusion
//! reports which operations, with which shapes, a launch carries out. The numbers do not depend on how fast the
//! device is, so a software driver counts what a graphics card would be asked for. [`Mode::DryRun`] compiles the
//! kernels and drops the launches: a model of 8 billion parameters can be counted on a laptop.
//!
//! # What a byte count means
//!
//! A launch reads each of its input tensors once and writes each of its outputs once. That is the
//! least that the memory bus carries; a matrix product that reads an operand again for each tile of
//! its output moves more, unless a cache serves it. A selection of rows reads the rows, not the
//! table, and a write into a part of a tensor counts as that part. Operations that Burn fused into
//! one launch read the inputs from outside the group and write the outputs that are used later. If
//! Burn needs more than one launch for such a group, each further launch counts one write and one
//! read of the group's largest intermediate tensor.

#[cfg(feature = "cube")]
mod observers;
mod reads;

use std::collections::BTreeMap;
use std::fmt;

use burn::tensor::Device;
use serde::Serialize;

pub use reads::{read_floats, reads};

/// Whether kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They run.
    Run,
    /// They are compiled, counted and not run: memory is allocated, values are undefined.
    DryRun,
}

/// The main work of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Matrix products, with operations fused after them.
    Product,
    /// Attention, by a kernel for all of it.
    Attention,
    /// From packed integers to floats.
    Dequantize,
    /// Sums, means and maxima, with operations fused around them; softmax.
    Reduction,
    /// Chains of element-wise operations.
    ElementWise,
    /// Slices, concatenations, selections, changes of layout.
    Copy,
    /// Anything else: random numbers, kernels outside Burn's fusion.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Product => "matrix products",
            Self::Attention => "attention",
            Self::Dequantize => "dequantization",
            Self::Reduction => "reductions",
            Self::ElementWise => "element-wise chains",
            Self::Copy => "copies and selections",
            Self::Other => "other",
        })
    }
}

/// Sums over the launches of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct KindCounts {
    /// Kernel launches.
    pub launches: u64,
    /// Bytes read from the device's memory.
    pub bytes_read: u64,
    /// Bytes written to the device's memory.
    pub bytes_written: u64,
    /// Of both, the bytes that are written and read in between only because Burn did not fuse a
    /// group into one launch, as in builds without autotuning.
    pub unfused_bytes: u64,
    /// Floating-point operations of matrix products; a multiplication and an addition count as two.
    pub flops: u64,
}

/// The counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// By kind of launch.
    pub kinds: BTreeMap<Kind, KindCounts>,
    /// Tensors copied from the host to the device.
    pub uploads: u64,
    /// Bytes of these tensors.
    pub upload_bytes: u64,
    /// How often the host waited for numbers from the device: calls of [`read_floats`].
    pub reads: u64,
    /// Bytes held by the device's memory pools at the end, including free pages: the peak, because
    /// pools do not shrink by themselves. 0 in counts that were [extrapolated](Self::extrapolated):
    /// pages do not grow with the layers.
    pub reserved_bytes: u64,
    /// Launches by the operations that they carry out, with their numbers, to find waste.
    #[serde(skip)]
    pub details: BTreeMap<String, u64>,
}

impl Counts {
    /// The sums over all kinds.
    pub fn total(&self) -> KindCounts {
        self.kinds
            .values()
            .fold(KindCounts::default(), |sum, kind| KindCounts {
                launches: sum.launches + kind.launches,
                bytes_read: sum.bytes_read + kind.bytes_read,
                bytes_written: sum.bytes_written + kind.bytes_written,
                unfused_bytes: sum.unfused_bytes + kind.unfused_bytes,
                flops: sum.flops + kind.flops,
            })
    }

    /// Kernel launches.
    pub fn launches(&self) -> u64 {
        self.total().launches
    }

    /// Bytes read and written.
    pub fn bytes(&self) -> u64 {
        let total = self.total();
        total.bytes_read + total.bytes_written
    }

    /// Bytes read and written if every group that Burn fuses were one launch, as with autotuning.
    pub fn fused_bytes(&self) -> u64 {
        self.bytes() - self.total().unfused_bytes
    }

    /// `self + times · (more - less)`: the counts of a model with more layers, from two models with
    /// few layers.
    pub fn extrapolated(&self, more: &Self, less: &Self, times: u64) -> Self {
        let line = |at: u64, more: u64, less: u64| at + times * more.saturating_sub(less);
        let of = |counts: &Self, kind: Kind| counts.kinds.get(&kind).copied().unwrap_or_default();
        let mut kinds = BTreeMap::new();
        for kind in self.kinds.keys().chain(more.kinds.keys()) {
            let (at, more, less) = (of(self, *kind), of(more, *kind), of(less, *kind));
            kinds.insert(
                *kind,
                KindCounts {
                    launches: line(at.launches, more.launches, less.launches),
                    bytes_read: line(at.bytes_read, more.bytes_read, less.bytes_read),
                    bytes_written: line(at.bytes_written, more.bytes_written, less.bytes_written),
                    unfused_bytes: line(at.unfused_bytes, more.unfused_bytes, less.unfused_bytes),
                    flops: line(at.flops, more.flops, less.flops),
                },
            );
        }
        Self {
            kinds,
            uploads: line(self.uploads, more.uploads, less.uploads),
            upload_bytes: line(self.upload_bytes, more.upload_bytes, less.upload_bytes),
            reads: line(self.reads, more.reads, less.reads),
            reserved_bytes: 0,
            details: self.details.clone(),
        }
    }
}

/// Runs `work` and counts its work on `device`. The second value is `None` if nothing can be
/// counted: on the CPU backend, and in builds without a GPU backend.
///
/// Counting is process-wide: other work on a GPU at the same time is counted too.
///
/// # Panics
///
/// If `work` panics, or the device fails.
pub fn count<T>(device: &Device, mode: Mode, work: impl FnOnce() -> T) -> (T, Option<Counts>) {
    let device = device.clone().without_autodiff();
    #[cfg(feature = "cube")]
    if device.memory_pool_usage().is_some() {
        let (value, counts) = observers::count(&device, mode, work);
        return (value, Some(counts));
    }
    let _ = (device, mode);
    (work(), None)
}
