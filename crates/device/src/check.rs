//! Comparison of a device with the CPU: the operations of a decoder layer one by one and the layer
//! as a whole, forward and backward, with the types, the fusion and the kernels that the run uses.
//!
//! ```text
//! check/subject.rs   the layer: made from a seed in a model's shapes, or one of a model as it is
//! check/pieces.rs    its operations, run on one device
//! ```

mod pieces;
mod subject;

use burn::tensor::{Device, FloatDType};
use llama_burn::{LayerPass, Llama, LlamaConfig, PackedContext, PackedTokens};
use lora_core::{LoraConfig, Quantization};
use serde::Serialize;

use self::pieces::{Inputs, Output};
use self::subject::Subject;
use super::self_test::small_product;
use super::{Backend, DeviceError, Selected, kernel_cache, quiet};

/// The most tokens of a check: enough for the tiles of products and attention, and for the kernels
/// that are tuned for more than a few rows.
const TOKENS: usize = 256;

/// As [`TOKENS`] for a driver that emulates a GPU on the CPU.
const TOKENS_ON_SOFTWARE: usize = 24;

/// One comparison with the CPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What was compared: an operation, or a pass through the layer.
    pub name: String,
    /// The difference from the CPU: the largest relative distance of a row of the results. Not a
    /// number if the device returned one.
    pub difference: f64,
    /// The difference that rounding can explain.
    pub tolerance: f64,
    /// Whether the difference is within the tolerance.
    pub ok: bool,
}

/// The subject of a check.
#[derive(Debug, Clone, Copy)]
pub struct CheckOptions<'a> {
    /// The model whose shapes are used.
    pub model: &'a LlamaConfig,
    /// How its linear weights are stored.
    pub quantization: Quantization,
    /// The compute type.
    pub dtype: FloatDType,
    /// Rank and scale of the adapters, and the adapted modules.
    pub lora: &'a LoraConfig,
    /// Tokens of the run's longest sequence. The check uses as many, up to 256.
    pub longest_row: usize,
}

/// Compares a device with the CPU on a decoder layer of a model's shapes. The weights come from a
/// seed and are the same integers on both, the adapter has a B that is not zero, and two sequences
/// share a prefix.
///
/// The first check is a small product; if it fails, nothing else is tried. If a layer has more than
/// 256 million weights (on a driver that computes on the CPU, 2 million), its feed-forward block is
/// halved until it has fewer, or is no wider than twice the hidden size.
/// On the CPU itself there is nothing to compare, and no checks are returned.
///
/// # Errors
///
/// [`DeviceError::Unchecked`] if the device refuses a kernel or returns nothing. Wrong numbers are
/// not an error here: see [`verdict`].
pub fn check_device(
    selected: &Selected,
    options: &CheckOptions,
) -> Result<Vec<Check>, DeviceError> {
    if selected.backend == Backend::Cpu {
        return Ok(Vec::new());
    }
    let mut checks = small_product(selected)?;
    if checks.iter().any(|check| !check.ok) {
        return Ok(checks);
    }
    let (subject, packed) = Subject::made(options, selected.is_software);
    let inputs = Inputs::new(&subject, packed.ids.len(), options.dtype);
    let compared = quiet::catch(|| {
        compare(
            selected,
            &subject,
            &packed,
            &inputs,
            options.dtype,
            |device, dtype| subject.on(device, dtype),
        )
    });
    checks.extend(compared.map_err(|message| refused(selected, message))??);
    Ok(checks)
}

