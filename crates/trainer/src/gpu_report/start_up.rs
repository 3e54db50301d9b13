//! The start-up check of a run, as the report has it.

use super::finding::Check;
use crate::device::{self, Backend, SELF_TEST_TOLERANCE, Selected};

/// The comparisons that a run makes before its first step.
///
/// The only place that knows what they are.
pub fn checks(selected: &Selected) -> Vec<Check> {
    let name = "start-up check: quantized product, forward and backward";
    if selected.backend == Backend::Cpu {
        return Vec::new();
    }
    let tolerance = f64::from(SELF_TEST_TOLERANCE);
    vec![match device::self_test(selected) {
        Ok(()) => Check::new(name.into(), 0.0, tolerance, "within its tolerance"),
        Err(device::DeviceError::WrongNumbers { difference, .. }) => Check::new(
            name.into(),
            f64::from(difference),
            tolerance,
            "relative, Frobenius",
        ),
        Err(error) => Check::new(name.into(), f64::NAN, tolerance, error.to_string()),
    }]
}
