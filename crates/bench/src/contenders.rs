//! The contenders, and why some cannot run.

use super::options::BenchOptions;
use super::protocol::{Contender, DeviceDescription, OursSettings, PeftSettings};
use device::Machine;

/// A contender with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entrant {
    /// Its name for `--contenders` and in the results.
    pub id: &'static str,
    /// Its name for the user.
    pub name: &'static str,
    /// What runs.
    pub contender: Contender,
    /// Whether its batches group examples by length, and so differ from the other contenders'
    /// batches.
    pub grouped: bool,
    /// Its compute type, for the roofline that its utilization is measured against.
    pub dtype: &'static str,
    /// The contender of this trainer with the same weights, whose losses must agree.
    pub same_weights_as: &'static str,
}

/// All contenders, in the order of the tables.
pub(super) fn all() -> Vec<Entrant> {
    vec![
        ours("ours", "ours f32", |_| {}),
        ours("ours-bf16", "ours bf16", |settings| {
            settings.compute_dtype = "bf16".into()
        }),
        ours("ours-dense", "ours f32, 16/32-bit base", |settings| {
            settings.quant_bits = 16
        }),
        ours("ours-plain", "ours f32, plain", |settings| {
            settings.gradient_checkpointing = Some(false);
            settings.share_prefixes = false;
            settings.in_graph = true;
        }),
        ours("ours-checkpointed", "ours f32, checkpointed", |settings| {
            settings.gradient_checkpointing = Some(true);
        }),
        Entrant {
            id: "burn",
            name: "Burn apply_qlora",
            contender: Contender::BurnQlora,
            grouped: false,
            dtype: "f32",
            same_weights_as: "ours",
        },
        peft("peft-f32", "PEFT float32", "float32", false),
        peft("peft-f32-grouped", "PEFT float32, grouped", "float32", true),
        peft("peft-bf16", "PEFT bfloat16", "bfloat16", false),
        peft(
            "peft-bf16-grouped",
            "PEFT bfloat16, grouped",
            "bfloat16",
            true,
        ),
        Entrant {
            id: "peft-int8",
            name: "PEFT + bitsandbytes int8",
            contender: Contender::Peft(PeftSettings {
                dtype: "bfloat16".into(),
                bits: 8,
            }),
            grouped: false,
            dtype: "bf16",
            same_weights_as: "ours-bf16",
        },
    ]
}

/// This trainer's default settings, except those that `change` changes.
fn ours(id: &'static str, name: &'static str, change: impl Fn(&mut OursSettings)) -> Entrant {
    let mut settings = OursSettings {
        quant_bits: 8,
        compute_dtype: "f32".into(),
        gradient_checkpointing: None,
        share_prefixes: true,
        in_graph: false,
    };
    change(&mut settings);
    Entrant {
        id,
        name,
        dtype: if settings.compute_dtype == "bf16" {
            "bf16"
        } else {
            "f32"
        },
        same_weights_as: if settings.quant_bits == 16 {
            "ours-dense"
        } else {
            "ours"
        },
        contender: Contender::Ours(settings),
        grouped: false,
    }
}

fn peft(id: &'static str, name: &'static str, dtype: &'static str, grouped: bool) -> Entrant {
    let settings = PeftSettings {
        dtype: dtype.into(),
        bits: 16,
    };
    Entrant {
        id,
        name,
        contender: Contender::Peft(settings),
        grouped,
        dtype: if dtype == "float32" { "f32" } else { "bf16" },
        same_weights_as: "ours-dense",
    }
}

impl Entrant {
    /// Why it cannot or should not run here, if so.
    pub fn absent(
        &self,
        options: &BenchOptions,
        machine: &Machine,
        device: &DeviceDescription,
    ) -> Option<String> {
        let lacks = |dtype: &str| !device.compute_dtypes.iter().any(|has| has == dtype);
        match &self.contender {
            Contender::Ours(settings) if lacks(&settings.compute_dtype) => {
                let why = device.no_bf16.clone();
                Some(
                    why.unwrap_or_else(|| {
                        format!("no {} on {}", settings.compute_dtype, device.name)
                    }),
                )
            }
            Contender::Ours(_) | Contender::BurnQlora => None,
            Contender::Peft(_) if options.peft.is_none() => {
                Some("no --peft PYTHON was given".into())
            }
            Contender::Peft(settings) if settings.bits == 8 && device.backend != "cuda" => {
                Some("bitsandbytes' int8 needs --device cuda".into())
            }
            Contender::Peft(settings)
                if settings.dtype == "bfloat16"
                    && !device.on_gpu
                    && !options.bf16
                    && !machine.multiplies_bf16() =>
            {
                Some(
                    "this processor has no bf16 instructions; --bf16 measures it nevertheless"
                        .into(),
                )
            }
            Contender::Peft(_) => None,
        }
    }
}
