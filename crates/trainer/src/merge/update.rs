//! What an adapter adds to a weight as a model's files hold it, some rows at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use llama_burn::LlamaConfig;
use lora_core::LoraConfig;
use lora_core::cpu::{self, Matrix, MatrixMut, Threads};

use crate::peft::{AdapterError, AdapterPair, AdapterTensors, tensor_names};

/// One weight's update: W becomes W + γ·(A·B)ᵀ, for W `[d_out, d_in]` as Hugging Face lays it out.
pub(super) struct Update {
    pair: AdapterPair,
    scale: f32,
}

impl Update {
    /// `γ·(A·B)ᵀ` of these rows of the weight, `[rows, d_in]`.
    pub(super) fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut delta = vec![0.0; rows.len() * self.pair.d_in];
        self.add(1.0, rows, &mut delta);
        delta
    }

    /// Adds `sign` times the update of these rows to `values`, `[rows, d_in]`.
    pub(super) fn add(&self, sign: f32, rows: Range<usize>, values: &mut [f32]) {
        let AdapterPair {
            d_in,
            d_out,
            r,
            a,
            b,
            ..
        } = &self.pair;
        let (d_in, d_out, r) = (*d_in, *d_out, *r);
        // B's columns of these rows, turned.
        let b = Matrix::strided(&b[rows.start..], [rows.len(), r], [1, d_out]);
        let a = Matrix::new(a, d_in, r, r).transposed();
        let output = MatrixMut::new(values, rows.len(), d_in, d_in);
        cpu::multiply(output, true, sign * self.scale, b, a, Threads::All);
    }

    /// The weight's shape, `[d_out, d_in]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.pair.d_out, self.pair.d_in]
    }
}

/// The updates of a whole adapter, by the names of the tensors they change.
///
/// # Errors
///
/// A module that the adapter's configuration selects and that has no matrices, matrices of a module that it
/// does not select or that the model does not have, or of another shape: by PEFT's name.
pub(super) fn updates(
    model: &LlamaConfig,
    lora: &LoraConfig,
    tensors: AdapterTensors,
) -> Result<BTreeMap<String, Update>, AdapterError> {
    let selector = lora.selector()?;
    let mut linears = BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for (name, d_in, d_out, _) in model.layer_linears() {
            linears.insert(format!("model.layers.{layer}.{name}"), [d_in, d_out]);
        }
    }
    let selected: BTreeSet<&String> = linears.keys().filter(|m| selector.matches(m)).collect();
    if let Some(module) = selected.iter().find(|m| !tensors.modules.contains_key(**m)) {
        let [name, _] = tensor_names(module);
        return Err(AdapterError::Missing { name });
    }
    let mut updates = BTreeMap::new();
    for (module, pair) in tensors.modules {
        let [a_name, b_name] = tensor_names(&module);
        if !selected.contains(&module) {
            return Err(AdapterError::Unexpected { name: a_name });
        }
        let [d_in, d_out] = linears[&module];
        if pair.d_in != d_in {
            return Err(AdapterError::shape(
                a_name,
                &[pair.r, d_in],
                &[pair.r, pair.d_in],
            ));
        }
        if pair.d_out != d_out {
            return Err(AdapterError::shape(
                b_name,
                &[d_out, pair.r],
                &[pair.d_out, pair.r],
            ));
        }
        let scale = lora.scale() as f32;
        updates.insert(format!("{module}.weight"), Update { pair, scale });
    }
    Ok(updates)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use lora_core::CounterRng;

    /// An update of random matrices, not small.
    pub(in super::super) fn update(d_in: usize, d_out: usize, size: f64) -> Update {
        let mut rng = CounterRng::new(4);
        let mut random = |count: usize| -> Vec<f32> {
            (0..count).map(|_| (rng.normal() * size) as f32).collect()
        };
        let (a, b) = (random(d_in * 3), random(3 * d_out));
        Update {
            pair: AdapterPair::new(d_in, 3, d_out, a, b),
            scale: 2.5,
        }
    }

    #[test]
    fn rows_of_an_update_are_the_plain_sums() {
        let update = update(7, 10, 1.0);
        for rows in [0..10, 3..4, 4..10] {
            let got = update.rows(rows.clone());
            for (i, row) in rows.enumerate() {
                for column in 0..7 {
                    let pair = &update.pair;
                    let product = |k: usize| pair.a[column * 3 + k] * pair.b[k * 10 + row];
                    let expected = 2.5 * (0..3).map(product).sum::<f32>();
                    assert!((got[i * 7 + column] - expected).abs() < 1e-5);
                }
            }
        }
    }
}
