//! How many workgroups of a kernel a multiprocessor holds at a time.
//!
//! The limits are those of NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities"; the rounding is that of the
//! Occupancy Calculator.

/// A kind of multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multiprocessor {
    /// The compute capability: 8.0 is 80.
    pub version: u32,
    /// Warps at a time.
    pub warps: u32,
    /// Workgroups at a time.
    pub blocks: u32,
    /// Bytes of shared memory for all workgroups.
    pub shared: u32,
}

/// The multiprocessors that kernels are compiled for: A100, RTX 4090 and L4, H100.
pub const MULTIPROCESSORS: [Multiprocessor; 3] = [
    Multiprocessor {
        version: 80,
        warps: 64,
        blocks: 32,
        shared: 164 * 1024,
    },
    Multiprocessor {
        version: 89,
        warps: 48,
        blocks: 24,
        shared: 100 * 1024,
    },
    Multiprocessor {
        version: 90,
        warps: 64,
        blocks: 32,
        shared: 228 * 1024,
    },
];

/// Threads of a warp.
pub const WARP: u32 = 32;
/// Registers of each of a multiprocessor's parts.
const REGISTERS: u32 = 16 * 1024;
/// Parts of a multiprocessor, each with registers and warps of its own.
const PARTS: u32 = 4;
/// A warp's registers are a multiple of this.
const REGISTER_UNIT: u32 = 256;
/// A workgroup's shared memory is a multiple of this.
const SHARED_UNIT: u32 = 128;
/// Shared memory that the system takes from each workgroup.
const RESERVED: u32 = 1024;

impl Multiprocessor {
    /// The most shared memory of a workgroup, in bytes.
    pub const fn shared_of_a_block(&self) -> u32 {
        self.shared - RESERVED
    }
}

/// What a workgroup of a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Threads of the workgroup.
    pub threads: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of shared memory.
    pub shared: u32,
}

/// What keeps a multiprocessor from holding one more workgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// All registers are taken.
    Registers,
    /// All shared memory is taken.
    SharedMemory,
    /// All warps are taken.
    Threads,
    /// The number of workgroups is at its maximum.
    Blocks,
}

impl Limit {
    /// What the table calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Registers => "registers",
            Self::SharedMemory => "shared memory",
            Self::Threads => "threads",
            Self::Blocks => "block count",
        }
    }
}

/// The workgroups that fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupancy {
    /// Workgroups at a time; 0 if not even one fits.
    pub blocks: u32,
    /// Their warps.
    pub warps: u32,
    /// What does not allow one more; several if they run out together.
    pub limits: Vec<Limit>,
}

/// How many workgroups fit on a multiprocessor.
pub fn occupancy(multiprocessor: &Multiprocessor, needs: Needs) -> Occupancy {
    let warps = needs.threads.div_ceil(WARP).max(1);
    let of_warp = (needs.registers * WARP).next_multiple_of(REGISTER_UNIT);
    let by_registers = match of_warp {
        0 => u32::MAX,
        registers => REGISTERS / registers * PARTS / warps,
    };
    let shared = (needs.shared + RESERVED).next_multiple_of(SHARED_UNIT);
    let bounds = [
        (Limit::Registers, by_registers),
        (Limit::SharedMemory, multiprocessor.shared / shared),
        (Limit::Threads, multiprocessor.warps / warps),
        (Limit::Blocks, multiprocessor.blocks),
    ];
    let blocks = bounds.iter().map(|(_, bound)| *bound).min().unwrap_or(0);
    let reached = bounds.iter().filter(|(_, bound)| *bound == blocks);
    Occupancy {
        blocks,
        warps: blocks * warps,
        limits: reached.map(|(limit, _)| *limit).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(version: u32, threads: u32, registers: u32, shared: u32) -> (u32, u32, Vec<Limit>) {
        let multiprocessor = MULTIPROCESSORS.iter().find(|it| it.version == version);
        let needs = Needs {
            threads,
            registers,
            shared,
        };
        let result = occupancy(multiprocessor.expect("in the list"), needs);
        (result.blocks, result.warps, result.limits)
    }

    /// Worked out by hand from the limits.
    #[test]
    fn the_scarcest_resource_limits_the_workgroups() {
        // 65,536 registers: 8 warps of 128 × 32 in each of four parts…
        assert_eq!(of(80, 64, 128, 0), (8, 16, vec![Limit::Registers]));
        // …and 255 registers are rounded up to 256.
        assert_eq!(of(80, 64, 255, 0), (4, 8, vec![Limit::Registers]));
        assert_eq!(
            of(80, 256, 32, 0),
            (8, 64, vec![Limit::Registers, Limit::Threads])
        );
        // 48 KiB and the reserved KiB: 3 times in 164 KiB, 4 times in 228 KiB, 2 times in 100 KiB.
        assert_eq!(
            of(80, 128, 32, 48 * 1024),
            (3, 12, vec![Limit::SharedMemory])
        );
        assert_eq!(
            of(90, 128, 32, 48 * 1024),
            (4, 16, vec![Limit::SharedMemory])
        );
        assert_eq!(
            of(89, 128, 32, 48 * 1024),
            (2, 8, vec![Limit::SharedMemory])
        );
        // Small workgroups: their number is limited before their threads.
        assert_eq!(of(80, 32, 16, 0), (32, 32, vec![Limit::Blocks]));
        assert_eq!(of(89, 1024, 16, 0), (1, 32, vec![Limit::Threads]));
    }

    #[test]
    fn a_kernel_that_does_not_fit_has_no_workgroups() {
        assert_eq!(of(89, 64, 32, 100 * 1024).0, 0);
        assert_eq!(of(90, 64, 32, 227 * 1024).0, 1);
    }
}
