//! The files of a repository, and which of them are needed.

use serde_json::Value;

use super::digest::Digest;
use super::name::is_commit;
use super::{HubError, HubName};

pub(super) const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Small files that say how text becomes tokens and how a text ends. The template is neither JSON nor
/// safetensors; newer models keep it in a file of its own, and it is text that is never run as a program.
const TEXT_FILES: [&str; 6] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
];

/// The largest JSON file that is downloaded with an adapter.
const LARGEST_ADAPTER_JSON: u64 = 1 << 20;
/// The limit for a file whose size the Hub does not state.
pub(super) const LARGEST_TEXT: u64 = 256 << 20;
/// More shards than any model has.
const MOST_SHARDS: usize = 4096;

/// What is needed of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The shape of a model: `config.json`.
    Config,
    /// Shape, tokenizer and templates.
    Text,
    /// All of a model: also its weights, in safetensors.
    Model,
    /// An adapter in PEFT's layout.
    Adapter,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub name: String,
    /// Mirrors that do not list sizes and hashes state them with the file.
    pub size: Option<u64>,
    pub digest: Option<Digest>,
}

impl RemoteFile {
    pub fn is_text(&self) -> bool {
        !self.name.ends_with(".safetensors")
    }
}

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

impl Listing {
    /// Reads the Hub's response to `/api/models/ORG/NAME/revision/REVISION?blobs=true`.
    pub fn parse(answer: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(answer).map_err(|error| format!("not JSON: {error}"))?;
        let commit = value["sha"].as_str().filter(|sha| is_commit(sha));
        let commit = commit
            .ok_or("its answer names no commit (\"sha\")")?
            .to_string();
        let siblings = value["siblings"].as_array();
        let siblings = siblings.ok_or("its answer lists no files (\"siblings\")")?;
        let files = siblings.iter().filter_map(|file| {
            let lfs = &file["lfs"];
            let digest = lfs["sha256"].as_str().or(match lfs {
                Value::Null => file["blobId"].as_str(),
                // A large file's own blob is a pointer.
                _ => None,
            });
            Some(RemoteFile {
                name: file["rfilename"].as_str()?.to_string(),
                size: lfs["size"].as_u64().or(file["size"].as_u64()),
                digest: digest.and_then(Digest::parse),
            })
        });
        Ok(Self {
            commit,
            files: files.collect(),
        })
    }

    /// The listing of a folder of the cache.
    pub fn of_names(commit: &str, names: Vec<String>) -> Self {
        let files = names.into_iter().map(|name| RemoteFile {
            name,
            size: None,
            digest: None,
        });
        Self {
            commit: commit.into(),
            files: files.collect(),
        }
    }

