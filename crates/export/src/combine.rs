//! `trainer combine`: makes one adapter from several, with weights.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use hub::{self, HubError};
use peft::{
    AdapterError, CONFIG_FILE, Combination, CombineError, Weighted, combine, read_adapter,
    write_adapter,
};
use terminal::Screen;

/// The command's arguments.
#[derive(Debug, Clone, Args)]
pub struct CombineArgs {
    /// A PEFT adapter and its weight, such as runs/a/adapter=0.7; repeat for each adapter
    #[arg(long = "adapter", value_name = "DIR=WEIGHT", required = true)]
    pub adapters: Vec<Share>,
    /// PEFT's combination type: cat is the exact sum, and its rank is the sum of the ranks; linear and svd keep a lower rank
    #[arg(long = "type", value_name = "TYPE", default_value = "cat")]
    pub combination: Combination,
    /// The rank that svd keeps [default: the largest rank of the adapters]
    #[arg(long, value_name = "RANK")]
    pub svd_rank: Option<usize>,
    /// The folder of the new adapter
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace an adapter in the output folder
    #[arg(long)]
    pub overwrite: bool,
}

/// `DIR=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// The adapter's folder.
    pub folder: PathBuf,
    /// Its weight.
    pub weight: f64,
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must have the form DIR=WEIGHT, such as runs/a/adapter=0.7".to_string();
        let (folder, weight) = text.rsplit_once('=').ok_or_else(wrong)?;
        let weight: f64 = weight.trim().parse().map_err(|_| wrong())?;
        if weight.is_finite() && !folder.is_empty() {
            Ok(Self {
                folder: folder.into(),
                weight,
            })
        } else {
            Err(wrong())
        }
    }
}

/// Why adapters cannot be combined.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum CombineCommandError {
    #[error(transparent)]
    Combine(#[from] CombineError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("the adapter in {}: {source}", folder.display())]
    Read {
        folder: PathBuf,
        source: AdapterError,
    },
    #[error("the combined adapter in {}: {source}", folder.display())]
    Write {
        folder: PathBuf,
        source: AdapterError,
    },
    #[error("{} already holds an adapter; --overwrite replaces it", .0.display())]
    Exists(PathBuf),
    #[error(
        "--svd-rank is for --type svd; cat adds up the ranks, and linear keeps the adapters' rank"
    )]
    SvdRank,
}

/// Reads the adapters, combines them and writes the result.
///
/// # Errors
///
/// An adapter that cannot be read or combined, by its folder; an output folder that already holds one.
pub fn run(args: &CombineArgs, screen: &Screen) -> Result<(), CombineCommandError> {
    if args.svd_rank.is_some() && args.combination != Combination::Svd {
        return Err(CombineCommandError::SvdRank);
    }
    if args.output.join(CONFIG_FILE).exists() && !args.overwrite {
        return Err(CombineCommandError::Exists(args.output.clone()));
    }
    let mut adapters: Vec<Weighted> = Vec::new();
    for Share { folder, weight } in &args.adapters {
        let folder = &hub::adapter_folder(folder)?;
        let (config, tensors) =
            read_adapter(folder).map_err(|source| CombineCommandError::Read {
                folder: folder.clone(),
                source,
            })?;
        adapters.push(Weighted {
            name: folder.display().to_string(),
            config,
            tensors,
            weight: *weight,
        });
    }
    let mut bases: Vec<&str> = adapters
        .iter()
        .filter_map(|adapter| adapter.config.base_model_name_or_path.as_deref())
        .collect();
    bases.dedup();
    if let [first, second, ..] = bases[..] {
        log::warn!(
            "the adapters name different base models, {first} and {second}; their sum makes sense only if these are the same weights"
        );
    }
    let (config, tensors) = combine(&adapters, args.combination, args.svd_rank)?;
    let written = write_adapter(&args.output, &config, &tensors);
    written.map_err(|source| CombineCommandError::Write {
        folder: args.output.clone(),
        source,
    })?;
    screen.line(&format!(
        "{} adapters, {} modules, r {}, in {}",
        adapters.len(),
        tensors.modules.len(),
        config.lora.r,
        args.output.display()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_folder_and_a_number_and_the_folder_may_have_an_equals_sign() {
        let share = |text: &str| text.parse::<Share>();
        let expected = Share {
            folder: "runs/lr=1e-4/adapter".into(),
            weight: -0.5,
        };
        assert_eq!(share("runs/lr=1e-4/adapter=-0.5"), Ok(expected));
        for wrong in ["runs/a", "runs/a=", "=1", "a=x", "a=inf", "a=NaN"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
