//! `trainer merge` and `trainer unmerge`.

use std::path::{Path, PathBuf};

use clap::Args;
use lora_core::Quantization;
use safetensors::Dtype;

use super::{LARGEST_SHARD, MergeError, MergeOptions, UnmergeOptions, merge, survival, unmerge};
use hub::{self, Need};
use run_config::EMBEDDED;
use terminal::Screen;
use terminal::human;

/// The arguments of `merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The base model: a Hugging Face folder or a name on the Hub
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A PEFT adapter: a folder or a name on the Hub
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The folder to write; may be omitted with --check-bits
    #[arg(long, value_name = "DIR", required_unless_present = "check_bits")]
    output: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
    /// First measure how much of the adapter's update survives when the merged weights are quantized to 8 or 4
    /// bits, and stop if it is too little
    #[arg(long, value_name = "BITS")]
    check_bits: Option<u8>,
    /// Merge even if --check-bits finds that too little of the update survives
    #[arg(long, requires = "check_bits")]
    force: bool,
    /// Merge even if the model has no tokenizer
    #[arg(long)]
    without_tokenizer: bool,
}

/// The arguments of `unmerge`.
#[derive(Debug, Args)]
pub struct UnmergeArgs {
    /// The merged model: a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The PEFT adapter that was merged into it: a folder
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    form: Form,
    /// Continue even if the folder does not record that this adapter was merged into it
    #[arg(long)]
    force: bool,
}

/// How a model is written.
#[derive(Debug, Args)]
struct Form {
    /// Type of the weights: f32, f16 or bf16 [default: the type of each tensor]
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    dtype: Option<Dtype>,
    /// Largest size of a weight file, such as 500MB or 5GB
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "5GB")]
    max_shard_size: u64,
    /// Replace what is in the output folder
    #[arg(long)]
    overwrite: bool,
}

fn float_type(word: &str) -> Result<Dtype, String> {
    match word {
        "f32" | "float32" => Ok(Dtype::F32),
        "f16" | "float16" => Ok(Dtype::F16),
        "bf16" | "bfloat16" => Ok(Dtype::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

/// Parses a size in bytes. As in Hugging Face, GB is a power of ten and GiB a power of two.
fn size(word: &str) -> Result<u64, String> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match word[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err("expected a number with KB, MB, GB, KiB, MiB or GiB".into()),
    };
    let number = digits.trim().parse::<u64>().ok();
    let bytes = number.and_then(|number| number.checked_mul(unit));
    match bytes {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("expected a positive whole number with a unit, such as 500MB".into()),
    }
}

/// Runs `merge`.
///
/// # Errors
///
/// As [`merge`]; a model or an adapter that the Hub does not have; [`MergeError::LostToQuantization`].
pub fn run_merge(args: MergeArgs, screen: &Screen) -> Result<(), MergeError> {
    if args.model == Path::new(EMBEDDED) && !args.model.exists() {
        return Err(MergeError::EmbeddedBase);
    }
    let args = MergeArgs {
        model: match args.model.to_str() {
            Some(name) => hub::model_folder(name, Need::Model)?,
            None => args.model,
        },
        adapter: hub::adapter_folder(&args.adapter)?,
        ..args
    };
    if let Some(bits) = args.check_bits {
        let quantization = match bits {
            8 => Quantization::Bits8,
            4 => Quantization::Bits4,
            bits => return Err(MergeError::CheckBits { bits }),
        };
        let report = {
            let mut task = None;
            let mut progress = |done, total| {
                let task = task.get_or_insert_with(|| screen.task("checking modules", total));
                task.at(done);
            };
            survival(
                &args.model,
                &args.adapter,
                bits,
                quantization,
                &mut progress,
            )?
        };
        for line in report.lines() {
            screen.line(&line);
        }
        match report.refusal() {
            Some(reason) if !args.force => return Err(MergeError::LostToQuantization { reason }),
            Some(reason) => log::warn!("{reason}"),
            None => {}
        }
    }
    let Some(output) = args.output else {
        return Ok(());
    };
    let options = MergeOptions {
        model: args.model,
        adapter: args.adapter,
        output,
        dtype: args.form.dtype,
        largest_shard: args.form.max_shard_size,
        overwrite: args.form.overwrite,
        without_tokenizer: args.without_tokenizer,
    };
    let report = {
        let mut task = None;
        merge(&options, &mut |done, total| {
            let task = task.get_or_insert_with(|| screen.task("merging tensors", total));
            task.at(done);
        })?
    };
    let replaced = match report.replaced {
        0 => String::new(),
        count => format!(" and {}", human::counted(count as u64, "replaced tensor")),
    };
    screen.line(&format!(
        "merged {}{replaced} into {}: {}, {}, {}",
        human::counted(report.modules as u64, "module"),
        options.output.display(),
        human::counted(report.files as u64, "weight file"),
        human::bytes(report.bytes),
        report.dtype,
    ));
    Ok(())
}

/// Runs `unmerge`.
///
/// # Errors
///
/// As [`unmerge`].
pub fn run_unmerge(args: UnmergeArgs, screen: &Screen) -> Result<(), MergeError> {
    let options = UnmergeOptions {
        model: args.model,
        adapter: args.adapter,
        output: args.output,
        dtype: args.form.dtype,
        largest_shard: args.form.max_shard_size,
        overwrite: args.form.overwrite,
        force: args.force,
    };
    let report = {
        let mut task = None;
        unmerge(&options, &mut |done, total| {
            let task = task.get_or_insert_with(|| screen.task("restoring tensors", total));
            task.at(done);
        })?
    };
    let what = match report.exact {
        Some(exact) if exact == report.changed => {
            "all equal to the base model's, bit for bit".to_string()
        }
        Some(exact) => format!(
            "{exact} of them equal to the base model's, bit for bit; the others are within {:.1e} of it, because the merged \
             weights were rounded to {} (a model merged with --dtype f32 can be restored without loss)",
            report.rounding, report.merged_dtype
        ),
        None => format!(
            "within {:.1e} of the base if this adapter was merged into it, which the folder does not record",
            report.rounding
        ),
    };
    screen.line(&format!(
        "unmerged the adapter from {} into {} ({}): {what}",
        human::counted(report.changed as u64, "tensor"),
        options.output.display(),
        report.dtype,
    ));
    Ok(())
}

const _: () = assert!(LARGEST_SHARD == 5_000_000_000, "--max-shard-size's default");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        assert_eq!(size("5GB").unwrap(), LARGEST_SHARD);
        assert_eq!(size("500mb").unwrap(), 500_000_000);
        assert_eq!(size("2GiB").unwrap(), 2 << 30);
        assert_eq!(size("1234").unwrap(), 1234);
        for wrong in [
            "",
            "GB",
            "0MB",
            "-1GB",
            "1.5GB",
            "5TB",
            "99999999999999999999",
            "99999999999GB",
        ] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
