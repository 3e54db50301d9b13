//! Cross entropy on the CPU, in the memory of the logits.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::loss::{CrossEntropy, LossTerms};
use crate::{cpu, in_vectors};

/// [`crate::cross_entropy`] on the CPU.
pub fn cross_entropy(logits: Tensor<2>, targets: &[u32]) -> CrossEntropy {
    let vocab = logits.dims()[1];
    let mut logits = cpu::values(logits);
    let rows = logits.as_mut_slice().par_chunks_exact_mut(vocab);
    let rows = rows.zip(targets).map(|(row, target)| {
        let (row_loss, best) = cross_entropy_row(row, *target as usize);
        (row_loss, best.unwrap_or(0) as u32 == *target)
    });
    let rows: Vec<(f64, bool)> = rows.collect();
    CrossEntropy {
        gradient: logits.into_tensor(),
        terms: LossTerms::OnHost {
            loss: rows.iter().map(|(loss, _)| loss).sum(),
            hits: rows.into_iter().map(|(_, hit)| hit).collect(),
        },
    }
}

in_vectors! {
    /// Turns logits into the gradient of the loss. Returns the loss, and the index of the first largest logit, as
    /// argmax does; `None` if all logits are NaN.
    fn cross_entropy_row(logits: &mut [f32], target: usize) -> (f64, Option<usize>) {
        let largest = cpu::max(logits);
        let best = logits.iter().position(|logit| *logit == largest);
        let chosen = logits[target];
        let sum = cpu::exp_and_sum(logits, largest);
        let scale = 1.0 / sum;
        for probability in logits.iter_mut() {
            *probability *= scale;
        }
        logits[target] -= 1.0;
        // The maximum ignores NaN, the sum does not.
        (largest as f64 + (sum as f64).ln() - chosen as f64, best)
    }
}
