//! One device compared with the numbers of transformers and PEFT.

use std::collections::BTreeMap;

use burn::tensor::{Device, FloatDType, Tensor};
use llama_burn::{InitialAdapters, Llama, LlamaConfig, Weights};
use lora_core::{LoraConfig, Quantization};

use super::difference::{curves, max_abs, relative};
use super::reference::Reference;
use super::run;
use super::{Check, ParityError, Section};
use device::ModelOptions;
use peft::{AdapterTensors, tensor_names, vector_name};

// Both sides compute in f32 and differ only in the order of their sums. On models of this kind that
// gives 1e-6 to 1e-5 on logits of size 1 to 10, 1e-6 relative on gradients; a wrong scale, a
// missing bias or a position shifted by one gives 1e-2 and more.
const LOGITS: f64 = 1e-4;
const LOSS: f64 = 1e-5;
/// A trained model on random tokens has losses of 20, from logits of 30: there 1e-5 is a few steps
/// of f32 (2e-6 at 20), which neither side can guarantee. Above a loss of 5 the tolerance grows
/// with it.
const LOSS_RELATIVE: f64 = 2e-6;
const GRADIENT: f64 = 1e-4;
/// Singular vectors of f32 matrices: the rounding, 1e-7 of the largest singular value, over the distance between two
/// singular values, which is some percent of it.
const INITIAL: f64 = 1e-4;
const TRAIN_LOSSES: f64 = 1e-3;
const MERGED: f64 = 1e-6;
/// AdamW divides by the gradient's size: an element whose gradient is rounding noise moves by a
/// full step in a direction determined by rounding. Few elements of a matrix are affected.
const TRAINED: f64 = 1e-2;

/// Checks every quantity of `reference` on `device`, in f32 with dense weights.
pub(super) fn check(
    reference: &Reference,
    learning_rate: f64,
    device: &Device,
    name: &str,
) -> Result<Section, ParityError> {
    let config = LlamaConfig::from_file(&reference.model)?;
    reference.batch.tokens.check(&config)?;
    if reference.vocab != config.vocab_size {
        return Err(ParityError::Vocabulary {
            expected: config.vocab_size,
            got: reference.vocab,
        });
    }
    let options = ModelOptions {
        quantization: Quantization::None,
        autodiff: true,
        ..ModelOptions::default()
    };
    let load = |initial: Option<&mut InitialAdapters>| {
        let dtype = FloatDType::F32;
        options.load_with(
            &reference.model,
            &config,
            device,
            dtype,
            None,
            initial,
            |_| {},
        )
    };
    let base = load(None)?;
    let lora = &reference.config.lora;
    let mut checks = Vec::new();
    let adapted = match reference.init {
        None => reference.adapter.put_on(base.clone(), lora)?,
        Some(init) => {
            let lora = LoraConfig {
                init,
                ..lora.clone()
            };
            let mut initial = InitialAdapters::new(&lora, &config, 1)?;
            let rest = load(initial.as_mut())?;
            let factors = initial.map(|initial| initial.factors).unwrap_or_default();
            let ours = AdapterTensors::from_factors(factors);
            checks.push(initial_adapters(&ours, &reference.adapter)?);
            // The reference's factors, whose singular vectors may have other signs.
            reference.adapter.put_on(rest, &lora)?
        }
    };

    let mut left_out = Vec::new();
    let base_logits = run::logits(&base, &reference.batch)?;
    checks.push(logits(
        "base_logits",
        &base_logits,
        &reference.base_logits,
        reference.vocab,
    ));
    let with_adapter = run::logits(&adapted, &reference.batch)?;
    checks.push(logits(
        "logits",
        &with_adapter,
        &reference.logits,
        reference.vocab,
    ));
    let loss = run::loss(&adapted, &reference.batch);
    checks.push(Check {
        quantity: "loss".into(),
        difference: (loss - reference.loss).abs(),
        tolerance: LOSS.max(LOSS_RELATIVE * reference.loss.abs()),
        note: format!("absolute; {loss:.6}, reference {:.6}", reference.loss),
    });
    match &reference.train_losses {
        None => left_out.push("training: the reference has no train_losses".into()),
        Some(losses) => {
            checks.extend(training(reference, adapted, losses, learning_rate)?);
        }
    }
    match &reference.merged {
        None => left_out.push("merged weights: the folder has no merged/".into()),
        Some(folder) => {
            // The reference's trained adapter, so that only the merge is compared.
            let lora = &reference.trained_config.lora;
            let model = reference.trained.put_on(base, lora)?;
            let mut merged = Weights::open(folder)?;
            merged.check(&config.tensor_shapes())?;
            checks.push(merged_weights(&model, &mut merged)?);
            checks.push(merged_on_the_host(reference, &config, &mut merged)?);
        }
    }
    Ok(Section {
        title: format!(
            "{name} against transformers and PEFT ({})",
            reference.model.display()
        ),
        checks,
        left_out,
    })
}

