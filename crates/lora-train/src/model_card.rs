//! The adapter's `README.md`: a model card for the Hub and PEFT.
//!
//! Everything in it comes from the run. Names are untrusted text: they are quoted as YAML strings,
//! shell words and Markdown code, whatever they contain. A card that a person wrote or changed is
//! never replaced.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::metrics::Scores;
use hub::HubName;
use lora_core::Method;
use run_config::Config;
use terminal::human;

/// The card's name in an adapter's folder.
pub const FILE: &str = "README.md";

/// The last line of a card written by this program begins with this text; the hash of the text
/// above it follows.
const MARKER: &str =
    "<!-- written by llama-lora-trainer; a card that was changed is kept. sha256: ";
const MARKER_END: &str = " -->\n";
/// Cards are short. A longer file was written by a person.
const LONGEST_CARD: u64 = 1 << 20;

/// Keys of the configuration that the card shows elsewhere, or that are not about the adapter.
const NOT_HYPER_PARAMETERS: [&str; 6] = [
    "base_model",
    "dataset_path",
    "val_dataset_path",
    "output_dir",
    "logging_steps",
    "peft_use_dora",
];

/// The contents of a card.
#[derive(Debug, Clone)]
pub struct ModelCard<'a> {
    /// The run's settings.
    pub config: &'a Config,
    /// The base model's shape in words.
    pub shape: String,
    /// Trainable parameters.
    pub trainable: u64,
    /// Training examples.
    pub train_rows: usize,
    /// Examples that the scores are from.
    pub validation_rows: usize,
    /// The step of the adapter.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Device and precision of the computation.
    pub device: String,
    /// The base model's scores on the validation examples.
    pub base: Option<Scores>,
    /// The adapter's scores on them.
    pub adapter: Option<Scores>,
    /// The command of the run's first start.
    pub command: Vec<String>,
}

/// The command of a run's first start: of a resumed run the one that its checkpoint has stored, else
/// that of this process as a user types it, `cargo xtask train …`. A program that trains through the
/// library has a command line of its own; the card then shows the command that repeats the run. So
/// it does for a checkpoint of an older program, which stored no command.
pub fn command(stored: Option<&[String]>, config_file: &Path) -> Vec<String> {
    if let Some(command) = stored.filter(|command| !command.is_empty()) {
        return command.to_vec();
    }
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let typed = match arguments.first().map(String::as_str) {
        Some("train") if stored.is_none() => arguments,
        _ => vec![
            "train".into(),
            "--config".into(),
            config_file.display().to_string(),
        ],
    };
    [vec!["cargo".into(), "xtask".into()], typed].concat()
}

