//! The program with names on the Hub instead of folders, as a user types them.

use std::fs;

use tests::hub_server::{HubServer, Repository};
use tests::program::{Outcome, run_in};
use tests::workspace::Workspace;

/// A workspace whose model is on the Hub, as `owner/tiny`, and in no folder.
struct OnTheHub {
    workspace: Workspace,
    server: HubServer,
}

impl OnTheHub {
    fn new() -> Self {
        let workspace = Workspace::new();
        let server = HubServer::start();
        server.put(
            "owner/tiny",
            Repository::of_folder(&workspace.path("model")),
        );
        fs::remove_dir_all(workspace.path("model")).expect("the model can be removed");
        Self { workspace, server }
    }

    fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
        let home = self.workspace.path("hf").display().to_string();
        let endpoint = self.server.endpoint();
        let variables = [
            ("HF_HOME", home.as_str()),
            ("HF_ENDPOINT", &endpoint),
            ("HF_TOKEN", ""),
            ("HF_HUB_CACHE", ""),
            ("HF_HUB_OFFLINE", ""),
        ];
        run_in(
            &self.workspace.path("."),
            arguments,
            &[&variables, environment].concat(),
        )
    }

    fn with_config(&self, command: &str, more: &[&str], environment: &[(&str, &str)]) -> Outcome {
        let config = self.workspace.path("config.toml").display().to_string();
        let arguments = [
            command,
            "--config",
            &config,
            "--set",
            "base_model=owner/tiny",
        ];
        self.run(&[&arguments, more].concat(), environment)
    }

    fn fetched(&self) -> Vec<String> {
        let requests = self.server.requests().into_iter();
        requests
            .filter_map(|request| {
                Some(
                    request
                        .path
                        .rsplit_once("/resolve/")?
                        .1
                        .split_once('/')?
                        .1
                        .to_string(),
                )
            })
            .collect()
    }
}

#[test]
fn a_model_on_the_hub_is_planned_inspected_trained_and_used() {
    let hub = OnTheHub::new();
    hub.with_config("plan", &[], &[]).succeeded();
    assert_eq!(hub.fetched(), ["config.json"]);
    hub.with_config("inspect-data", &[], &[]).succeeded();
    assert!(!hub.fetched().contains(&"model.safetensors".into()));
    let train = ["--backend", "cpu", "--set", "max_steps=1"];
    let text = hub.with_config("train", &train, &[]).succeeded();
    assert!(text.contains("downloading 1 file of owner/tiny"), "{text}");
    let adapter = hub.workspace.path("out/adapter");
    let config =
        fs::read_to_string(adapter.join("adapter_config.json")).expect("the adapter is there");
    assert!(
        config.contains("\"base_model_name_or_path\": \"owner/tiny\""),
        "{config}"
    );

    let card = fs::read_to_string(adapter.join("README.md")).expect("the card is there");
    for part in [
        "base_model: \"owner/tiny\"\nlibrary_name: peft\n",
        "rows.jsonl",
        "| `lora_r` | `4` |",
        "cargo xtask train --config",
        "| loss |",
    ] {
        assert!(card.contains(part), "{part:?} is not in\n{card}");
    }

    hub.server
        .put("owner/tiny-lora", Repository::of_folder(&adapter));
    let generate = [
        "generate",
        "--backend",
        "cpu",
        "--model",
        "owner/tiny",
        "--adapter",
        "owner/tiny-lora",
        "--template",
        "raw",
        "--prompt",
        "w10 w20",
        "--max-new-tokens",
        "2",
    ];
    hub.run(&generate, &[]).succeeded();
    // Everything is in the cache now.
    let offline = [
        ("HF_HUB_OFFLINE", "1"),
        ("HF_ENDPOINT", "http://127.0.0.1:9"),
    ];
    hub.run(&generate, &offline).succeeded();
    hub.with_config("train", &[&train[..], &["--overwrite"]].concat(), &offline)
        .succeeded();
}

#[test]
fn a_folder_wins_over_a_name() {
    let hub = OnTheHub::new();
    let other = Workspace::new();
    tests::workspace::copy_folder(&other.path("model"), &hub.workspace.path("owner/tiny"));
    hub.with_config("train", &["--backend", "cpu", "--set", "max_steps=1"], &[])
        .succeeded();
    assert!(hub.server.requests().is_empty());
}

#[test]
fn what_is_neither_folder_nor_name_says_both_ways() {
    let hub = OnTheHub::new();
    let both = [
        "base_model",
        "there is no such folder",
        "--set base_model=FOLDER",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ];
    hub.with_config("train", &["--set", "base_model=models/none"], &[])
        .failed_saying(&both);
    hub.with_config("plan", &[], &[("HF_ENDPOINT", "huggingface.co")])
        .failed_saying(&["HF_ENDPOINT", "https://"]);
    hub.with_config("plan", &[], &[("HF_HUB_OFFLINE", "1")])
        .failed_saying(&["HF_HUB_OFFLINE", "hf download owner/tiny"]);
    let generate = |more: &[&str]| {
        hub.run(
            &[&["generate", "--backend", "cpu", "--prompt", "w10"], more].concat(),
            &[],
        )
    };
    generate(&["--model", "models/none"]).failed_saying(&["neither a folder", "ORG/NAME"]);
    generate(&["--model", "owner/none"])
        .failed_saying(&["owner/none", "neither a folder here nor a repository"]);
    generate(&["--model", "owner/tiny", "--adapter", "runs/none"])
        .failed_saying(&["neither a folder", "runs/none"]);
}

#[test]
fn a_token_in_the_environment_opens_a_private_model_and_is_never_shown() {
    let hub = OnTheHub::new();
    let workspace = Workspace::new();
    let repository = Repository {
        private: Some("hf_secret".into()),
        ..Repository::of_folder(&workspace.path("model"))
    };
    hub.server.put("owner/private", repository);
    let generate = [
        "generate",
        "--backend",
        "cpu",
        "--model",
        "owner/private",
        "--template",
        "raw",
        "--prompt",
        "w10",
        "--max-new-tokens",
        "1",
    ];
    hub.run(&generate, &[])
        .failed_saying(&["owner/private", "hf auth login"]);
    let text = hub
        .run(
            &generate,
            &[("HF_TOKEN", "hf_secret"), ("RUST_LOG", "debug")],
        )
        .succeeded();
    assert!(!text.contains("hf_secret"), "{text}");
    // Only when it is in the cache.
    hub.run(&generate, &[("HF_HUB_OFFLINE", "1")]).succeeded();
}
