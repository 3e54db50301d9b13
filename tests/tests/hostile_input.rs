//! Every parser with thousands of invalid files: each gives an error or a correct load, without a
//! panic, within bounded memory and time.
//!
//! A program of its own rather than a set of tests, because the allocator counts the whole process.
//! Arguments that are not options select parsers by a part of their name; `HOSTILE_FILES` is the
//! number of files per parser (2,000 without it).

use std::fmt::Display;
use std::path::Path;

use burn::tensor::Device;
use data::PromptTemplate;
use data::{ModelFiles, PROMPT_FILE, RowTokenizer, TrainingPrompt, read_rows};
use export::merge::survival;
use hub::{Hub, HubName, Need, Progress, Settings};
use llama_burn::{Llama, LlamaConfig, LoadOptions, load};
use lora_core::{LoraConfig, Quantization};
use lora_train::checkpoint::{Checkpoint, MANIFEST, Manifest};
use lora_train::plan::{Plan, PlanOptions, Workload};
use peft::read_adapter;
use run_config::Config;
use serde_json::json;
use tests::allocator::CountingAllocator;
use tests::hostile::{Parser, Summary, read_all, table};
use tests::hub_server::{HubServer, Repository};
use tests::mutate::Format;
use tests::workspace::{Workspace, copy_folder, tokenizer};
use tests::{embedded_asset, fixture};
use train_step::optimizer::AdamW;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const MIB: usize = 1 << 20;

fn said(error: impl Display) -> String {
    error.to_string()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn main() {
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    if std::env::args().any(|word| word == "--list") {
        println!("hostile_input: test");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = HubServer::start();
    let parsers = [
        model_weights(folder.path()),
        shard_index(folder.path()),
        model_config(folder.path()),
        tokenizer_file(),
        tokenizer_config(),
        generation_config(),
        json_lines(folder.path()),
        json_array(folder.path()),
        csv(folder.path()),
        parquet(folder.path()),
        prompt_file(folder.path()),
        checkpoint(
            folder.path(),
            "checkpoint: manifest.json",
            MANIFEST,
            Format::Json,
        ),
        checkpoint(
            folder.path(),
            "checkpoint: state.json",
            "state.json",
            Format::Json,
        ),
        checkpoint(
            folder.path(),
            "checkpoint: training.safetensors",
            "training.safetensors",
            Format::Safetensors,
        ),
        merge_base(folder.path()),
        adapter_config(folder.path()),
        adapter_weights(folder.path()),
        config_toml(),
        config_json(),
        hub_listing(&server, folder.path()),
    ];
    let is_chosen = |name: &str| {
        chosen.is_empty()
            || chosen
                .iter()
                .any(|word| name.contains(word.as_str()) || "hostile_input".contains(word.as_str()))
    };
    let kept = std::env::temp_dir().join("hostile-input");
    std::fs::create_dir_all(&kept).expect("the folder for temporary files is writable");
    let mut summaries: Vec<Summary> = Vec::new();
    for parser in parsers {
        if is_chosen(parser.name) {
            summaries.push(read_all(parser, &kept));
        }
    }
    if summaries.is_empty() {
        return;
    }
    println!("\n{}", table(&summaries));
    let failures: Vec<String> = summaries
        .iter()
        .flat_map(|summary| {
            let shown = summary.failures.iter().take(5);
            shown.map(|failure| format!("{}: {failure}", summary.name))
        })
        .collect();
    let count: usize = summaries.iter().map(|summary| summary.failures.len()).sum();
    if count > 0 {
        eprintln!(
            "{count} failures, of each parser up to five:\n{}",
            failures.join("\n")
        );
        std::process::exit(1);
    }
}

/// A model folder with one changed file, loaded completely.
fn load_model(folder: &Path) -> Result<(), String> {
    let config = LlamaConfig::from_file(folder).map_err(said)?;
    let device = Device::flex();
    load(folder, &config, LoadOptions::default(), &device, |_| {}).map_err(said)?;
    Ok(())
}

fn model_weights(folder: &Path) -> Parser<'_> {
    let model = folder.join("weights");
    copy_folder(&fixture("tied").join("model"), &model);
    let path = model.join("model.safetensors");
    Parser {
        name: "model.safetensors",
        seeds: vec![(Format::Safetensors, read(&path))],
        memory: 16 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            load_model(&model)
        }),
    }
}

