//! `trainer export-gguf`: writes a model, optionally with an adapter merged in, or an adapter alone, for llama.cpp.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use clap::Args;
use llama_burn::gguf::{
    self, GgufFile, GgufWriter, TensorKind, TensorPlan, Value, config_metadata, llama_cpp_name,
    rope_factors, rows_of,
};
use llama_burn::{LlamaConfig, Weights};

use super::ExportGgufError;
use super::adapter::Adapter;
use data::ModelFiles;
use data::gguf::tokenizer_metadata;
use hub::{self, Need};
use run_config::EMBEDDED;
use run_config::embedded;
use terminal::Screen;
use terminal::human;

/// The command's arguments.
#[derive(Debug, Args)]
pub struct ExportGgufArgs {
    /// The base model: a Hugging Face folder, a GGUF file, a name on the Hub, or `embedded`
    #[arg(long, value_name = "PATH", default_value = EMBEDDED)]
    model: String,
    /// A PEFT adapter to merge into the weights: a folder or a name on the Hub
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Write the adapter alone, for llama.cpp's --lora
    #[arg(long, requires = "adapter")]
    lora: bool,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Type of the matrices: f32, f16 or q8_0 [default: f16; f32 for an adapter alone]
    #[arg(long = "type", value_name = "TYPE", value_parser = tensor_kind)]
    kind: Option<TensorKind>,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
}

fn tensor_kind(word: &str) -> Result<TensorKind, String> {
    match word.to_ascii_lowercase().as_str() {
        "f32" => Ok(TensorKind::F32),
        "f16" => Ok(TensorKind::F16),
        "q8_0" => Ok(TensorKind::Q8_0),
        _ => Err("expected f32, f16 or q8_0".into()),
    }
}

/// Runs the command.
///
/// # Errors
///
/// [`ExportGgufError`] for a model, an adapter or an output that cannot be used. An existing output is unchanged then.
pub fn run(args: &ExportGgufArgs, screen: &Screen) -> Result<(), ExportGgufError> {
    let output = &args.output;
    if output.is_dir() {
        return Err(ExportGgufError::OutputIsFolder(output.clone()));
    }
    if output.exists() && !args.overwrite {
        return Err(ExportGgufError::Exists(output.clone()));
    }
    let path = if args.model == EMBEDDED {
        embedded::materialise()?.model_dir
    } else {
        hub::model_folder(&args.model, Need::Model)?
    };
    let same = |a: &Path, b: &Path| {
        a.canonicalize()
            .is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
    };
    if same(output, &path) {
        return Err(ExportGgufError::OutputIsInput(output.clone()));
    }
    let model = LlamaConfig::from_file(&path)?;
    let adapter = match &args.adapter {
        Some(folder) => Some(Adapter::read(&hub::adapter_folder(folder)?, &model)?),
        None => None,
    };
    let bytes = match &adapter {
        Some(adapter) if args.lora => {
            let kind = args.kind.unwrap_or(TensorKind::F32);
            write_adapter(output, adapter, kind)?
        }
        _ => {
            let kind = args.kind.unwrap_or(TensorKind::F16);
            write_model(output, &path, &model, adapter.as_ref(), kind, screen)?
        }
    };
    screen.line(&format!("{}: {}", output.display(), human::bytes(bytes)));
    Ok(())
}

fn text(key: &str, value: &str) -> (String, Value) {
    (key.into(), Value::Text(value.into()))
}

