//! A whole model compared with the CPU: a seeded one in f32, and the embedded one in each type.

use std::collections::BTreeMap;

use burn::tensor::{Device, FloatDType, Tensor};
use llama_burn::{LlamaConfig, load};
use lora_core::{CounterRng, LoraConfig, TargetModules};

use super::compare::{self, Depth, values};
use super::error::ReportError;
use super::finding::{Check, Finding};
use super::trainee::{Trainee, options};

use data::PromptTemplate;
use data::{self, Batch, ModelFiles, Prefixes, RowTokenizer};
use peft::AdapterTensors;
use run_config::embedded;

/// Steps of the loss curve, and of a quick report's.
const STEPS: usize = 20;
const FEW_STEPS: usize = 6;

const LEARNING_RATE: f64 = 1e-3;

/// Examples of the batch.
const ROWS: usize = 4;

/// A device's results for the embedded model.
struct Numbers {
    loss: f64,
    scores: Vec<f32>,
    gradients: BTreeMap<String, Vec<f32>>,
    curve: Vec<f64>,
}

/// Compares logits, loss, gradients and a loss curve with the CPU's.
///
/// # Errors
///
/// If the device fails, or the embedded model cannot be unpacked.
pub fn run(
    types: &[FloatDType],
    device: &Device,
    quick: bool,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    let steps = if quick { FEW_STEPS } else { STEPS };
    let devices = [("CPU", Device::flex()), ("device", device.clone())];
    let report = parity::between_devices(&devices.map(|(name, device)| (name.into(), device)))?;
    for check in report.sections.iter().flat_map(|section| &section.checks) {
        let name = format!("seeded model: {}, f32", check.quantity);
        let check = Check::new(name, check.difference, check.tolerance, &check.note);
        tell(Finding::Check(check));
    }
    let expected = measure(FloatDType::F32, &Device::flex(), steps)?;
    for dtype in types {
        let got = measure(*dtype, device, steps)?;
        for check in compared(*dtype, &got, &expected) {
            tell(Finding::Check(check));
        }
    }
    Ok(())
}

fn compared(dtype: FloatDType, got: &Numbers, expected: &Numbers) -> Vec<Check> {
    let relative = |a: f64, b: f64| (a - b).abs() / b.abs();
    let tolerance = compare::tolerance(dtype, Depth::Model);
    let named = |what: &str| format!("embedded model: {what}, {}", device::type_name(dtype));
    let gradients = |numbers: &Numbers| numbers.gradients.values().cloned().collect::<Vec<_>>();
    let (ours, theirs) = (gradients(got), gradients(expected));
    // As one vector: otherwise a tensor of small gradients would count as much as one of large
    // ones.
    let off = if got.gradients.keys().eq(expected.gradients.keys()) {
        compare::distance(&ours.concat(), &theirs.concat())
    } else {
        f64::INFINITY
    };
    let steps = got.curve.iter().zip(&expected.curve);
    let curve = compare::largest(steps.map(|(a, b)| relative(*a, *b)));
    let last = expected.curve.len().saturating_sub(1);
    let ends = [0, last].map(|step| expected.curve[step]);
    vec![
        Check::new(
            named("logits"),
            compare::distance(&got.scores, &expected.scores),
            tolerance,
            "relative, Frobenius",
        ),
        Check::new(
            named("loss"),
            relative(got.loss, expected.loss),
            tolerance,
            format!("relative; {:.5} and {:.5}", got.loss, expected.loss),
        ),
        Check::new(
            named("gradients"),
            off,
            tolerance,
            "relative, Frobenius, all tensors as one vector",
        ),
        Check::new(
            named(&format!("loss curve, {} steps", last + 1)),
            curve,
            // AdamW divides by the gradient's size, which amplifies noise from step to step.
            2.0 * tolerance,
            format!("relative, largest; from {:.4} to {:.4}", ends[0], ends[1]),
        ),
    ]
}

fn measure(dtype: FloatDType, device: &Device, steps: usize) -> Result<Numbers, ReportError> {
    let paths = embedded::materialise()?;
    let config = LlamaConfig::from_file(&paths.model_dir)?;
    let batch = batch(&paths, &config)?;
    let lora = LoraConfig {
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let in_graph = device.clone().autodiff();
    let model = load(&paths.model_dir, &config, options(dtype), &in_graph, |_| {})?;
    let model = model.with_lora(&lora, 1)?;
    // With the initial B = 0, A would have no gradient and the scale no effect.
    let mut adapter = AdapterTensors::from_model(&model)?;
    let mut rng = CounterRng::new(1);
    for pair in adapter.modules.values_mut() {
        pair.b
            .iter_mut()
            .for_each(|value| *value = 0.02 * rng.normal() as f32);
    }
    let mut trainee = Trainee::new(adapter.put_on(model, &lora)?, false);
    let hidden = trainee.model.hidden_states(&batch.tokens);
    let scores = values(trainee.model.logits(hidden))?;
    let mut sums = trainee.gradients(&batch);
    let loss = sums.totals().mean();
    let mut gradients = BTreeMap::new();
    for (module, params) in trainee.model.trainable() {
        for (index, param) in params.into_iter().enumerate() {
            let sum: Option<Tensor<2>> = sums.get(param.id);
            let sum = sum.ok_or_else(|| ReportError::NoGradient(module.to_string()))?;
            gradients.insert(format!("{module} {index}"), values(sum)?);
        }
    }
    let mut curve = Vec::new();
    for _ in 0..steps {
        let (next, loss) = trainee.step(&batch, LEARNING_RATE);
        trainee = next;
        curve.push(loss);
    }
    Ok(Numbers {
        loss,
        scores,
        gradients,
        curve,
    })
}

/// The first examples of the embedded data, with shared prefixes.
fn batch(paths: &embedded::EmbeddedPaths, config: &LlamaConfig) -> Result<Batch, ReportError> {
    let tokenizer = RowTokenizer::new(&ModelFiles::read(&paths.model_dir)?, &PromptTemplate::Raw)?;
    let limit = config.max_position_embeddings;
    let rows = data::load(&paths.train, &tokenizer, limit, config.vocab_size)?;
    Ok(rows.batch(&(0..ROWS).collect::<Vec<_>>(), Prefixes::Shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_learns_and_other_numbers_fail() {
        let mut checks = Vec::new();
        run(
            &[FloatDType::F32],
            &Device::flex(),
            true,
            &mut |finding| match finding {
                Finding::Check(check) => checks.push(check),
                other => panic!("{other:?}"),
            },
        )
        .unwrap();
        assert!(checks.iter().all(|check| check.ok), "{checks:?}");

        let ours = measure(FloatDType::F32, &Device::flex(), STEPS).unwrap();
        assert!(
            ours.curve[STEPS - 1] < 0.9 * ours.curve[0],
            "{:?}",
            ours.curve
        );
        let mut other = measure(FloatDType::F32, &Device::flex(), STEPS).unwrap();
        other.scores[7] += 1.0;
        other.curve[3] *= 1.01;
        other.gradients.values_mut().for_each(|it| it[0] = f32::NAN);
        let checks = compared(FloatDType::F32, &other, &ours);
        assert_eq!(
            checks.iter().filter(|check| !check.ok).count(),
            3,
            "{checks:?}"
        );
    }
}
