//! Every method of adapting with every family of models, through the program: what trains, loads, merges and is
//! exported. The README's table is what this test saw.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use llama_burn::Family;
use lora_core::Method;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use tests::program::{Outcome, run};
use tests::workspace::{copy_folder, edit_json};
use tests::{embedded_asset, runs};

/// The beginning and the end of the table in the README.
const MARKS: [&str; 2] = [
    "<!-- written by tests/tests/combinations.rs -->\n\n",
    "\n<!-- end -->",
];

/// What is tried.
const ALL: &str = "all: trains, is read back from PEFT's format, merges, is exported merged as a GGUF model and alone as a GGUF adapter.";

/// A family: its name, `model_type`, and what its layers have besides a Llama's.
struct Kind {
    name: &'static str,
    model_type: &'static str,
    class: &'static str,
    /// Tensors of each layer, and whether their width is that of the queries (else of the keys), or of a head.
    tensors: &'static [(&'static str, Width)],
}

#[derive(Clone, Copy)]
enum Width {
    Queries,
    Keys,
    Head,
}

const FAMILIES: [Kind; 4] = [
    Kind {
        name: "Llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        tensors: &[],
    },
    Kind {
        name: "Mistral",
        model_type: "mistral",
        class: "MistralForCausalLM",
        tensors: &[],
    },
    Kind {
        name: "Qwen 2, Qwen 2.5",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        tensors: &[
            ("self_attn.q_proj.bias", Width::Queries),
            ("self_attn.k_proj.bias", Width::Keys),
            ("self_attn.v_proj.bias", Width::Keys),
        ],
    },
    Kind {
        name: "Qwen 3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        tensors: &[
            ("self_attn.q_norm.weight", Width::Head),
            ("self_attn.k_norm.weight", Width::Head),
        ],
    },
];

/// A line of the table: the name, and the settings of the run.
const METHODS: [(&str, &[&str]); 8] = [
    ("LoRA, rsLoRA", &["peft_use_rslora=true"]),
    ("LoRA+", &["loraplus_lr_ratio=16"]),
    ("PiSSA", &["init_lora_weights=pissa"]),
    ("OLoRA", &["init_lora_weights=olora"]),
    ("DoRA", &["peft_use_dora=true"]),
    (
        "VeRA",
        &["peft_type=vera", "lora_r=64", "learning_rate=0.05"],
    ),
    ("LoRA and `bias`", &["bias=all"]),
    (
        "LoRA and `modules_to_save`",
        &["modules_to_save=[\"embed_tokens\", \"norm\"]"],
    ),
];

#[test]
fn the_readme_says_which_methods_work_with_which_families() {
    let known = Family::model_types();
    assert!(
        FAMILIES
            .iter()
            .all(|kind| known.contains(&format!("{:?}", kind.model_type))),
        "{known}"
    );
    assert_eq!(
        known.matches('"').count(),
        2 * FAMILIES.len(),
        "a family is missing in this test: {known}"
    );
    for method in Method::ALL {
        let name = method.to_string();
        assert!(
            METHODS.iter().any(|(line, _)| line.contains(&name)),
            "{name}"
        );
    }
    let columns: Vec<Vec<String>> = std::thread::scope(|scope| {
        let families = FAMILIES.iter().map(|kind| scope.spawn(|| column(kind)));
        let families: Vec<_> = families.collect();
        let families = families.into_iter();
        families
            .map(|family| family.join().expect("a family's thread"))
            .collect()
    });
    let table = table(&columns);
    println!("{table}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(&path).expect("the README");
    let [begin, end] = MARKS;
    let (before, rest) = readme.split_once(begin).expect("the table's beginning");
    let (now, after) = rest.split_once(end).expect("the table's end");
    if std::env::var_os("LORA_UPDATE_README").is_some() {
        let readme = format!("{before}{begin}{table}{end}{after}");
        fs::write(&path, readme).expect("the README can be written");
    } else {
        assert_eq!(
            now, table,
            "LORA_UPDATE_README=1 writes the table that was seen"
        );
    }
}

fn table(columns: &[Vec<String>]) -> String {
    let names: Vec<&str> = FAMILIES.iter().map(|kind| kind.name).collect();
    let mut table = format!(
        "| | {} |\n| --- |{}\n",
        names.join(" | "),
        " --- |".repeat(names.len())
    );
    for (i, (method, _)) in METHODS.iter().enumerate() {
        let cells: Vec<&str> = columns.iter().map(|column| column[i].as_str()).collect();
        table += &format!("| {method} | {} |\n", cells.join(" | "));
    }
    format!("{table}\n{ALL}")
}

/// The cells of a family.
fn column(kind: &Kind) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = folder.path().join("model");
    write_model(kind, &model);
    let rows: Vec<Vec<u32>> = vec![(10..50).collect(), vec![0, 7, 300, 41]];
    let tokens = folder.path().join("tokens.json");
    fs::write(&tokens, json!(rows).to_string()).expect("a temporary folder is writable");
    let cells = METHODS.iter().map(|(name, settings)| {
        let run = folder.path().join("run");
        let _ = fs::remove_dir_all(&run);
        let combination = Combination {
            name: format!("{}, {name}", kind.name),
            model: &model,
            tokens: &tokens,
            run: &run,
        };
        combination.cell(settings)
    });
    cells.collect()
}