/// Compares a device with the CPU on decoder layer `index` of a model on the device, with its
/// current weights and adapters, on the hidden states of these sequences at that layer (of the
/// first 256 tokens; on a software driver, 24).
///
/// # Errors
///
/// As [`check_device`].
///
/// # Panics
///
/// If the device panics, and if the model has no such layer.
pub fn check_layer(
    selected: &Selected,
    model: &Llama,
    index: usize,
    rows: &PackedTokens,
) -> Result<Vec<Check>, DeviceError> {
    let most = tokens_at_most(selected.is_software);
    let packed = cut(rows, most);
    let context = model.manual_context(&packed);
    let mut hidden = model.manual_embeddings(&packed.ids);
    for layer in &model.layers[..index] {
        hidden = layer_pass(layer, &context).forward(&hidden).0;
    }
    let dtype = FloatDType::from(model.dtype());
    let refused = |message| refused(selected, message);
    let hidden = pieces::read(hidden).map_err(refused)?.values;
    let layer = &model.layers[index];
    let subject = Subject::of(layer, &model.config).map_err(refused)?;
    let mut inputs = Inputs::new(&subject, packed.ids.len(), dtype);
    inputs.hidden = hidden;
    compare(
        selected,
        &subject,
        &packed,
        &inputs,
        dtype,
        |device, dtype| {
            if kernels::cpu::is_cpu(device) {
                subject.on(device, dtype)
            } else {
                // The layer's own weights, which training computes with.
                layer.clone()
            }
        },
    )
}

/// The error of a run if a check fails: it names the operation that differs most, the device and
/// its driver, and the switches that may help.
///
/// # Errors
///
/// [`DeviceError::WrongNumbers`].
pub fn verdict(selected: &Selected, checks: &[Check]) -> Result<(), DeviceError> {
    // A wrong operation makes everything that contains it wrong too; the operation is more
    // specific.
    let wrong = |parts: usize| {
        let wrong = checks.iter().filter(|check| !check.ok);
        wrong
            .filter(|check| parts_of(&check.name) == parts)
            .max_by(|a, b| excess(a).total_cmp(&excess(b)))
    };
    let Some(check) = (0..3).find_map(wrong) else {
        return Ok(());
    };
    let [fuses, tunes] = kernel_cache::fuses_and_tunes();
    let mut advice = Vec::new();
    if kernel_cache::uses_own_kernels() {
        advice.push("--disable-kernels all");
    }
    if fuses {
        advice.push("--no-fusion");
    }
    if tunes {
        advice.push("--no-autotune");
    }
    advice.extend(["compute_dtype = \"f32\"", "--backend cpu"]);
    Err(DeviceError::WrongNumbers {
        name: with_driver(selected),
        operation: check.name.clone(),
        difference: check.difference,
        tolerance: check.tolerance,
        advice: format!("update its driver, or try {}", advice.join(", then ")),
    })
}

/// How composite a check is: 0 for a single operation, 1 for one with a norm and a product, 2 for a
/// whole layer.
fn parts_of(name: &str) -> usize {
    match name {
        "cross_entropy" => 1,
        name if name.starts_with("layer") => 2,
        _ => 0,
    }
}

pub(super) fn with_driver(selected: &Selected) -> String {
    format!("{} (driver: {})", selected.name, selected.driver)
}

pub(super) fn refused(selected: &Selected, message: String) -> DeviceError {
    DeviceError::Unchecked {
        name: with_driver(selected),
        message,
    }
}

fn tokens_at_most(is_software: bool) -> usize {
    if is_software {
        TOKENS_ON_SOFTWARE
    } else {
        TOKENS
    }
}

/// Whole segments from the beginning as long as they fit; of the first, what fits.
fn cut(rows: &PackedTokens, most: usize) -> PackedTokens {
    let mut cut = PackedTokens::default();
    for segment in &rows.segments {
        let used = cut.ids.len();
        let mut segment = *segment;
        if used + segment.length > most {
            if used > 0 {
                break;
            }
            segment.length = most;
        }
        cut.ids
            .extend_from_slice(&rows.ids[used..used + segment.length]);
        cut.segments.push(segment);
        if segment.length == most {
            break;
        }
    }
    cut
}

fn layer_pass<'a>(
    layer: &'a llama_burn::DecoderLayer,
    context: &'a PackedContext,
) -> LayerPass<'a> {
    LayerPass {
        layer,
        context,
        dropout_seed: None,
        output_positions: None,
    }
}