impl ModelCard<'_> {
    /// Writes the card into an adapter's folder, atomically, unless a person's card is there.
    /// Returns whether it was written.
    ///
    /// # Errors
    ///
    /// The file and the system's reason.
    pub fn write(&self, folder: &Path) -> Result<bool, durable::WriteError> {
        let path = folder.join(FILE);
        if !may_replace(&path) {
            log::info!(
                "{} was not written by this program and is kept",
                path.display()
            );
            return Ok(false);
        }
        durable::write_atomically(&path, signed(&self.text()).as_bytes())?;
        Ok(true)
    }

    /// As [`write`](Self::write). The adapter is already saved, so a card that cannot be written is
    /// a warning.
    pub fn write_or_warn(&self, folder: &Path) {
        if let Err(error) = self.write(folder) {
            log::warn!("{error}");
        }
    }

    /// The card without its last line.
    fn text(&self) -> String {
        let base = &self.config.base_model;
        let name = HubName::parse(base).filter(|_| !Path::new(base).exists());
        let method = self.config.lora_config().method;
        let mut card = front_matter(name.as_ref(), method);
        let title = self.config.output_dir.file_name();
        let title = title.map_or_else(
            || "adapter".into(),
            |title| title.to_string_lossy().into_owned(),
        );
        card += &format!("\n# {}\n\n", plain(&title));
        card += &format!(
            "A {method} adapter for {}, in [PEFT's](https://huggingface.co/docs/peft) format, {} trainable parameters.\n",
            self.base(name.as_ref()),
            human::count(self.trainable)
        );
        card += &self.use_in_python(name.as_ref());
        card += &self.data();
        card += &self.results();
        card += &self.hyper_parameters();
        card += "\n## Made with\n\n";
        let command: Vec<String> = self.command.iter().map(|word| shell_word(word)).collect();
        card += &fenced("sh", &command.join(" "));
        card += &format!(
            "\nllama-lora-trainer {}, {}.\n",
            env!("CARGO_PKG_VERSION"),
            plain(&self.device)
        );
        card
    }

    fn base(&self, name: Option<&HubName>) -> String {
        let shape = plain(&self.shape);
        match name {
            Some(name) => {
                let repository = &name.repository;
                let revision = name
                    .revision
                    .as_ref()
                    .map(|revision| format!(" at {}", code(revision)));
                format!(
                    "[{repository}](https://huggingface.co/{repository}){} ({shape})",
                    revision.unwrap_or_default()
                )
            }
            // The path to a folder on one machine is of no use on another.
            None => format!(
                "{} ({shape})",
                code(&last_part(Path::new(&self.config.base_model)))
            ),
        }
    }

    fn use_in_python(&self, name: Option<&HubName>) -> String {
        let base = match name {
            Some(name) => name.repository.clone(),
            None => last_part(Path::new(&self.config.base_model)),
        };
        let revision = name.and_then(|name| name.revision.as_ref());
        let revision = revision.map_or_else(String::new, |revision| {
            format!(", revision={}", quoted(revision))
        });
        let program = format!(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             base = {}\nmodel = AutoModelForCausalLM.from_pretrained(base{revision})\n\
             model = PeftModel.from_pretrained(model, \"PATH/TO/THIS/FOLDER\")\n\
             tokenizer = AutoTokenizer.from_pretrained(base{revision})",
            quoted(&base)
        );
        format!(
            "\n## Use\n\n{}\nTraining used the prompt template {}.\n",
            fenced("python", &program),
            code(&self.config.prompt_template.to_string())
        )
    }

    fn data(&self) -> String {
        let config = self.config;
        let name = |path: &PathBuf| code(&last_part(path));
        let mut text = format!(
            "\n## Data\n\nTrained on {} of {}",
            human::counted(self.train_rows as u64, "example"),
            name(&config.dataset_path)
        );
        if self.validation_rows > 0 {
            let examples = human::counted(self.validation_rows as u64, "example");
            text += &match &config.val_dataset_path {
                Some(path) => format!(", validated on {examples} of {}", name(path)),
                None => format!(", validated on {examples}"),
            };
        }
        text + ".\n"
    }

    fn results(&self) -> String {
        let mut text = format!(
            "\n## Results\n\nThe adapter is that of step {} of {}.",
            human::count(self.step as u64),
            human::count(self.total_steps as u64)
        );
        let Some(adapter) = self.adapter else {
            return text + " No examples were held out for validation.\n";
        };
        text += " On the validation examples:\n\n";
        type Part = (&'static str, fn(&Scores) -> f64, fn(f64) -> String);
        let parts: [Part; 3] = [
            ("loss", |scores| scores.loss, human::number),
            ("token accuracy", |scores| scores.accuracy, human::percent),
            ("exact match", |scores| scores.row_accuracy, human::percent),
        ];
        text += "| | base model | with the adapter |\n| --- | ---: | ---: |\n";
        for (label, of, shown) in parts {
            let base = self
                .base
                .as_ref()
                .map_or_else(|| "not measured".into(), |base| shown(of(base)));
            text += &format!("| {label} | {base} | {} |\n", shown(of(&adapter)));
        }
        text
    }

    fn hyper_parameters(&self) -> String {
        let mut text = "\n## Hyper-parameters\n\n| | |\n| --- | --- |\n".to_string();
        // Every key, as in the run's config.toml.
        let table: toml::Table = self.config.to_toml().parse().unwrap_or_default();
        for (key, value) in &table {
            let off = value.as_str() == Some("none");
            if off || NOT_HYPER_PARAMETERS.contains(&key.as_str()) {
                continue;
            }
            text += &format!("| {} | {} |\n", code(key), code(&value.to_string()));
        }
        text
    }
}

/// The front matter that the Hub reads, as PEFT 0.21 writes it. A base model whose name cannot be a
/// Hub name is left out, because the Hub refuses such a card.
fn front_matter(name: Option<&HubName>, method: Method) -> String {
    let mut text = "---\n".to_string();
    if let Some(name) = name {
        text += &format!("base_model: {}\n", quoted(&name.repository));
    }
    text += "library_name: peft\npipeline_tag: text-generation\ntags:\n";
    if let Some(name) = name {
        let tag = format!("base_model:adapter:{}", name.repository);
        text += &format!("- {}\n", quoted(&tag));
    }
    // As PEFT, which has no tag for other types.
    if method.facts().peft_type == Method::default().facts().peft_type {
        text += "- lora\n";
    }
    text + "- transformers\n---\n"
}

/// The last part of a path: the name of the file or folder.
fn last_part(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// A JSON string, which YAML and Python read as the same text.
fn quoted(text: &str) -> String {
    let shown: String = text.chars().map(visible).collect();
    serde_json::Value::from(shown).to_string()
}

/// Line breaks and other control characters as visible text without effect.
fn visible(c: char) -> char {
    match c {
        '\t' => ' ',
        // Also characters that change the direction of text or break lines without being control
        // characters.
        c if c.is_control() => '\u{fffd}',
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c => c,
    }
}

/// Text as literal Markdown: every punctuation mark with a meaning in Markdown is escaped.
fn plain(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars().map(visible) {
        match c {
            '<' => escaped += "&lt;",
            '&' => escaped += "&amp;",
            '\\' | '`' | '*' | '_' | '[' | ']' | '#' | '|' | '!' | '~' | '>' => {
                escaped.extend(['\\', c])
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Inline code, in a table or elsewhere, that no character of `text` can end.
fn code(text: &str) -> String {
    // In a table a bar ends the cell even within code. GitHub and the Hub read `\|` there.
    let shown: String = text
        .chars()
        .map(visible)
        .collect::<String>()
        .replace('|', "\\|");
    let fence = "`".repeat(longest_run(&shown) + 1);
    match shown.trim().is_empty() {
        true => "(empty)".into(),
        false if shown.starts_with(['`', ' ']) || shown.ends_with(['`', ' ']) => {
            format!("{fence} {shown} {fence}")
        }
        false => format!("{fence}{shown}{fence}"),
    }
}

/// A block of code that no line of `text` can end.
fn fenced(language: &str, text: &str) -> String {
    let fence = "`".repeat(longest_run(text).max(2) + 1);
    format!("{fence}{language}\n{text}\n{fence}\n")
}

/// The most backticks in a row.
fn longest_run(text: &str) -> usize {
    let runs = text.split(|c| c != '`');
    runs.map(str::len).max().unwrap_or(0)
}

/// A word quoted for a shell.
fn shell_word(word: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@+%".contains(c);
    if !word.is_empty() && word.chars().all(safe) {
        word.into()
    } else {
        let shown: String = word.chars().map(visible).collect();
        format!("'{}'", shown.replace('\'', "'\\''"))
    }
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn signed(text: &str) -> String {
    format!("{text}\n{MARKER}{}{MARKER_END}", hash(text))
}

/// Whether the file is missing, or is a card of this program that was not changed.
fn may_replace(path: &Path) -> bool {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        std::fs::File::open(path)?
            .take(LONGEST_CARD)
            .read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Err(error) => error.kind() == io::ErrorKind::NotFound,
        Ok(text) => text
            .rsplit_once(MARKER)
            .and_then(|(body, end)| Some((body.strip_suffix('\n')?, end.strip_suffix(MARKER_END)?)))
            .is_some_and(|(body, stated)| hash(body) == stated),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Config::load(None, None, &sets).unwrap()
    }

    fn card(config: &Config) -> ModelCard<'_> {
        let scores = |loss| Scores {
            loss,
            accuracy: 0.5,
            row_accuracy: 0.25,
        };
        ModelCard {
            config,
            shape: "2 layers, hidden 32".into(),
            trainable: 20_480,
            train_rows: 1800,
            validation_rows: 300,
            step: 700,
            total_steps: 900,
            device: "CPU".into(),
            base: Some(scores(5.25)),
            adapter: Some(scores(0.125)),
            command: ["cargo", "xtask", "train", "--set", "a=it's"]
                .map(String::from)
                .to_vec(),
        }
    }

    #[test]
    fn a_card_tells_base_data_settings_results_and_command() {
        let config = config(&[
            "base_model=owner/model@v1",
            "dataset_path=/secret/way/rows.jsonl",
            "lora_r=4",
        ]);
        let text = card(&config).text();
        for part in [
            "---\nbase_model: \"owner/model\"\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
             - \"base_model:adapter:owner/model\"\n- lora\n- transformers\n---\n",
            "[owner/model](https://huggingface.co/owner/model) at `v1` (2 layers, hidden 32)",
            "from_pretrained(base, revision=\"v1\")",
            "Trained on 1,800 examples of `rows.jsonl`, validated on 300 examples.\n",
            "step 700 of 900",
            "| loss | 5.2500 | 0.1250 |",
            "| exact match | 25.0 % | 25.0 % |",
            "| `lora_r` | `4` |",
            "| `learning_rate` |",
            "cargo xtask train --set 'a=it'\\''s'",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("/secret/way"), "{text}");
    }

    #[test]
    fn a_local_base_model_is_no_name_on_the_hub() {
        let config = config(&["base_model=/home/someone/models/Tiny"]);
        let text = card(&config).text();
        assert!(
            !text.contains("base_model: ") && !text.contains("/home/someone"),
            "{text}"
        );
        assert!(text.contains("`Tiny`"), "{text}");
    }

    /// The lines of the front matter, and how often the card's own headings stand in it.
    fn structure(text: &str) -> (Vec<&str>, usize, usize) {
        let front = text
            .strip_prefix("---\n")
            .unwrap()
            .split("\n---\n")
            .next()
            .unwrap();
        let headings = text.lines().filter(|line| line.starts_with('#')).count();
        let fences = text.lines().filter(|line| line.starts_with("```")).count();
        (front.lines().collect(), headings, fences)
    }

    #[test]
    fn names_inject_nothing() {
        let expected = structure_of("plain");
        for name in [
            "x\n---\nlicense: mit\n---\n# Heading",
            "x\n```\n# Heading\n```",
            "a|b|c",
            "`code` and ``more``",
            "<script>alert(1)</script>",
            "![image](https://evil.example/x.png)",
            "\u{202e}gpj.exe",
            "'; rm -rf ~; '",
        ] {
            let (front, headings, fences) = structure_of(name);
            assert_eq!((front, headings, fences), expected, "{name:?}");
        }
        let hostile = config(&[]);
        let mut hostile = Config {
            dataset_path: "<script>|x\n# y".into(),
            base_model: "/models/<img src=x>\n```".into(),
            ..hostile
        };
        hostile.output_dir = "runs/<b>\n# z".into();
        let text = card(&hostile).text();
        for line in text.lines() {
            // Raw HTML stands only within code.
            let outside: String = line.split('`').step_by(2).collect();
            assert!(
                !outside.contains("<script") && !outside.contains("<b>"),
                "{line}"
            );
        }
    }

    fn structure_of(name: &str) -> (Vec<String>, usize, usize) {
        let config = Config {
            dataset_path: format!("data/{name}").into(),
            base_model: format!("./{name}"),
            output_dir: format!("runs/{name}").into(),
            ..config(&[])
        };
        let mut card = card(&config);
        card.command
            .push(format!("--set=prompt_template=custom:{name}"));
        card.shape = name.into();
        card.device = name.into();
        let text = card.text();
        let (front, headings, fences) = structure(&text);
        (
            front.into_iter().map(String::from).collect(),
            headings,
            fences,
        )
    }

    #[test]
    fn a_persons_card_is_kept_and_ours_is_replaced_until_it_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let config = config(&[]);
        let first = card(&config);
        assert!(first.write(folder.path()).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        let later = ModelCard {
            step: 800,
            ..first.clone()
        };
        assert!(later.write(folder.path()).unwrap());
        let now = std::fs::read_to_string(&path).unwrap();
        assert!(now != text && now.contains("step 800"));
        for mine in [
            "# Mine\n".to_string(),
            now.replace("step 800", "step 8"),
            format!("{now}\nP.S."),
            String::new(),
        ] {
            std::fs::write(&path, &mine).unwrap();
            assert!(!first.write(folder.path()).unwrap());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), mine);
        }
        std::fs::write(&path, b"\xff\xfe").unwrap();
        assert!(!first.write(folder.path()).unwrap());
    }

    #[test]
    fn a_resumed_run_has_the_command_of_its_first_start() {
        let config = Path::new("runs/x/config.toml");
        let first = ["cargo", "xtask", "train"].map(String::from);
        assert_eq!(command(Some(&first[..]), config), first);
        // An older program stored none.
        let none: &[String] = &[];
        let again = ["cargo", "xtask", "train", "--config", "runs/x/config.toml"];
        assert_eq!(command(Some(none), config), again);
    }

    #[test]
    fn words_of_a_command_come_back_as_they_were() {
        assert_eq!(shell_word("--set"), "--set");
        assert_eq!(shell_word("a=b c"), "'a=b c'");
        assert_eq!(shell_word("$(x)"), "'$(x)'");
        assert_eq!(shell_word(""), "''");
    }
}