/// The embedded model as one of this family.
fn write_model(kind: &Kind, folder: &Path) {
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/model");
    copy_folder(&embedded, folder);
    let mut sizes = BTreeMap::new();
    edit_json(&folder.join("config.json"), |config| {
        config["model_type"] = json!(kind.model_type);
        config["architectures"] = json!([kind.class]);
        for key in [
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ] {
            let size = config[key].as_u64().expect("a size");
            sizes.insert(key, size as usize);
        }
    });
    let head = sizes["head_dim"];
    let bytes = embedded_asset("model/model.safetensors");
    let weights = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut more: Vec<(String, Vec<u8>)> = Vec::new();
    for layer in 0..sizes["num_hidden_layers"] {
        for (name, width) in kind.tensors {
            let width = match width {
                Width::Queries => sizes["num_attention_heads"] * head,
                Width::Keys => sizes["num_key_value_heads"] * head,
                Width::Head => head,
            };
            // Biases around 0 and gains around 1.
            let middle = if name.ends_with("bias") { 0.0 } else { 1.0 };
            let value = |i: usize| middle + ((i * 37 + layer) % 19) as f32 / 100.0 - 0.09;
            let bytes = (0..width).flat_map(|i| value(i).to_le_bytes());
            more.push((format!("model.layers.{layer}.{name}"), bytes.collect()));
        }
    }
    let more = more.iter().map(|(name, bytes)| {
        let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
        (name.clone(), view.expect("a tensor"))
    });
    let all: Vec<(String, TensorView)> = weights.tensors().into_iter().chain(more).collect();
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(all, None, &path).expect("the model can be written");
}

/// A method with a family.
struct Combination<'a> {
    name: String,
    model: &'a Path,
    tokens: &'a Path,
    run: &'a Path,
}

impl Combination<'_> {
    /// What works. What does not work is refused with a reason.
    fn cell(&self, settings: &[&str]) -> String {
        self.train(settings);
        let adapter = self.run.join("adapter");
        let adapter = adapter.display().to_string();
        let base = self.logits(self.model, &[]);
        let adapted = self.logits(self.model, &["--adapter", &adapter]);
        let change = distance(&base, &adapted);
        assert!(
            change > 1e-3,
            "{}: the adapter changes nothing: {change}",
            self.name
        );

        let merged = self.run.join("merged");
        let [model, output] = [self.model, &merged].map(|path| path.display().to_string());
        let arguments = [
            "merge",
            "--model",
            &model,
            "--adapter",
            &adapter,
            "--output",
            &output,
        ];
        self.succeeds(&[&arguments[..], &["--dtype", "f32"]].concat());
        self.is_near(&adapted, &self.logits(&merged, &[]), "merged");

        let gguf = self.run.join("model.gguf");
        let output = gguf.display().to_string();
        let export = [
            "export-gguf",
            "--model",
            &model,
            "--adapter",
            &adapter,
            "--output",
            &output,
        ];
        self.succeeds(&[&export[..], &["--type", "f32"]].concat());
        self.is_near(&adapted, &self.logits(&gguf, &[]), "GGUF");

        let output = self.run.join("adapter.gguf").display().to_string();
        let export = [
            "export-gguf",
            "--lora",
            "--model",
            &model,
            "--adapter",
            &adapter,
        ];
        let exported = run(&[&export[..], &["--output", &output]].concat());
        if exported.code == Some(0) {
            return "all".into();
        }
        exported.failed_saying(&["llama.cpp"]);
        "all but GGUF adapters".into()
    }

    /// A few steps on the embedded data, in which the loss falls.
    fn train(&self, settings: &[&str]) {
        let data =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/data/sentiment_train.jsonl");
        let [model, data, output] =
            [self.model, &data, self.run].map(|path| path.display().to_string());
        let mut all = vec![
            format!("base_model={model}"),
            format!("dataset_path={data}"),
            format!("output_dir={output}"),
            "lora_r=4".into(),
            "learning_rate=0.005".into(),
            "max_steps=8".into(),
            "batch_size=4".into(),
            "val_set_size=4".into(),
        ];
        all.extend(settings.iter().map(|setting| setting.to_string()));
        let mut arguments = vec!["train", "--backend", "cpu"];
        for setting in &all {
            arguments.extend(["--set", setting]);
        }
        self.succeeds(&arguments);
        let losses = runs::losses(self.run);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (losses[0], mean(&losses[losses.len() - 3..]));
        assert!(
            last < first,
            "{}: the loss does not fall: {losses:?}",
            self.name
        );
    }

    /// The logits of the tokens, with the weights as they are in the file.
    fn logits(&self, model: &Path, more: &[&str]) -> Vec<f32> {
        let file = self.run.join("logits.safetensors");
        let [model, tokens, output] =
            [model, self.tokens, &file].map(|path| path.display().to_string());
        let arguments = [
            "logits",
            "--backend",
            "cpu",
            "--compute-dtype",
            "f32",
            "--quant-bits",
            "16",
            "--model",
            &model,
            "--tokens",
            &tokens,
            "--output",
            &output,
        ];
        self.succeeds(&[&arguments[..], more].concat());
        let bytes = fs::read(&file).expect("the logits");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let mut names = tensors.names();
        names.sort();
        let values = names.into_iter().flat_map(|name| {
            let data = tensors.tensor(name).expect("a tensor").data().to_vec();
            let values = data
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes(four.try_into().expect("4")));
            values.collect::<Vec<_>>()
        });
        values.collect()
    }

    /// Logits are up to about 10. A merge rounds each weight to f32; the program keeps products with the adapter apart.
    fn is_near(&self, expected: &[f32], got: &[f32], what: &str) {
        let distance = distance(expected, got);
        assert!(distance < 1e-3, "{}: {what}: off by {distance}", self.name);
    }

    fn succeeds(&self, arguments: &[&str]) {
        let Outcome { code, text } = run(arguments);
        assert_eq!(code, Some(0), "{}: {arguments:?}\n{text}", self.name);
    }
}

/// The largest difference.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}