/// Runs everything on the device and on the CPU and compares, output by output.
fn compare(
    selected: &Selected,
    subject: &Subject,
    packed: &PackedTokens,
    inputs: &Inputs,
    dtype: FloatDType,
    layer_on: impl Fn(&Device, FloatDType) -> llama_burn::DecoderLayer,
) -> Result<Vec<Check>, DeviceError> {
    let cpu = Device::flex();
    let prepare = |device: &Device, dtype: FloatDType| {
        let context = PackedContext::new(packed, &subject.config, dtype.into(), device);
        (layer_on(device, dtype), context)
    };
    let on_device = || {
        let (layer, context) = prepare(&selected.device, dtype);
        pieces::run(&layer, subject, &context, inputs, dtype, &selected.device)
    };
    let on_cpu = || {
        let (f32, shaken) = (
            FloatDType::F32,
            inputs.shaken(rounding(selected.backend, dtype)),
        );
        let (layer, context) = prepare(&cpu, f32);
        let expected = pieces::run(&layer, subject, &context, inputs, f32, &cpu)?;
        let moved = pieces::run_whole(&layer, &context, &shaken, f32, &cpu)?;
        Ok((expected, moved))
    };
    let refused = |message| refused(selected, message);
    let got = on_device().map_err(refused)?;
    let (expected, moved) = on_cpu().map_err(refused)?;
    let whole = expected.len() - moved.len();
    let mut checks: Vec<Check> = Vec::new();
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let difference = distance(got, expected);
        let moved = index
            .checked_sub(whole)
            .map(|of| distance(&moved[of], expected));
        let tolerance = tolerance(selected.backend, dtype, moved);
        let check = Check {
            name: got.name.into(),
            difference,
            tolerance,
            // A value that is not a number is not right.
            ok: difference <= tolerance,
        };
        // Of several outputs of one operation, the worst counts.
        match checks.iter_mut().find(|check| check.name == got.name) {
            Some(before) if excess(before) < excess(&check) => *before = check,
            Some(_) => {}
            None => checks.push(check),
        }
    }
    Ok(checks)
}

/// The difference in units of the tolerance.
fn excess(check: &Check) -> f64 {
    if check.difference.is_nan() {
        f64::INFINITY
    } else {
        check.difference / check.tolerance
    }
}

/// The relative error of one rounding: of f16, which keeps 11 bits, of bf16, which keeps 8, and of
/// f32, in the last bits of an exponential. TF32 keeps 11 bits of each factor.
fn rounding(backend: Backend, dtype: FloatDType) -> f64 {
    match dtype {
        FloatDType::F16 => 4.9e-4,
        FloatDType::BF16 => 3.9e-3,
        _ if backend == Backend::Cuda && !kernels::is_exact_f32() => 4.9e-4,
        _ => 2.4e-7,
    }
}

/// The relative error that rounding explains, relative to the length of the result's row.
///
/// Both sides of an operation start from the same numbers. In f32 the result differs by the order
/// of its sums, of up to some ten thousand products, and by the last bits of exponentials: some
/// 1e-7 (measured on lavapipe) to 1e-6; 2e-5 is allowed. In 16 bits the inputs of products, weights
/// among them, and the result are rounded; sums are f32. Attention's gradient has the longest
/// chain, of four roundings; six are allowed.
///
/// In a pass through the whole layer some sixteen roundings follow each other, and later operations
/// may amplify them, above all a softmax with one large score. The amplification is measured on the
/// CPU: `moved` is the change of its own result when every input is changed by one rounding at
/// random. Independent roundings add up as the square root of their number.
fn tolerance(backend: Backend, dtype: FloatDType, moved: Option<f64>) -> f64 {
    const ROUNDINGS: f64 = 16.0;
    let rounding = rounding(backend, dtype);
    let operation = (6.0 * rounding).max(2e-5);
    match moved {
        None => operation,
        // Twice, because both are drawn at random.
        Some(moved) => operation.max(2.0 * ROUNDINGS.sqrt() * moved),
    }
}

