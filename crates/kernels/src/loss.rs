//! Cross entropy of logits, with its gradient in the logits' memory if possible.

use burn::tensor::{DType, Device, Int, Tensor};

use crate::dispatch::{of, of_device};

/// Bytes of logits that exist at a time on the CPU, so that they stay in its caches.
pub const LOGITS_BYTES: usize = 32 << 20;

/// As [`LOGITS_BYTES`] on a GPU: 1,046 positions of a vocabulary of 128,256. Every chunk of positions reads the output
/// layer's weights once forward and once backward.
pub const LOGITS_BYTES_GPU: usize = 512 << 20;

/// Bytes of logits that exist at a time on this device: on a GPU at most the size of a buffer that a kernel can bind.
pub fn logits_bytes(device: &Device) -> usize {
    of_device(device).logits_bytes(device)
}

/// The target tokens of some positions.
#[derive(Debug, Clone)]
pub struct Targets<'a> {
    /// On the host.
    pub ids: &'a [u32],
    /// The same on the device, `[ids.len()]`.
    pub on_device: Tensor<1, Int>,
}

/// The gradient of the summed loss with respect to the logits, `softmax(logits) - one_hot(target)`, times a scale, and
/// the loss.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `[m, vocab]`.
    pub gradient: Tensor<2>,
    /// The summed loss and the hits.
    pub terms: LossTerms,
}

/// The summed cross entropy in nats, and the hits: the positions whose most likely token is the target.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One per chunk of a batch.
pub enum LossTerms {
    /// Computed on the host.
    OnHost {
        /// The sum of the cross entropies.
        loss: f64,
        /// One per position.
        hits: Vec<bool>,
    },
    /// Still being computed by a device that the host need not wait for.
    OnDevice {
        /// `[1]`
        loss: Tensor<1>,
        /// 1 for a hit, else 0: `[m]`.
        hits: Tensor<1>,
    },
}

impl CrossEntropy {
    /// With the gradient times `scale`, in `dtype`.
    pub(crate) fn scaled(mut self, scale: f64, dtype: DType) -> Self {
        if scale != 1.0 {
            self.gradient = self.gradient.mul_scalar(scale);
        }
        self.gradient = self.gradient.cast(dtype);
        self
    }
}

/// Cross entropy of `logits`, `[m, vocab]` in f32. The gradient is multiplied by `scale`, a loss scale, and then has the
/// type `dtype`.
///
/// # Panics
///
/// If there is not one target per row.
pub fn cross_entropy(
    logits: Tensor<2>,
    targets: Targets,
    scale: f64,
    dtype: DType,
) -> CrossEntropy {
    assert_eq!(logits.dims()[0], targets.ids.len(), "one target per row");
    of(&logits).cross_entropy(logits, targets, scale, dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, composed, normal};
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{Tolerance, Transaction};

    #[test]
    fn the_kernel_and_the_composition_compute_what_the_autodiff_graph_computes() {
        let device = Device::flex().autodiff();
        let logits = normal([7, 90], 3.0, &mut CounterRng::new(4), &device).require_grad();
        let ids = [3u32, 89, 0, 41, 41, 7, 60];
        let on_device = Tensor::<1, Int>::from_data(ids.map(|id| id as i32), &Device::flex());
        let index = on_device.clone().reshape([7, 1]);
        let loss = log_softmax(logits.clone(), 1).gather(1, index).sum().neg();
        let graph = loss.backward();
        let expected = logits.grad(&graph).unwrap().into_data();
        let expected_loss = loss.into_scalar::<f32>();
        let logits = logits.inner();
        let best = logits.clone().argmax(1).into_data().try_to_vec::<i64>();
        let best = best.unwrap_or_else(|_| {
            let best = logits.clone().argmax(1).into_data().convert::<i64>();
            best.try_to_vec::<i64>().unwrap()
        });
        let expected_hits: Vec<bool> = best
            .iter()
            .zip(ids)
            .map(|(best, id)| *best == i64::from(id))
            .collect();
        let targets = || Targets {
            ids: &ids,
            on_device: on_device.clone(),
        };
        let native = cross_entropy(logits.clone(), targets(), 1.0, DType::F32);
        assert!(matches!(native.terms, LossTerms::OnHost { .. }));
        let composed = composed::loss::cross_entropy(logits, targets());
        for CrossEntropy { gradient, terms } in [native, composed] {
            // Probabilities; Burn's exponential and ours differ in the last bits.
            let tolerance = Tolerance::absolute(1e-6);
            gradient
                .into_data()
                .assert_approx_eq::<f32>(&expected, tolerance);
            let (loss, hits) = match terms {
                LossTerms::OnHost { loss, hits } => (loss as f32, hits),
                LossTerms::OnDevice { loss, hits } => {
                    let read = Transaction::default()
                        .register(loss)
                        .register(hits)
                        .execute();
                    let read = read
                        .into_iter()
                        .map(|data| data.try_to_vec::<f32>().unwrap());
                    let read: Vec<Vec<f32>> = read.collect();
                    (read[0][0], read[1].iter().map(|hit| *hit == 1.0).collect())
                }
            };
            assert!(
                (loss - expected_loss).abs() < 1e-4,
                "{loss} {expected_loss}"
            );
            assert_eq!(hits, expected_hits);
        }
    }
}
