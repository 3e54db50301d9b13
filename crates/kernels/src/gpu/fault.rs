//! Kernels made wrong on purpose, for a test that the tests notice it.

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing.
    None,
    /// Quantized product: the scale of the next block.
    Scale,
    /// Quantized product: the last step along the inner dimension is left out.
    Depth,
    /// Attention: the segments are not compared.
    Mask,
    /// Attention: what was summed under an earlier maximum is not corrected.
    Correction,
    /// Low-rank products: one of four partial sums is left out.
    Part,
    /// RMSNorm: the mean of one value more than there is.
    Mean,
    /// Cross entropy: the one-hot vector's place is off by one.
    Target,
}

/// The fault of kernels that are launched now.
#[cfg(not(test))]
pub const fn current() -> Fault {
    Fault::None
}

#[cfg(test)]
pub use injected::{current, inject};

#[cfg(test)]
mod injected {
    use std::sync::Mutex;

    use super::Fault;

    static CURRENT: Mutex<Fault> = Mutex::new(Fault::None);

    pub fn current() -> Fault {
        *CURRENT.lock().unwrap()
    }

    pub fn inject(fault: Fault) {
        *CURRENT.lock().unwrap() = fault;
    }
}
