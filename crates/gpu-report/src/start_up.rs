//! The start-up check of a run, as a part of the report.

use lora_core::{LoraConfig, Quantization};

use super::error::ReportError;
use super::finding::{Check, Finding};
use super::shapes::Shape;
use device::{CheckOptions, Selected};

/// The most tokens for the checked layer; the check itself uses fewer.
const TOKENS: usize = 256;

/// The comparisons that a run makes before its first step, for a model of this shape in each of the
/// device's types.
///
/// No other section uses them.
///
/// # Errors
///
/// If the shape's configuration cannot be read.
pub fn run(
    selected: &Selected,
    shape: Shape,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    let model = shape.config()?;
    let lora = LoraConfig::default();
    for dtype in device::types(selected) {
        let name = device::type_name(dtype);
        let options = CheckOptions {
            model: &model,
            quantization: Quantization::Bits8,
            dtype,
            lora: &lora,
            longest_row: TOKENS,
        };
        match device::check_device(selected, &options) {
            Ok(checks) => {
                for check in checks {
                    tell(Finding::Check(Check::new(
                        format!("start-up check, {name}: {}", check.name),
                        check.difference,
                        check.tolerance,
                        "relative to the CPU in f32",
                    )));
                }
            }
            Err(error) => tell(Finding::Check(Check::new(
                format!("start-up check, {name}"),
                f64::NAN,
                0.0,
                error.to_string(),
            ))),
        }
    }
    Ok(())
}
