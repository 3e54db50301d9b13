//! Cross entropy as a composition of Burn's operations.

use burn::tensor::{DType, IndexingUpdateOp, Tensor};

use crate::loss::{CrossEntropy, LossTerms, Targets};
use crate::spoil::spoilt;

pub fn cross_entropy(logits: Tensor<2>, targets: Targets) -> CrossEntropy {
    let (m, device, targets) = (targets.ids.len(), logits.device(), targets.on_device);
    let best = logits.clone().argmax(1).reshape([m]);
    let hits = best.equal(targets.clone()).float().cast(DType::F32);
    let targets = targets.reshape([m, 1]);
    let chosen = logits.clone().gather(1, targets.clone());
    let minus_one = Tensor::<2>::full([m, 1], -1.0, (&device, DType::F32));
    let largest = logits.clone().max_dim(1);
    let exponentials = (logits - largest.clone()).exp();
    let sum = exponentials.clone().sum_dim(1);
    let probabilities = exponentials / sum.clone();
    let loss = (sum.log() + largest - chosen).sum();
    let gradient = probabilities.scatter(1, targets, minus_one, IndexingUpdateOp::Add);
    CrossEntropy {
        gradient: spoilt("cross_entropy", gradient),
        terms: LossTerms::OnDevice { loss, hits },
    }
}