fn shard_index(folder: &Path) -> Parser<'_> {
    let model = folder.join("shards");
    copy_folder(&fixture("sharded_rslora_all_linear").join("model"), &model);
    let path = model.join("model.safetensors.index.json");
    Parser {
        name: "model.safetensors.index.json",
        seeds: vec![(Format::Json, read(&path))],
        memory: 16 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            load_model(&model)
        }),
    }
}

/// Every number that a plan shows is computed, so that none of them overflows.
fn model_config(folder: &Path) -> Parser<'_> {
    let model = folder.join("config");
    copy_folder(&fixture("tied").join("model"), &model);
    let path = model.join("config.json");
    let with_scaling = fixture("llama3_rope").join("model/config.json");
    Parser {
        name: "config.json",
        seeds: vec![
            (Format::Json, read(&path)),
            (Format::Json, read(&with_scaling)),
        ],
        memory: 64 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            let config = LlamaConfig::from_file(&path).map_err(said)?;
            let options = PlanOptions {
                lora: LoraConfig::default(),
                quantization: Quantization::Bits8,
                float_bytes: 4,
                gradient_checkpointing: true,
                accumulates: true,
                on_gpu: false,
                workload: Workload::largest(8, config.max_position_embeddings.min(4096), None),
            };
            let plan = Plan::new(&config, &options).map_err(said)?;
            plan.lines(&config, &options);
            // A plan for any configuration; a model only if it matches the weights.
            match load_model(&model) {
                Ok(()) => Ok(()),
                Err(message) if message.is_empty() => Err("an empty message".into()),
                Err(_) => Ok(()),
            }
        }),
    }
}

/// A tokenizer's file, and a text that is tokenized with it.
fn tokenizer_file() -> Parser<'static> {
    let words = tokenizer(64);
    let mut many_parts = words.clone();
    many_parts["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": true, "strip_right": true}]});
    many_parts["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": false},
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    many_parts["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    many_parts["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    many_parts["truncation"] =
        json!({"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    many_parts["padding"] = json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let mut pairs = words.clone();
    pairs["model"] = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "w": 6, "1": 7, "0": 8, "10": 9},
        "merges": [["a", "b"], ["1", "0"]]});
    let mut likely = words.clone();
    likely["model"] = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["w", -1.5], ["w1", -2.5], ["0", -3.0]]});
    likely["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let mut pieces = words.clone();
    pieces["model"] = json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "w": 3, "##1": 4, "##0": 5}});
    let seeds = [words, many_parts, pairs, likely, pieces]
        .map(|json| (Format::Json, json.to_string().into_bytes()));
    let mut seeds = seeds.to_vec();
    seeds.push((Format::Json, embedded_asset("model/tokenizer.json")));
    Parser {
        name: "tokenizer.json",
        seeds,
        memory: 64 * MIB,
        read: Box::new(|file| {
            let files = ModelFiles {
                folder: "model".into(),
                tokenizer: file.to_vec(),
                config: Some(r#"{"eos_token_id": 2}"#.into()),
                ..ModelFiles::default()
            };
            let tokenizer = RowTokenizer::new(&files, &PromptTemplate::Raw).map_err(said)?;
            let text = "w10 w11 <s>It's 12345 \u{e9}\u{1f600}\n\n  abab </s>w63 ".repeat(20);
            let ids = tokenizer
                .prompt(&text, Path::new("rows.jsonl"), 1)
                .map_err(said)?;
            assert!(
                ids.len() < 1_000_000,
                "{} tokens of a text of {}",
                ids.len(),
                text.len()
            );
            Ok(())
        }),
    }
}

/// Special tokens and chat templates, and a prompt that is rendered with them.
fn tokenizer_config() -> Parser<'static> {
    let chat = "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] | trim }}\
        {% if loop.last and add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}\
        {%- set ns = namespace(found=false) -%}{%- for m in messages if m.role == 'system' -%}\
        {%- set ns.found = true -%}{%- endfor -%}{{ messages[0].content[:5].upper() }}{{ messages | length }}";
    let plain = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "chat_template": chat,
        "model_max_length": 64, "add_bos_token": true});
    let list = json!({"eos_token": "</s>", "chat_template": [{"name": "default", "template": chat},
        {"name": "tool_use", "template": "{{ tools }}"}]});
    Parser {
        name: "tokenizer_config.json, template",
        seeds: [plain, list]
            .map(|json| (Format::Json, json.to_string().into_bytes()))
            .to_vec(),
        memory: 64 * MIB,
        read: Box::new(|file| {
            let files = ModelFiles {
                folder: "model".into(),
                tokenizer: tokenizer(64).to_string().into_bytes(),
                tokenizer_config: Some(String::from_utf8(file.to_vec()).map_err(said)?.into()),
                ..ModelFiles::default()
            };
            let tokenizer = RowTokenizer::new(&files, &PromptTemplate::Chat).map_err(said)?;
            tokenizer
                .prompt("w10 w20", Path::new("rows.jsonl"), 1)
                .map_err(said)?;
            Ok(())
        }),
    }
}