/// Compares adapters that were taken out of the base model's weights, each singular vector with the sign of the
/// reference's.
fn initial_adapters(
    got: &AdapterTensors,
    reference: &AdapterTensors,
) -> Result<Check, ParityError> {
    let mut got = got.clone();
    for (module, pair) in &mut got.modules {
        let Some(expected) = reference.modules.get(module) else {
            continue;
        };
        let (r, d_out) = (pair.r, pair.d_out);
        for k in 0..r.min(expected.r) {
            let rows = pair.b[k * d_out..].iter().zip(&expected.b[k * d_out..]);
            let dot: f32 = rows.take(d_out).map(|(x, y)| x * y).sum();
            if dot < 0.0 {
                let row = &mut pair.b[k * d_out..(k + 1) * d_out];
                row.iter_mut().for_each(|value| *value = -*value);
                let column = pair.a.iter_mut().skip(k).step_by(r);
                column.for_each(|value| *value = -*value);
            }
        }
    }
    let expected = by_tensor(reference);
    tensors("initial adapters", INITIAL, &by_tensor(&got), &expected)
}

/// Gradients, and AdamW steps.
fn training(
    reference: &Reference,
    adapted: Llama,
    expected: &[f64],
    learning_rate: f64,
) -> Result<Vec<Check>, ParityError> {
    let mut checks = Vec::new();
    for (gradient_checkpointing, quantity) in [
        (false, "LoRA gradients"),
        (true, "LoRA gradients, gradient checkpointing"),
    ] {
        let got = run::gradients(&adapted, &reference.batch, gradient_checkpointing)?;
        checks.push(tensors(quantity, GRADIENT, &got, &reference.gradients)?);
    }
    let steps = expected.len();
    let ratio = reference.loraplus_lr_ratio;
    let (trained, losses) = run::train(adapted, &reference.batch, steps, learning_rate, ratio);
    let (difference, step) = curves(&losses, expected);
    checks.push(Check {
        quantity: format!("train_losses, {steps} AdamW steps"),
        difference,
        tolerance: TRAIN_LOSSES,
        note: format!("relative; largest at step {step}, learning rate {learning_rate}"),
    });
    let trained = AdapterTensors::from_model(&trained)?;
    let trained = match reference.init {
        None => trained,
        Some(_) => trained.for_base_model(&reference.adapter),
    };
    let mut got = by_tensor(&trained);
    let mut expected = by_tensor(&reference.trained);
    // PEFT also saves tables that it does not train.
    let config = LlamaConfig::from_file(&reference.model)?;
    for (name, _) in config.whole_tensors(&reference.config.lora)? {
        let whole = |adapter: &AdapterTensors| Some(adapter.whole.get(&name)?.values.clone());
        let name = run::whole_name(&name);
        got.extend(whole(&trained).map(|values| (name.clone(), values)));
        expected.extend(whole(&reference.trained).map(|values| (name, values)));
    }
    checks.push(tensors("adapter after training", TRAINED, &got, &expected)?);
    Ok(checks)
}

