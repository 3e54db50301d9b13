//! The results of the comparisons, as a table.

use std::fmt;

/// One quantity compared with its reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// What was compared.
    pub quantity: String,
    /// The measured difference.
    pub difference: f64,
    /// The largest difference that passes.
    pub tolerance: f64,
    /// How the difference is measured, and where it is largest.
    pub note: String,
}

impl Check {
    /// Whether the difference is within the tolerance; NaN is not.
    pub fn passed(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// The checks of one device against a reference, or of two devices against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// The two sides of the comparison.
    pub title: String,
    /// The comparisons.
    pub checks: Vec<Check>,
    /// Quantities that could not be compared, with the reasons.
    pub left_out: Vec<String>,
}

/// The results of one call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// One per device or pair of devices.
    pub sections: Vec<Section>,
    /// A line for each requested backend that is not available.
    pub absent: Vec<String>,
    /// A line for each available backend that failed.
    pub broken: Vec<String>,
}

impl Report {
    /// Whether at least one quantity was compared, every difference is within its tolerance, and no
    /// device failed.
    pub fn passed(&self) -> bool {
        let mut checks = self
            .sections
            .iter()
            .flat_map(|section| &section.checks)
            .peekable();
        self.broken.is_empty() && checks.peek().is_some() && checks.all(Check::passed)
    }

    /// The comparisons that fail, with their section's title.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &Check)> {
        self.sections.iter().flat_map(|section| {
            let failing = section.checks.iter().filter(|check| !check.passed());
            failing.map(|check| (section.title.as_str(), check))
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for section in &self.sections {
            writeln!(f, "{section}")?;
        }
        for line in self.broken.iter().chain(&self.absent) {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quantities = self.checks.iter().map(|check| check.quantity.len());
        let width = quantities.max().unwrap_or(0).max("quantity".len());
        writeln!(f, "{}", self.title)?;
        writeln!(
            f,
            "  {:width$}  {:>10}  {:>9}",
            "quantity", "difference", "tolerance"
        )?;
        for check in &self.checks {
            let verdict = if check.passed() { "ok  " } else { "FAIL" };
            writeln!(
                f,
                "  {:width$}  {:>10.2e}  {:>9.1e}  {verdict}  {}",
                check.quantity, check.difference, check.tolerance, check.note
            )?;
        }
        for line in &self.left_out {
            writeln!(f, "  not compared: {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(differences: &[f64]) -> Report {
        let checks = differences.iter().map(|difference| Check {
            quantity: "loss".into(),
            difference: *difference,
            tolerance: 1e-5,
            note: String::new(),
        });
        let section = Section {
            title: "cpu against the reference".into(),
            checks: checks.collect(),
            left_out: vec![],
        };
        Report {
            sections: vec![section],
            absent: vec!["cuda: not in this build".into()],
            broken: vec![],
        }
    }

    #[test]
    fn a_difference_past_its_tolerance_or_nan_fails() {
        assert!(report(&[0.0, 1e-5]).passed());
        for wrong in [2e-5, f64::NAN, f64::INFINITY] {
            let report = report(&[0.0, wrong]);
            assert!(!report.passed());
            assert_eq!(report.failures().count(), 1);
            assert!(report.to_string().contains("FAIL"));
        }
    }

    #[test]
    fn a_report_that_compared_nothing_does_not_pass() {
        assert!(!report(&[]).passed());
        assert!(!Report::default().passed());
    }

    #[test]
    fn a_broken_device_fails_the_report() {
        let mut report = report(&[0.0]);
        report
            .broken
            .push("FAIL  wgpu: computes wrong numbers".into());
        assert!(!report.passed());
        assert!(report.to_string().contains("FAIL  wgpu"));
    }

    #[test]
    fn the_table_says_quantity_difference_tolerance_and_what_was_absent() {
        let text = report(&[2e-6]).to_string();
        for word in ["loss", "2.00e-6", "1.0e-5", "ok", "cuda: not in this build"] {
            assert!(text.contains(word), "{text}");
        }
    }
}
