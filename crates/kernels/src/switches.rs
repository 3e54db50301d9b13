//! Switches for the kernels for GPUs, by name.

use std::sync::atomic::{AtomicU32, Ordering};

/// A kernel that can be switched off; Burn's composition is then used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Products with packed weights.
    Product,
    /// The same for few rows, as in decoding.
    FewRows,
    /// Sums of products with several packed weights in one launch.
    JointProduct,
    /// Attention.
    Attention,
    /// Products of low rank.
    LowRank,
    /// RMSNorm.
    RmsNorm,
    /// Rotary position embeddings.
    Rope,
    /// SwiGLU.
    SwiGlu,
    /// Cross entropy.
    CrossEntropy,
    /// AdamW and the norm of its gradient.
    AdamW,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Self; 10] = [
        Self::Product,
        Self::FewRows,
        Self::JointProduct,
        Self::Attention,
        Self::LowRank,
        Self::RmsNorm,
        Self::Rope,
        Self::SwiGlu,
        Self::CrossEntropy,
        Self::AdamW,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::FewRows => "few_rows",
            Self::JointProduct => "joint_product",
            Self::Attention => "attention",
            Self::LowRank => "low_rank",
            Self::RmsNorm => "rms_norm",
            Self::Rope => "rope",
            Self::SwiGlu => "swiglu",
            Self::CrossEntropy => "cross_entropy",
            Self::AdamW => "adamw",
        }
    }

    /// The kernel of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name)
    }

    /// Whether it is used on GPUs.
    pub fn is_on(self) -> bool {
        OFF.load(Ordering::Relaxed) & (1 << self as u32) == 0
    }
}

/// One bit per kernel that is switched off.
static OFF: AtomicU32 = AtomicU32::new(0);

/// Switches these kernels off in this process, and all others on.
pub fn switch_off(kernels: &[Kernel]) {
    let bits = kernels
        .iter()
        .fold(0, |bits, kernel| bits | 1 << *kernel as u32);
    OFF.store(bits, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_found_by_its_name() {
        for kernel in Kernel::ALL {
            assert_eq!(Kernel::from_name(kernel.name()), Some(kernel));
        }
        assert_eq!(Kernel::from_name("all"), None);
    }
}
