//! Invalid models and adapters: the messages on the screen.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::fixture;
use tests::program::{Outcome, run};
use tests::workspace::{Workspace, copy_folder, edit_json};

/// A workspace with an adapter for its model.
fn place() -> Workspace {
    let workspace = Workspace::new();
    copy_folder(&fixture("tied").join("trained"), &workspace.path("adapter"));
    workspace
}

fn generate(workspace: &Workspace, more: &[&str]) -> Outcome {
    let model = workspace.path("model").display().to_string();
    let arguments = [
        "generate",
        "--backend",
        "cpu",
        "--model",
        &model,
        "--template",
        "raw",
        "--prompt",
        "w10 w20",
        "--max-new-tokens",
        "2",
    ];
    run(&[&arguments, more].concat())
}

fn with_adapter(workspace: &Workspace) -> Outcome {
    let adapter = workspace.path("adapter").display().to_string();
    generate(workspace, &["--adapter", &adapter])
}

fn edit(path: &Path, key: &str, value: Value) {
    edit_json(path, |json| json[key] = value);
}

#[test]
fn the_adapter_of_this_model_is_taken() {
    with_adapter(&place()).succeeded();
}

#[test]
fn an_adapter_for_another_model_names_a_tensor_that_has_no_place() {
    let workspace = place();
    fs::remove_dir_all(workspace.path("adapter")).expect("it is there");
    copy_folder(
        &fixture("stories260k").join("trained"),
        &workspace.path("adapter"),
    );
    with_adapter(&workspace).failed_saying(&["adapter", "_proj", "no place"]);
}

#[test]
fn an_adapter_that_asks_for_something_unknown_names_the_field() {
    let workspace = place();
    let config = workspace.path("adapter/adapter_config.json");
    for (key, value) in [
        ("a_field_of_the_future", json!(1)),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("IA3")),
        ("layer_replication", json!([[0, 1]])),
    ] {
        let before = fs::read(&config).expect("it is there");
        edit(&config, key, value);
        with_adapter(&workspace).failed_saying(&["adapter_config.json", key]);
        fs::write(&config, before).expect("it can be written");
    }
}

#[test]
fn an_adapter_of_another_rank_than_it_says_names_tensor_and_shapes() {
    let workspace = place();
    edit(
        &workspace.path("adapter/adapter_config.json"),
        "r",
        json!(3),
    );
    with_adapter(&workspace).failed_saying(&["adapter_model.safetensors", "lora_A", "3"]);
}

#[test]
fn pickles_are_not_read_and_the_way_out_is_said() {
    let workspace = place();
    let adapter = workspace.path("adapter");
    fs::rename(
        adapter.join("adapter_model.safetensors"),
        adapter.join("adapter_model.bin"),
    )
    .expect("it is there");
    with_adapter(&workspace).failed_saying(&["adapter_model.bin", "save_pretrained"]);
    let model = workspace.path("model");
    fs::rename(
        model.join("model.safetensors"),
        model.join("pytorch_model.bin"),
    )
    .expect("it is there");
    generate(&workspace, &[]).failed_saying(&["pytorch_model.bin", "save_pretrained"]);
    workspace
        .train(&[])
        .failed_saying(&["pytorch_model.bin", "save_pretrained"]);
}

#[test]
fn a_model_without_a_tokenizer_says_which_file_is_missing() {
    let workspace = place();
    fs::remove_file(workspace.path("model/tokenizer.json")).expect("it is there");
    generate(&workspace, &[]).failed_saying(&["tokenizer.json"]);
    workspace.train(&[]).failed_saying(&["tokenizer.json"]);
}

#[test]
fn weights_of_another_shape_than_the_configuration_says_are_named() {
    let workspace = place();
    edit(
        &workspace.path("model/config.json"),
        "intermediate_size",
        json!(28),
    );
    generate(&workspace, &[]).failed_saying(&["mlp.", "24", "28"]);
}

#[test]
fn a_count_that_no_model_has_is_refused_before_anything_is_allocated() {
    let workspace = place();
    for key in [
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    ] {
        let config = workspace.path("model/config.json");
        let before = fs::read(&config).expect("it is there");
        edit(&config, key, json!(268_435_456));
        generate(&workspace, &[]).failed_saying(&["config.json", key, "268435456"]);
        fs::write(&config, before).expect("it can be written");
    }
}

#[test]
fn weights_that_are_cut_off_say_so() {
    let workspace = place();
    let path = workspace.path("model/model.safetensors");
    let bytes = fs::read(&path).expect("it is there");
    for length in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).expect("it can be written");
        generate(&workspace, &[]).failed_saying(&["model.safetensors", "cut off"]);
    }
}

#[test]
fn a_chat_template_that_never_ends_or_fills_the_memory_is_stopped() {
    let workspace = place();
    let config = workspace.path("model/tokenizer_config.json");
    for template in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{{ 'x' * 99999999 }}{% endfor %}",
        "{%}",
    ] {
        edit(&config, "chat_template", json!(template));
        let model = workspace.path("model").display().to_string();
        let arguments = [
            "generate",
            "--backend",
            "cpu",
            "--model",
            &model,
            "--template",
            "chat",
            "--prompt",
            "w10",
        ];
        run(&arguments).failed_saying(&["tokenizer_config.json"]);
    }
}
