//! The sections of a report, in order of importance.

use std::fmt;
use std::str::FromStr;

use super::shapes::Shape;

/// A section of a report. Each runs in a process of its own, so that a failing driver costs one
/// section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// The device's properties, and the start-up check.
    Device,
    /// Every operation compared with the CPU.
    Operations,
    /// The embedded model compared with the CPU.
    Model,
    /// Training steps of a shape, in the type that `auto` selects.
    Training(Shape),
    /// Products, attention and element-wise chains, relative to the measured peak.
    Speed,
    /// Kernel launches, uploads, reads, bytes.
    Counts,
    /// Training steps of a shape in the device's other types.
    OtherTypes(Shape),
}

impl Section {
    /// All sections, the most important first.
    pub fn all(quick: bool) -> Vec<Self> {
        let first = [Self::Device, Self::Operations, Self::Model];
        let rest: &[Self] = if quick {
            &[Self::Training(Shape::Embedded), Self::Speed, Self::Counts]
        } else {
            &[
                // The most expensive and most informative first.
                Self::Training(Shape::Llama8B),
                Self::Speed,
                Self::Training(Shape::Llama1B),
                Self::Training(Shape::Smol),
                Self::Training(Shape::Embedded),
                Self::Counts,
                Self::OtherTypes(Shape::Llama1B),
                Self::OtherTypes(Shape::Smol),
            ]
        };
        first.iter().chain(rest).copied().collect()
    }

    /// The largest share of the time limit that a section may take, so that one that hangs does not
    /// cost all others.
    pub fn share(self) -> f64 {
        match self {
            Self::Device | Self::Operations | Self::Model => 0.2,
            // On an H200, tuning its kernels for 512 tokens took 130 s.
            Self::Training(Shape::Llama8B) => 0.45,
            Self::Training(Shape::Embedded) => 0.15,
            Self::Training(_) | Self::Speed | Self::Counts | Self::OtherTypes(_) => 0.25,
        }
    }

    /// The shape whose training it measures in the type that `auto` selects.
    pub fn trains(self) -> Option<Shape> {
        match self {
            Self::Training(shape) => Some(shape),
            _ => None,
        }
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device => f.pad("device"),
            Self::Operations => f.pad("operations"),
            Self::Model => f.pad("model"),
            Self::Training(shape) => f.pad(&format!("training:{}", shape.name())),
            Self::Speed => f.pad("speed"),
            Self::Counts => f.pad("counts"),
            Self::OtherTypes(shape) => f.pad(&format!("other-types:{}", shape.name())),
        }
    }
}

impl FromStr for Section {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let with_shapes = |section: fn(Shape) -> Self| Shape::ALL.map(section);
        let all = [
            Self::Device,
            Self::Operations,
            Self::Model,
            Self::Speed,
            Self::Counts,
        ];
        let all = all.into_iter().chain(with_shapes(Self::Training));
        let mut all = all.chain(with_shapes(Self::OtherTypes));
        let found = all.find(|section| section.to_string() == word);
        found.ok_or_else(|| format!("{word:?} is not a section of a report"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_reads_back_and_shares_are_shares() {
        for section in [Section::all(false), Section::all(true)].concat() {
            assert_eq!(section.to_string().parse(), Ok(section));
            assert!(section.share() > 0.0 && section.share() < 1.0);
        }
        assert!("nothing".parse::<Section>().is_err());
    }

    #[test]
    fn what_is_wrong_is_found_before_what_is_slow() {
        for quick in [false, true] {
            let all = Section::all(quick);
            let place = |section| all.iter().position(|it| *it == section).unwrap();
            assert!(place(Section::Model) < place(Section::Training(Shape::Embedded)));
            assert!(place(Section::Device) < place(Section::Operations));
        }
    }
}
