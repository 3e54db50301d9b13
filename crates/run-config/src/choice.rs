//! Types of which a config file names the values.

use std::fmt;

use crate::Decay;
use lora_core::Bias;

/// The number format in which the layers compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// The best format of the device: bf16 on CUDA, f16 on Vulkan and Metal with matrix units for it, else f32.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32 (CUDA; products with 8-bit weights on CPUs with AVX512-BF16).
    Bf16,
    /// 16 bits, with loss scaling (GPUs that support it).
    F16,
    /// f32 with matrix products of TF32 precision (CUDA, Ampere and later).
    Tf32,
}

/// Whether the activations of a layer are kept for the backward pass or recomputed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// Recompute: about a third more time, and the memory of one layer instead of all layers.
    On,
    /// Keep everything.
    Off,
    /// Recompute if there is not enough memory to keep them.
    #[default]
    Auto,
}

/// What happens when a loss or gradient is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnNonFinite {
    /// The run stops, with a checkpoint of the step before.
    #[default]
    Stop,
    /// The step is skipped and the learning rate halved from there on, up to `max_skipped_steps` times.
    Skip,
}

/// What happens when the device's memory is too small for a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOutOfMemory {
    /// Micro-batches are halved and more of them accumulated: the same optimizer step, up to rounding.
    #[default]
    Halve,
    /// The run stops, with a checkpoint of the step before.
    Stop,
}

/// The number of examples that are computed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// This many.
    Rows(usize),
    /// As many as memory allows of the 8 · `gradient_accumulation_steps` examples of an optimizer step.
    /// The step is the same however they are divided.
    Auto,
}

impl BatchSize {
    /// Examples per micro-batch; for [`Auto`](Self::Auto), 8 per accumulation step.
    pub fn rows(self) -> usize {
        match self {
            Self::Rows(rows) => rows,
            Self::Auto => 8,
        }
    }
}

/// A type whose values have a name each in a config file.
pub(super) trait Choice: Copy + PartialEq + 'static {
    /// Each value with its name.
    const NAMES: &'static [(&'static str, Self)];

    /// The name of this value.
    fn name(self) -> &'static str {
        let found = Self::NAMES.iter().find(|(_, value)| *value == self);
        found.map_or("", |(name, _)| name)
    }
}

impl Choice for ComputeDtype {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("f16", Self::F16),
        ("tf32", Self::Tf32),
    ];
}

impl Choice for Checkpointing {
    const NAMES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

impl Choice for OnNonFinite {
    const NAMES: &'static [(&'static str, Self)] = &[("stop", Self::Stop), ("skip", Self::Skip)];
}

impl Choice for OnOutOfMemory {
    const NAMES: &'static [(&'static str, Self)] = &[("halve", Self::Halve), ("stop", Self::Stop)];
}

impl Choice for Bias {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("none", Self::None),
        ("lora_only", Self::LoraOnly),
        ("all", Self::All),
    ];
}

impl Choice for Decay {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("cosine", Self::Cosine),
        ("linear", Self::Linear),
        ("constant", Self::Constant),
    ];
}

/// As in a config file.
impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// As in a config file.
impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_name() {
        assert_eq!(ComputeDtype::Bf16.to_string(), "bf16");
        assert_eq!(Checkpointing::Off.to_string(), "off");
        assert_eq!(Decay::Linear.name(), "linear");
    }
}