    fn file(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The files to download, the weights last. For a model in shards this is the index only;
    /// [`shards`](Self::shards) returns the files that the index names.
    pub fn select(&self, name: &HubName, need: Need) -> Result<Vec<RemoteFile>, HubError> {
        let required: &[&str] = match need {
            Need::Config => &["config.json"],
            Need::Text | Need::Model => &["config.json", "tokenizer.json"],
            Need::Adapter => &[ADAPTER_CONFIG],
        };
        let mut files = Vec::new();
        for wanted in required {
            match self.file(wanted) {
                Some(file) => files.push(file.clone()),
                None => {
                    return Err(HubError::MissingFile {
                        name: name.clone(),
                        file: wanted.to_string(),
                        hint: self.hint(wanted),
                    });
                }
            }
        }
        match need {
            Need::Config => {}
            Need::Text | Need::Model => {
                files.extend(
                    TEXT_FILES
                        .iter()
                        .filter_map(|name| self.file(name).cloned()),
                );
            }
            Need::Adapter => files.extend(
                self.files
                    .iter()
                    .filter(|file| {
                        file.name.ends_with(".json")
                            && is_plain_name(&file.name)
                            && file.name != ADAPTER_CONFIG
                            && file.size.is_none_or(|size| size <= LARGEST_ADAPTER_JSON)
                    })
                    .cloned(),
            ),
        }
        let weights: &[&str] = match need {
            Need::Config | Need::Text => return Ok(files),
            Need::Model => &[WEIGHTS, INDEX],
            Need::Adapter => &[ADAPTER_WEIGHTS],
        };
        match weights.iter().find_map(|name| self.file(name)) {
            Some(file) => files.push(file.clone()),
            None => return Err(self.no_weights(name, weights)),
        }
        Ok(files)
    }

    /// The files that an index names, in the repository and by plain names only.
    pub fn shards(&self, name: &HubName, index: &[u8]) -> Result<Vec<RemoteFile>, HubError> {
        let wrong = |reason: String| HubError::Index {
            name: name.clone(),
            reason,
        };
        let value: Value =
            serde_json::from_slice(index).map_err(|error| wrong(format!("not JSON: {error}")))?;
        let map = value["weight_map"].as_object();
        let map = map.ok_or_else(|| wrong("it has no \"weight_map\"".into()))?;
        let mut shards: Vec<RemoteFile> = Vec::new();
        for (tensor, file) in map {
            let shard = file
                .as_str()
                .filter(|name| is_plain_name(name) && name.ends_with(".safetensors"));
            let Some(shard) = shard else {
                return Err(wrong(format!(
                    "{tensor:?} is in {file}, which is not the name of a safetensors file"
                )));
            };
            if shards.iter().any(|known| known.name == shard) {
                continue;
            }
            match self.file(shard) {
                Some(file) if shards.len() < MOST_SHARDS => shards.push(file.clone()),
                Some(_) => return Err(wrong(format!("it names more than {MOST_SHARDS} files"))),
                None => {
                    return Err(wrong(format!(
                        "it names {shard:?}, which the repository does not have"
                    )));
                }
            }
        }
        if shards.is_empty() {
            Err(wrong("its \"weight_map\" is empty".into()))
        } else {
            Ok(shards)
        }
    }

    fn ending(&self, endings: &[&str]) -> Vec<&str> {
        let names = self.files.iter().map(|file| file.name.as_str());
        let mut names: Vec<&str> = names
            .filter(|name| endings.iter().any(|ending| name.ends_with(ending)))
            .filter(|name| !name.chars().any(char::is_control))
            .collect();
        names.truncate(4);
        names
    }

    fn no_weights(&self, name: &HubName, wanted: &[&str]) -> HubError {
        let pickles: Vec<&str> = self
            .ending(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"])
            .into_iter()
            .filter(|file| *file != "training_args.bin")
            .collect();
        if !pickles.is_empty() {
            return HubError::PickleOnly {
                name: name.clone(),
                files: pickles.join(", "),
            };
        }
        HubError::MissingFile {
            name: name.clone(),
            file: wanted.join(" or "),
            hint: self.hint(wanted[0]),
        }
    }

    /// What the repository is instead.
    fn hint(&self, missing: &str) -> String {
        let gguf = self.ending(&[".gguf"]);
        if self.file(ADAPTER_CONFIG).is_some() && missing != ADAPTER_CONFIG {
            "; it is an adapter: name it with --adapter, and its base model as the model".into()
        } else if !gguf.is_empty() {
            format!(
                "; it holds GGUF files ({}): download the one that you want and name its path",
                gguf.join(", ")
            )
        } else if missing == ADAPTER_CONFIG && self.file("config.json").is_some() {
            "; it is a model, not an adapter".into()
        } else if missing == "tokenizer.json" && self.file("tokenizer.model").is_some() {
            "; it has tokenizer.model only, which AutoTokenizer.from_pretrained(…).save_pretrained(…) of \
             transformers converts"
                .into()
        } else {
            "; is it a repository of a Llama-family model in Hugging Face's layout?".into()
        }
    }
}

/// A file name without a path.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn name() -> HubName {
        HubName::parse("owner/model").unwrap()
    }

    fn listing(files: &[&str]) -> Listing {
        Listing::of_names(
            &"a".repeat(40),
            files.iter().map(|file| file.to_string()).collect(),
        )
    }

    fn selected(files: &[&str], need: Need) -> Vec<String> {
        let files = listing(files).select(&name(), need).unwrap();
        files.into_iter().map(|file| file.name).collect()
    }

    const MODEL: [&str; 9] = [
        "README.md",
        "config.json",
        "onnx/model.onnx",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "model.safetensors",
        "modeling_llama.py",
    ];

