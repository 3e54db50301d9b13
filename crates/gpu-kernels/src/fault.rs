//! Fault injection: kernels made wrong on purpose, for a test that the tests notice it.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing.
    None,
    /// Quantized product: the scale of the next block.
    Scale,
    /// Quantized product: the last step along the inner dimension is left out.
    Depth,
    /// Sum of products: the last one is left out.
    Member,
    /// Attention: the segments are not compared.
    Mask,
    /// Attention: the sliding window is ignored.
    Window,
    /// Attention: what was summed under an earlier maximum is not corrected.
    Correction,
    /// Low-rank products: one of four partial sums is left out.
    Part,
    /// Low-rank products: the gain of the norm before them is left out.
    Gain,
    /// RMSNorm: the mean of one value more than there is.
    Mean,
    /// SwiGLU: the slope of the gate is its sigmoid.
    Slope,
    /// Sum of squares: a partial sum is left out.
    Squares,
    /// AdamW: the second moment's bias is not corrected.
    Bias,
    /// Cross entropy: the one-hot vector's place is off by one.
    Target,
}

const ALL: [Fault; 14] = [
    Fault::None,
    Fault::Scale,
    Fault::Depth,
    Fault::Member,
    Fault::Mask,
    Fault::Window,
    Fault::Correction,
    Fault::Part,
    Fault::Gain,
    Fault::Mean,
    Fault::Target,
    Fault::Slope,
    Fault::Squares,
    Fault::Bias,
];

static CURRENT: AtomicUsize = AtomicUsize::new(0);

/// Makes the kernels that are launched from now on wrong, for the whole process. For tests.
pub fn inject(fault: Fault) {
    let index = ALL.iter().position(|other| *other == fault);
    CURRENT.store(index.unwrap_or(0), Ordering::Relaxed);
}

/// The fault of kernels that are launched now.
pub(crate) fn current() -> Fault {
    ALL[CURRENT.load(Ordering::Relaxed)]
}
