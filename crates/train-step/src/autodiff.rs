//! The passes of a step in Burn's autodiff graph: the reference that the manual passes are compared with.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor};
use data::Batch;
use gpu_counts::read_floats;
use llama_burn::Llama;
use lora_core::CounterRng;

use crate::gradients::AdapterGradients;
use crate::loss::{LossSums, counted, token_ids};

/// As [`accumulate`](crate::gradients::accumulate), with the whole model in Burn's autodiff graph.
pub fn accumulate_in_graph(
    model: &Llama,
    batch: &Batch,
    dropout_seed: u64,
    into: &mut AdapterGradients,
) {
    let seeds = CounterRng::new(dropout_seed);
    let context = model.context(&batch.tokens);
    let mut hidden = model.embed(&batch.tokens).autodiff();
    for (index, layer) in model.layers.iter().enumerate() {
        let seed = seeds.fork(index as u64).next_u64();
        hidden = layer.forward(hidden, &context, Some(seed));
    }
    let positions = token_ids(&batch.target_positions, &hidden.device().without_autodiff());
    let (sums, loss) = loss_in_graph(model, hidden.select(0, positions), batch);
    into.totals.add(sums);
    let mut of_loss = loss.backward();
    let params = model.trainable().flat_map(|(_, params)| params);
    let gradients = params.filter_map(|param| {
        let gradient = param.val().grad_remove(&mut of_loss)?;
        Some((param.id, gradient))
    });
    let mut gradients: Vec<_> = gradients.collect();
    for param in model
        .trained_whole()
        .into_iter()
        .flat_map(|(_, parts)| parts)
    {
        let gradient = param.take_gradient(&mut of_loss);
        gradients.extend(gradient.map(|gradient| (param.id(), gradient)));
    }
    into.add(gradients);
}

/// The summed loss in the autodiff graph of `hidden`, for a backward pass.
///
/// # Shapes
///
/// - `hidden`: `[m, hidden]`, the last layer's output at the loss positions
fn loss_in_graph(model: &Llama, hidden: Tensor<2>, batch: &Batch) -> (LossSums, Tensor<1>) {
    let tokens = batch.target_ids.len();
    let targets = token_ids(&batch.target_ids, &hidden.device().without_autodiff());
    let logits = model.logits(hidden);
    let best = logits.clone().inner().argmax(1).reshape([tokens]);
    let log_probabilities = log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1]));
    let loss = log_probabilities.sum().neg();
    let (best, sum) = (best.float().cast(DType::F32), loss.clone().inner());
    let read =
        read_floats(Tensor::cat(vec![sum, best], 0)).unwrap_or_else(|error| panic!("{error}"));
    let hit = |(best, target): (&f32, &u32)| *best as u32 == *target;
    let hits: Vec<bool> = read[1..].iter().zip(&batch.target_ids).map(hit).collect();
    (
        counted(f64::from(read[0]), &hits, &batch.targets_per_example),
        loss,
    )
}