fn generation_config() -> Parser<'static> {
    let config = json!({"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "transformers_version": "5.0"});
    Parser {
        name: "generation_config.json",
        seeds: vec![(Format::Json, config.to_string().into_bytes())],
        memory: 16 * MIB,
        read: Box::new(|file| {
            let files = ModelFiles {
                folder: "model".into(),
                tokenizer: tokenizer(64).to_string().into_bytes(),
                generation_config: Some(String::from_utf8(file.to_vec()).map_err(said)?.into()),
                ..ModelFiles::default()
            };
            files.generation_end_tokens().map_err(said)?;
            RowTokenizer::new(&files, &PromptTemplate::Raw).map_err(said)?;
            Ok(())
        }),
    }
}

/// Examples of every format, each from a file of its own, up to their tokens.
fn rows<'a>(
    name: &'static str,
    file: &'static str,
    seeds: Vec<(Format, Vec<u8>)>,
    folder: &'a Path,
) -> Parser<'a> {
    let workspace = Workspace::new();
    let mut files =
        ModelFiles::read(&workspace.path("model")).unwrap_or_else(|error| panic!("{error}"));
    files.chat_template =
        Some("{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}".into());
    let path = folder.join(file);
    Parser {
        name,
        seeds,
        // A page of Parquet states its size in 31 bits, and the crate reserves that much address
        // space before it reads.
        memory: if file.ends_with(".parquet") {
            4096 * MIB
        } else {
            64 * MIB
        },
        read: Box::new(move |file| {
            write(&path, file);
            let rows = read_rows(&path, None).map_err(said)?;
            let mut tokenizer = RowTokenizer::new(&files, &PromptTemplate::Raw).map_err(said)?;
            tokenizer
                .prepare(&files, &PromptTemplate::Raw, rows.source.format, &path)
                .map_err(said)?;
            for row in &rows.rows {
                tokenizer.tokenize(row, &path, 1 << 20).map_err(said)?;
            }
            Ok(())
        }),
    }
}

fn json_lines(folder: &Path) -> Parser<'_> {
    let answers = read(&Workspace::new().path("rows.jsonl"));
    let lines = |value: serde_json::Value| format!("{value}\n{value}\n").into_bytes();
    let chat = lines(
        json!({"messages": [{"role": "system", "content": "w3"}, {"role": "user", "content": "w10 w11"},
        {"role": "assistant", "content": "w50"}, {"role": "user", "content": "w12"},
        {"role": "assistant", "content": "w51"}]}),
    );
    let alpaca = lines(json!({"instruction": "w10", "input": "w11", "output": "w50"}));
    let completion = lines(json!({"prompt": "w10", "completion": "w50"}));
    let text = lines(json!({"text": "w10 w11 w12"}));
    let seeds = [answers, chat, alpaca, completion, text].map(|file| (Format::JsonLines, file));
    rows("rows, JSON lines", "rows.jsonl", seeds.to_vec(), folder)
}

fn json_array(folder: &Path) -> Parser<'_> {
    let row = json!({"instruction": "w10", "input": "", "output": "w50"});
    let seeds = vec![(
        Format::Json,
        json!([row, row, row]).to_string().into_bytes(),
    )];
    rows("rows, JSON", "rows.json", seeds, folder)
}

fn csv(folder: &Path) -> Parser<'_> {
    let table = "id,context,target\n1,\"w10, w11\nw12\",w50\n2,w11,w51\n3,\"a \"\"b\"\"\",w50\n";
    rows(
        "rows, CSV",
        "rows.csv",
        vec![(Format::Lines, table.into())],
        folder,
    )
}

