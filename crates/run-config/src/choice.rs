//! The keys whose values are words.

use std::fmt;

use lora_core::Init;

use crate::Decay;

/// The number format that the layers compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// What suits the device: bf16 on CUDA, f16 on Vulkan and Metal where there are matrix units for it, else f32.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32 (CUDA; the CPU's products with 8-bit weights where it has AVX512-BF16).
    Bf16,
    /// 16 bits (GPUs that have it), with a loss scale.
    F16,
    /// f32 whose products keep 11 bits of each factor (CUDA, Ampere and later).
    Tf32,
}

/// Whether a layer's activations are kept for the backward pass or computed again there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// Recompute: about a third more time, and the memory of one layer instead of all.
    On,
    /// Keep everything.
    Off,
    /// Recompute where keeping would not fit.
    #[default]
    Auto,
}

/// What happens when a loss or gradient is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnNonFinite {
    /// The run stops, with a checkpoint of the step before.
    #[default]
    Stop,
    /// The step is left out and the learning rate halved from there on, up to `max_skipped_steps` times.
    Skip,
}

/// What happens when the device's memory is too small for a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOutOfMemory {
    /// Micro-batches are halved and more of them accumulated: the same update, up to rounding.
    #[default]
    Halve,
    /// The run stops, with a checkpoint of the step before.
    Stop,
}

/// How many rows are computed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// So many.
    Rows(usize),
    /// As many as memory allows of the rows of an update, which are 8 · `gradient_accumulation_steps`.
    /// The update is the same however they are divided.
    Auto,
}

impl BatchSize {
    /// The rows of a micro-batch; for [`Auto`](Self::Auto), what an update's rows are counted in.
    pub fn rows(self) -> usize {
        match self {
            Self::Rows(rows) => rows,
            Self::Auto => 8,
        }
    }
}

/// A type whose values are one word each in a config file.
pub(super) trait Word: Copy + PartialEq + 'static {
    /// Each value with its word.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|(_, value)| *value == self);
        found.map_or("", |(word, _)| word)
    }
}

impl Word for ComputeDtype {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("f16", Self::F16),
        ("tf32", Self::Tf32),
    ];
}

impl Word for Checkpointing {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

impl Word for OnNonFinite {
    const WORDS: &'static [(&'static str, Self)] = &[("stop", Self::Stop), ("skip", Self::Skip)];
}

impl Word for OnOutOfMemory {
    const WORDS: &'static [(&'static str, Self)] = &[("halve", Self::Halve), ("stop", Self::Stop)];
}

impl Word for Decay {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("cosine", Self::Cosine),
        ("linear", Self::Linear),
        ("constant", Self::Constant),
    ];
}

impl Word for Init {
    const WORDS: &'static [(&'static str, Self)] =
        &[("kaiming", Self::Kaiming), ("gaussian", Self::Gaussian)];
}

/// As in a config file.
impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// As in a config file.
impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_word() {
        assert_eq!(ComputeDtype::Bf16.to_string(), "bf16");
        assert_eq!(Checkpointing::Off.to_string(), "off");
        assert_eq!(
            (Decay::Linear.word(), Init::Gaussian.word()),
            ("linear", "gaussian")
        );
    }
}