/// The largest distance of a row from the CPU's. It is relative to the length of that row or, if
/// the row is short, to the usual length: one wrong tile of a large result is noticed, and a row
/// that is nearly zero does not fail a device.
fn distance(got: &Output, expected: &Output) -> f64 {
    if got.values.len() != expected.values.len() || expected.values.is_empty() {
        return f64::NAN;
    }
    let width = expected.width.max(1);
    let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let rows = expected.values.len().div_ceil(width);
    let usual = square(&expected.values) / rows as f64;
    if usual == 0.0 {
        return square(&got.values).sqrt();
    }
    let mut worst = 0f64;
    let pairs = got.values.chunks(width).zip(expected.values.chunks(width));
    for (got, expected) in pairs {
        let pairs = got.iter().zip(expected);
        let off: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let distance = (off / square(expected).max(usual)).sqrt();
        if !distance.is_finite() {
            return f64::NAN;
        }
        worst = worst.max(distance);
    }
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(values: Vec<f32>) -> Output {
        Output {
            name: "x",
            values,
            width: 10,
        }
    }

    fn numbers() -> Vec<f32> {
        (0..100).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    fn check(name: &str, difference: f64) -> Check {
        Check {
            name: name.into(),
            difference,
            tolerance: 1e-5,
            ok: difference <= 1e-5,
        }
    }

    #[test]
    fn one_wrong_row_is_seen_and_rounding_is_not() {
        let rounded: Vec<f32> = numbers().iter().map(|x| x * (1.0 + 1e-6)).collect();
        let far = distance(&output(rounded), &output(numbers()));
        assert!(far < 2e-6, "{far:e}");
        let mut wrong = numbers();
        wrong[41] += 0.5;
        assert!(distance(&output(wrong.clone()), &output(numbers())) > 0.1);
        wrong[41] = f32::NAN;
        assert!(distance(&output(wrong), &output(numbers())).is_nan());
        assert!(distance(&output(vec![]), &output(numbers())).is_nan());
        let mut nothing = numbers();
        nothing[..10].fill(0.0);
        let mut nearly = nothing.clone();
        nearly[3] = 1e-7;
        assert!(distance(&output(nearly), &output(nothing)) < 1e-6);
    }

    #[test]
    fn the_operation_is_named_rather_than_the_layer_and_the_worst_of_them() {
        let selected = super::super::select(Backend::Cpu).unwrap();
        verdict(&selected, &[check("rope", 1e-6)]).unwrap();
        let checks = [
            check("rope", 1e-3),
            check("attention", f64::NAN),
            check("layer_forward", 0.5),
        ];
        let text = verdict(&selected, &checks).unwrap_err().to_string();
        for word in [
            "attention",
            "NaN",
            "1e-5",
            "--no-fusion",
            "compute_dtype",
            "--backend cpu",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        let text = verdict(&selected, &checks[2..]).unwrap_err().to_string();
        assert!(text.contains("layer_forward"), "{text}");
    }

    #[test]
    fn rows_are_cut_to_what_a_check_takes() {
        let rows: [&[u32]; 2] = [&[1, 2, 3, 4], &[5, 6]];
        let packed = PackedTokens::from_sequences(rows);
        assert_eq!(cut(&packed, 6), packed);
        assert_eq!(cut(&packed, 5).ids, [1, 2, 3, 4]);
        assert_eq!(cut(&packed, 3).ids, [1, 2, 3]);
        assert_eq!(cut(&packed, 3).segments.len(), 1);
    }

    #[test]
    fn the_cpu_has_nothing_to_be_compared_with() {
        let selected = super::super::select(Backend::Cpu).unwrap();
        let model = LlamaConfig::from_json(
            serde_json::json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
                "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
            })
            .as_object()
            .unwrap(),
        )
        .unwrap();
        let options = CheckOptions {
            model: &model,
            quantization: Quantization::Bits8,
            dtype: FloatDType::F32,
            lora: &LoraConfig::default(),
            longest_row: 8,
        };
        assert_eq!(check_device(&selected, &options), Ok(vec![]));
    }
}