/// Writes a whole model, one tensor at a time. Returns the file's size in bytes.
fn write_model(
    output: &Path,
    path: &Path,
    model: &LlamaConfig,
    adapter: Option<&Adapter>,
    kind: TensorKind,
    screen: &Screen,
) -> Result<u64, ExportGgufError> {
    let mut weights = Weights::open(path)?;
    let mut shapes = model.tensor_shapes();
    weights.check(&shapes)?;
    if let Some(adapter) = adapter {
        adapter.add_untied_head(model, &mut shapes);
    }
    let mut metadata = vec![
        text("general.architecture", model.family.gguf_architecture),
        text("general.type", "model"),
    ];
    if let Some(name) = path.file_stem() {
        metadata.push(text("general.name", &name.to_string_lossy()));
    }
    metadata.push(("general.file_type".into(), Value::U32(kind.file_type())));
    metadata.push(("general.quantization_version".into(), Value::U32(2)));
    metadata.extend(config_metadata(model).map_err(ExportGgufError::Metadata)?);
    metadata.extend(if gguf::is_gguf(path) {
        // The keys of the GGUF file describe its tokenizer completely.
        let header = GgufFile::open(path)?.header;
        let keys = header.metadata.into_iter();
        keys.filter(|(key, _)| key.starts_with("tokenizer."))
            .collect()
    } else {
        tokenizer_metadata(&ModelFiles::read(path)?, model)?
    });

    let factors = rope_factors(model);
    let mut plans = Vec::new();
    if let Some(factors) = &factors {
        plans.push(TensorPlan {
            name: "rope_freqs.weight".into(),
            shape: vec![factors.len()],
            kind: TensorKind::F32,
        });
    }
    let mut unpacked = 0;
    for (name, shape) in &shapes {
        let Some(theirs) = llama_cpp_name(name) else {
            return Err(ExportGgufError::Tensor(name.clone()));
        };
        // Vectors stay floats, as in llama.cpp's own files.
        let kind = match shape[..] {
            [_, columns] if columns.is_multiple_of(kind.block()) => kind,
            [_, _] => {
                unpacked += 1;
                TensorKind::F16
            }
            _ => TensorKind::F32,
        };
        plans.push(TensorPlan {
            name: theirs,
            shape: shape.clone(),
            kind,
        });
    }
    if unpacked > 0 {
        screen.line(&format!(
            "{unpacked} matrices have rows that are not a multiple of {} values; they are written in F16",
            kind.block()
        ));
    }
    let task = screen.task("writing tensors", shapes.len());
    let bytes = write_atomically(output, |out| {
        let mut writer = GgufWriter::new(out, &metadata, plans)?;
        if let Some(factors) = &factors {
            writer.write(factors)?;
        }
        for (done, (name, shape)) in shapes.iter().enumerate() {
            let mut values = match adapter {
                Some(adapter) => adapter.merged(&mut weights, model, name)?,
                None => weights.read(name)?,
            };
            if let Some(rows) = rows_of(name, model) {
                let columns = shape.get(1).copied().unwrap_or(1);
                values = rows.to_llama_cpp(&values, columns);
            }
            writer.write(&values)?;
            task.at(done + 1);
        }
        writer.finish();
        Ok(())
    })?;
    drop(task);
    Ok(bytes)
}

/// Writes llama.cpp's LoRA file. Returns its size in bytes.
fn write_adapter(
    output: &Path,
    adapter: &Adapter,
    kind: TensorKind,
) -> Result<u64, ExportGgufError> {
    if kind == TensorKind::Q8_0 {
        return Err(ExportGgufError::QuantizedAdapter);
    }
    let (alpha, tensors) = adapter.lora_tensors()?;
    let metadata = [
        text("general.architecture", adapter.architecture()),
        text("general.type", "adapter"),
        text("adapter.type", "lora"),
        ("adapter.lora.alpha".into(), Value::F32(alpha)),
        ("general.file_type".into(), Value::U32(kind.file_type())),
    ];
    let plans = tensors.iter().map(|tensor| TensorPlan {
        name: tensor.name.clone(),
        shape: tensor.shape.to_vec(),
        kind,
    });
    let plans = plans.collect();
    write_atomically(output, |out| {
        let mut writer = GgufWriter::new(out, &metadata, plans)?;
        for tensor in &tensors {
            writer.write(&tensor.values)?;
        }
        writer.finish();
        Ok(())
    })
}

/// Writes the whole file or leaves the old one unchanged. Returns the file's size in bytes.
fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), ExportGgufError>,
) -> Result<u64, ExportGgufError> {
    let mut failure = None;
    let mut bytes = 0;
    let written = durable::write_atomically_by(path, |temporary| {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(temporary)?);
        if let Err(error) = write(&mut out) {
            let text = error.to_string();
            failure = Some(error);
            return Err(io::Error::other(text));
        }
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        bytes = file.metadata()?.len();
        Ok(())
    });
    match (failure, written) {
        (Some(error), _) => Err(ExportGgufError::File {
            path: path.into(),
            source: Box::new(error),
        }),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => Ok(bytes),
    }
}