fn logits(quantity: &str, got: &[f32], expected: &[f32], vocab: usize) -> Check {
    let (difference, worst) = max_abs(got, expected);
    Check {
        quantity: quantity.into(),
        difference,
        tolerance: LOGITS,
        note: format!(
            "largest absolute; packed position {}, token {}",
            worst / vocab,
            worst % vocab
        ),
    }
}

/// Compares named tensors; the reported difference is the worst tensor's.
pub(super) fn tensors(
    quantity: &str,
    tolerance: f64,
    got: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) -> Result<Check, ParityError> {
    if let Some(name) = expected.keys().find(|name| !got.contains_key(*name)) {
        return Err(ParityError::OneSided {
            quantity: quantity.into(),
            name: name.clone(),
            side: "the reference",
        });
    }
    if let Some(name) = got.keys().find(|name| !expected.contains_key(*name)) {
        return Err(ParityError::OneSided {
            quantity: quantity.into(),
            name: name.clone(),
            side: "this device",
        });
    }
    let mut worst = (0.0f64, "");
    for (name, expected) in expected {
        let difference = relative(&got[name], expected);
        if difference.is_nan() || difference >= worst.0 {
            worst = (difference, name);
        }
        if difference.is_nan() {
            break;
        }
    }
    Ok(Check {
        quantity: format!("{quantity} ({} tensors)", expected.len()),
        difference: worst.0,
        tolerance,
        note: format!("largest relative Frobenius; {}", worst.1),
    })
}

/// An adapter's trainable tensors by PEFT's tensor name.
fn by_tensor(adapter: &AdapterTensors) -> BTreeMap<String, Vec<f32>> {
    let pairs = adapter.modules.iter();
    let named = pairs.flat_map(|(module, pair)| {
        let [a, b] = tensor_names(module);
        let vectors = pair.vectors.iter();
        let vectors = vectors.map(|(name, values)| (vector_name(module, name), values.clone()));
        let factors = [(a, pair.a.clone()), (b, pair.b.clone())].into_iter();
        let factors = factors.filter(|_| pair.has_matrices());
        let bias = pair.bias.clone();
        let bias = bias.map(|bias| (run::whole_name(&format!("{module}.lora_B.bias")), bias));
        factors.chain(vectors).chain(bias)
    });
    named.collect()
}

/// Merges each linear module and compares it with the merged model's weight, element by element.
fn merged_weights(model: &Llama, merged: &mut Weights) -> Result<Check, ParityError> {
    let mut worst = (0.0f64, String::new());
    let mut count = 0;
    for (module, linear) in model.linears() {
        let name = format!("{module}.weight");
        let expected = merged.read(&name)?;
        // Hugging Face stores [d_out, d_in].
        let weight: Tensor<2> = linear.merge().weight.val().transpose();
        let (difference, _) = max_abs(&run::values(weight, &name)?, &expected);
        count += 1;
        if difference.is_nan() || difference >= worst.0 {
            worst = (difference, name);
        }
        if difference.is_nan() {
            break;
        }
    }
    Ok(Check {
        quantity: format!("merged weights ({count} tensors)"),
        difference: worst.0,
        tolerance: MERGED,
        note: format!("largest absolute; {}", worst.1),
    })
}

/// Merges each tensor of the base model from its file, and compares it with the merged model's.
fn merged_on_the_host(
    reference: &Reference,
    config: &LlamaConfig,
    merged: &mut Weights,
) -> Result<Check, ParityError> {
    let lora = &reference.trained_config.lora;
    let mut base = Weights::open(&reference.model)?;
    let mut worst = (0.0f64, String::new());
    let mut count = 0;
    for (name, _) in config.tensor_shapes() {
        let expected = merged.read(&name)?;
        let got = reference
            .trained
            .merged(config, lora, &name, base.read(&name)?)?;
        let (difference, _) = max_abs(&got, &expected);
        count += 1;
        if difference.is_nan() || difference >= worst.0 {
            worst = (difference, name);
        }
        if difference.is_nan() {
            break;
        }
    }
    Ok(Check {
        quantity: format!("merged weights, file to file ({count} tensors)"),
        difference: worst.0,
        tolerance: MERGED,
        note: format!("largest absolute; {}", worst.1),
    })
}