    #[test]
    fn only_what_is_needed_is_fetched_and_never_code_or_pickles() {
        assert_eq!(selected(&MODEL, Need::Config), ["config.json"]);
        let text = ["config.json", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(selected(&MODEL, Need::Text), text);
        let model = [&text[..], &["model.safetensors"]].concat();
        assert_eq!(selected(&MODEL, Need::Model), model);
        let adapter = [
            "adapter_config.json",
            "adapter_model.bin",
            "adapter_model.safetensors",
            "extra.json",
            "../x.json",
        ];
        let expected = [
            "adapter_config.json",
            "extra.json",
            "adapter_model.safetensors",
        ];
        assert_eq!(selected(&adapter, Need::Adapter), expected);
    }

    #[test]
    fn what_is_there_instead_is_said() {
        let error = |files: &[&str], need| {
            listing(files)
                .select(&name(), need)
                .unwrap_err()
                .to_string()
        };
        let text = ["config.json", "tokenizer.json"];
        let with = |more: &'static str| [&text[..], &[more]].concat();
        let pickle = error(&with("pytorch_model.bin"), Need::Model);
        assert!(
            pickle.contains("pytorch_model.bin") && pickle.contains("save_pretrained"),
            "{pickle}"
        );
        assert!(error(&["model.Q8_0.gguf"], Need::Model).contains("model.Q8_0.gguf"));
        assert!(error(&["adapter_config.json"], Need::Model).contains("--adapter"));
        assert!(error(&["config.json"], Need::Adapter).contains("not an adapter"));
        assert!(
            error(&["config.json", "tokenizer.model"], Need::Model).contains("tokenizer.model")
        );
        assert!(
            error(&text, Need::Model).contains("model.safetensors or model.safetensors.index.json")
        );
        let adapter = error(&["adapter_config.json", "adapter_model.bin"], Need::Adapter);
        assert!(adapter.contains("adapter_model.bin"), "{adapter}");
    }

    #[test]
    fn the_answer_is_read_with_sizes_and_hashes() {
        let (sha, blob, commit) = ("1".repeat(64), "2".repeat(40), "3".repeat(40));
        let answer = json!({"sha": commit, "siblings": [
            {"rfilename": "config.json", "size": 7, "blobId": blob},
            {"rfilename": "model.safetensors", "size": 9, "blobId": blob,
             "lfs": {"sha256": sha, "size": 9, "pointerSize": 134}},
            {"rfilename": "bare.json"},
            {"other": 1}
        ]});
        let listing = Listing::parse(answer.to_string().as_bytes()).unwrap();
        assert_eq!(listing.commit, commit);
        let digests: Vec<_> = listing
            .files
            .iter()
            .map(|file| file.digest.clone())
            .collect();
        let expected = [Some(Digest::GitSha1(blob)), Some(Digest::Sha256(sha)), None];
        assert_eq!(digests, expected);
        let sizes: Vec<_> = listing.files.iter().map(|file| file.size).collect();
        assert_eq!(sizes, [Some(7), Some(9), None]);
        for (answer, part) in [
            ("{", "not JSON"),
            ("{\"siblings\": []}", "commit"),
            ("{\"sha\": \"../../x\", \"siblings\": []}", "commit"),
            (&format!("{{\"sha\": \"{commit}\"}}"), "no files"),
        ] {
            let error = Listing::parse(answer.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn an_index_names_files_of_the_repository_only() {
        let listing = listing(&["model-1.safetensors", "model-2.safetensors", "model.bin"]);
        let shards =
            |map: Value| listing.shards(&name(), json!({"weight_map": map}).to_string().as_bytes());
        let two = json!({"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"});
        let names: Vec<_> = shards(two)
            .unwrap()
            .into_iter()
            .map(|file| file.name)
            .collect();
        assert_eq!(names, ["model-1.safetensors", "model-2.safetensors"]);
        for map in [
            json!({"a": "../model-1.safetensors"}),
            json!({"a": "/etc/x.safetensors"}),
            json!({"a": "model.bin"}),
            json!({"a": "model-3.safetensors"}),
            json!({"a": 1}),
            json!({}),
            json!(null),
        ] {
            let error = shards(map.clone()).unwrap_err();
            assert!(matches!(error, HubError::Index { .. }), "{map}: {error}");
        }
    }
}
