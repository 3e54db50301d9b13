//! Peak rates of well-known GPUs as their makers state them: without sparsity, with 32-bit sums.

/// A device's stated peak.
#[derive(Debug, Clone, PartialEq)]
pub struct Peak {
    /// Its name.
    pub name: String,
    /// 10¹² operations per second on 16-bit floats; a multiplication and an addition count as two.
    pub tflops_16: f64,
    /// The same in f32, not TF32.
    pub tflops_32: f64,
    /// Memory bandwidth, 10⁹ bytes per second.
    pub gbs: f64,
}

/// The cards that `--gpu NAME` knows: name, 16 bits, f32, memory.
///
/// Sources, by card:
/// - H100 SXM: NVIDIA H100 Tensor Core GPU data sheet (its 1,979 TFLOPS for bfloat16 are with sparsity).
/// - A100 80GB: NVIDIA A100 data sheet, SXM.
/// - RTX 4090: NVIDIA Ada GPU Architecture white paper, appendix A, "FP16 Tensor TFLOPS with FP32 Accumulate".
/// - RTX 3060: NVIDIA's page of the 12 GB card (3,584 cores, 1.78 GHz, 360 GB/s); 112 tensor cores
///   of 128 products per clock, and half of that with 32-bit sums, as in the Ampere GA102 white paper
///   for GeForce cards.
/// - M3 Max: Apple states 400 GB/s for the one with 40 GPU cores; 128 lanes per core at 1.38 GHz
///   are from measurements by others (Philip Turner, metal-benchmarks). 16-bit products run at the
///   same rate.
/// - iGPU: Intel Iris Xe with 96 execution units at 1.3 GHz (Intel ARK, Core i7-1165G7; 16 f32
///   operations per clock and unit, twice that in 16 bits) with LPDDR4X-4266 in two channels.
const CARDS: [(&str, f64, f64, f64); 6] = [
    ("H100 SXM", 989.4, 66.9, 3350.0),
    ("A100 80GB", 312.0, 19.5, 2039.0),
    ("RTX 4090", 165.2, 82.6, 1008.0),
    ("RTX 3060", 25.5, 12.7, 360.0),
    ("M3 Max", 14.1, 14.1, 400.0),
    ("iGPU", 4.0, 2.0, 68.3),
];

/// Every card.
pub fn all() -> Vec<Peak> {
    let card = |(name, tflops_16, tflops_32, gbs): (&str, f64, f64, f64)| Peak {
        name: name.into(),
        tflops_16,
        tflops_32,
        gbs,
    };
    CARDS.into_iter().map(card).collect()
}

/// The card of that name. Case, spaces and dashes are ignored, and a part of a name is enough if it
/// fits one card only.
pub fn named(name: &str) -> Option<Peak> {
    let plain = |text: &str| {
        let letters = text.chars().filter(|c| c.is_alphanumeric());
        letters.collect::<String>().to_lowercase()
    };
    let asked = plain(name);
    let mut having = all()
        .into_iter()
        .filter(|card| plain(&card.name).contains(&asked));
    match (having.next(), having.next()) {
        (Some(card), None) => Some(card),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_found_by_a_part_of_its_name_that_no_other_has() {
        assert_eq!(named("rtx4090").unwrap().name, "RTX 4090");
        assert_eq!(named("h100").unwrap().name, "H100 SXM");
        assert_eq!(named("m3-max").unwrap().name, "M3 Max");
        assert!(named("rtx").is_none() && named("voodoo").is_none() && named("").is_none());
        for card in all() {
            assert_eq!(named(&card.name), Some(card.clone()));
            assert!(card.tflops_16 >= card.tflops_32 && card.gbs > 0.0);
        }
    }
}