fn parquet(folder: &Path) -> Parser<'_> {
    let files = ["pairs", "messages"].map(|name| {
        (
            Format::Binary,
            read(&fixture("formats").join(format!("{name}.parquet"))),
        )
    });
    rows("rows, Parquet", "rows.parquet", files.to_vec(), folder)
}

/// The record of an adapter's training prompts.
fn prompt_file(folder: &Path) -> Parser<'_> {
    let prompt = json!({"prompt_template": "chat", "dataset_format": "messages", "chat_template_sha256": "0".repeat(64)});
    Parser {
        name: "the adapter's prompt file",
        seeds: vec![(Format::Json, prompt.to_string().into_bytes())],
        memory: 16 * MIB,
        read: Box::new(move |file| {
            write(&folder.join(PROMPT_FILE), file);
            TrainingPrompt::read(folder).map(drop).map_err(said)
        }),
    }
}

/// A checkpoint of a run of two steps. Its manifest is made anew if another file is changed, so
/// that hashes do not refuse files before the parser reads them.
fn checkpoint<'a>(
    folder: &'a Path,
    name: &'static str,
    file: &'static str,
    format: Format,
) -> Parser<'a> {
    let workspace = Workspace::new();
    workspace
        .train(&["max_steps=2", "save_steps=2"])
        .succeeded();
    let place = folder.join(name.replace(' ', "-"));
    copy_folder(&workspace.path("out/checkpoints/step-000002"), &place);
    let model = LlamaConfig::from_file(&fixture("tied").join("model"))
        .unwrap_or_else(|error| panic!("{error}"));
    let model = Llama::random(&model, 1, &Device::flex().autodiff());
    let path = place.join(file);
    Parser {
        name,
        seeds: vec![(format, read(&path))],
        memory: 64 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            if !path.ends_with(MANIFEST) {
                let _ = std::fs::remove_file(place.join(MANIFEST));
                let manifest = Manifest::of(&place).map_err(said)?;
                write(&place.join(MANIFEST), &manifest.to_bytes());
            }
            let checkpoint = Checkpoint::open(&place).map_err(said)?;
            checkpoint.kept().map_err(said)?;
            let tensors = checkpoint.tensors().map_err(said)?;
            let lora = checkpoint.config.lora_config();
            let model = model.clone().with_lora(&lora, 1).map_err(said)?;
            let mut optimizer = AdamW {
                beta_1: 0.9,
                beta_2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
            }
            .resumable();
            tensors.put(model, &mut optimizer).map_err(said)?;
            Ok(())
        }),
    }
}

/// The parts of a base model that merging reads without loading it.
fn merge_base(folder: &Path) -> Parser<'_> {
    let model = folder.join("merge");
    copy_folder(&fixture("tied").join("model"), &model);
    let path = model.join("model.safetensors");
    let adapter = fixture("tied").join("trained");
    Parser {
        name: "merging: model.safetensors",
        seeds: vec![(Format::Safetensors, read(&path))],
        memory: 16 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            survival(&model, &adapter, 8, Quantization::Bits8, &mut |_, _| {})
                .map(drop)
                .map_err(said)
        }),
    }
}

/// An adapter's folder, applied to its model.
fn adapter<'a>(
    folder: &'a Path,
    name: &'static str,
    file: &'static str,
    format: Format,
) -> Parser<'a> {
    let place = folder.join(name.replace(' ', "-"));
    copy_folder(&fixture("tied").join("trained"), &place);
    let model = fixture("tied").join("model");
    let config = LlamaConfig::from_file(&model).unwrap_or_else(|error| panic!("{error}"));
    let base = load(
        &model,
        &config,
        LoadOptions::default(),
        &Device::flex(),
        |_| {},
    );
    let base = base.unwrap_or_else(|error| panic!("{error}"));
    let path = place.join(file);
    Parser {
        name,
        seeds: vec![(format, read(&path))],
        memory: 32 * MIB,
        read: Box::new(move |file| {
            write(&path, file);
            let (config, tensors) = read_adapter(&place).map_err(said)?;
            tensors.put_on(base.clone(), &config.lora).map_err(said)?;
            Ok(())
        }),
    }
}

fn adapter_config(folder: &Path) -> Parser<'_> {
    adapter(
        folder,
        "adapter_config.json",
        "adapter_config.json",
        Format::Json,
    )
}

fn adapter_weights(folder: &Path) -> Parser<'_> {
    adapter(
        folder,
        "adapter_model.safetensors",
        "adapter_model.safetensors",
        Format::Safetensors,
    )
}

/// An accepted configuration is written and read back as the same.
fn configuration(file: &[u8], name: &str) -> Result<(), String> {
    let text = std::str::from_utf8(file).map_err(said)?;
    let config = Config::parse(text, Some(Path::new(name)), None, &[]).map_err(said)?;
    let written = config.to_toml();
    let again = Config::parse(&written, Some(Path::new("again.toml")), None, &[]);
    let again =
        again.unwrap_or_else(|error| panic!("the written file is refused: {error}\n{written}"));
    let source = config.source.clone();
    assert!(Config { source, ..again } == config, "{written}");
    Ok(())
}

fn config_toml() -> Parser<'static> {
    let seeds = ["embedded", "smollm2-135m-fpb", "llama-3.2-1b"].map(|name| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../configs")
            .join(format!("{name}.toml"));
        (Format::Lines, read(&path))
    });
    let every_key = Config::load(None, None, &[])
        .unwrap_or_else(|error| panic!("{error}"))
        .to_toml();
    let mut seeds = seeds.to_vec();
    seeds.push((Format::Lines, every_key.into_bytes()));
    Parser {
        name: "configuration, TOML",
        seeds,
        // The parser holds a token per bracket.
        memory: 64 * MIB,
        read: Box::new(|file| configuration(file, "run.toml")),
    }
}

fn config_json() -> Parser<'static> {
    let run = json!({"base_model": "models/x", "dataset_path": "data/x.jsonl", "quant_bits": 8, "lora_r": 8,
        "lora_alpha": 16, "learning_rate": 1e-4, "num_epochs": 4, "batch_size": 8, "gradient_accumulation_steps": 2,
        "peft_use_rslora": true, "peft_use_dora": false, "target_modules": ["q_proj", "v_proj"]});
    let every_key = Config::load(None, None, &[])
        .unwrap_or_else(|error| panic!("{error}"))
        .to_toml();
    let every_key: toml::Table = every_key.parse().unwrap_or_else(|error| panic!("{error}"));
    let seeds = [
        run.to_string(),
        json!({"sentiment": run}).to_string(),
        json!(every_key).to_string(),
    ];
    Parser {
        name: "configuration, JSON",
        seeds: seeds.map(|text| (Format::Json, text.into_bytes())).to_vec(),
        memory: 16 * MIB,
        read: Box::new(|file| configuration(file, "run.json")),
    }
}

/// The Hub's list of files, over HTTP, into a cache of its own.
fn hub_listing<'a>(server: &'a HubServer, folder: &'a Path) -> Parser<'a> {
    let config = b"{}";
    let hash = tests::hub_server::git_hash(config);
    let listing = json!({"sha": tests::hub_server::COMMIT, "id": "owner/model", "siblings": [
        {"rfilename": ".gitattributes", "size": 5, "blobId": hash},
        {"rfilename": "config.json", "size": 2, "blobId": hash},
        {"rfilename": "model.safetensors", "size": 9, "blobId": hash,
         "lfs": {"sha256": "1".repeat(64), "size": 9, "pointerSize": 134}}]});
    let name = HubName::parse("owner/model").unwrap_or_else(|| panic!("a name"));
    let mut number = 0;
    Parser {
        name: "the Hub's list of files",
        seeds: vec![(Format::Json, listing.to_string().into_bytes())],
        memory: 64 * MIB,
        read: Box::new(move |file| {
            number += 1;
            let listing = Some(String::from_utf8(file.to_vec()).map_err(said)?);
            let repository = Repository::of(&[("config.json", config)]);
            server.put(
                "owner/model",
                Repository {
                    listing,
                    ..repository
                },
            );
            let settings = Settings {
                endpoint: server.endpoint(),
                token: None,
                cache: folder.join(format!("hub-{number}")),
                offline: false,
                timeout: std::time::Duration::from_secs(2),
                retries: (0, std::time::Duration::ZERO),
            };
            let cache = settings.cache.clone();
            let outcome = Hub::new(settings, Progress::hidden()).fetch(&name, Need::Config);
            server.requests();
            let _ = std::fs::remove_dir_all(cache);
            outcome.map(drop).map_err(said)
        }),
    }
}
