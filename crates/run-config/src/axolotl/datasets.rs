//! axolotl's `datasets` and `test_datasets`: the data file and its format.

use std::path::Path;

use super::super::raw::RawEntry;
use super::super::value::{Entry, Value};
use super::Converter;
use super::format::{self, NAMED, Rows};
use super::keys::is_off;
use data::PromptTemplate;

/// Values of `path` that name a reader; the file is then in `data_files`.
const READERS: [&str; 3] = ["json", "csv", "parquet"];

/// Keys of a conversation's roles, with the names that are supported.
const PROPERTIES: [(&str, [&str; 2]); 2] = [
    ("role", ["role", "from"]),
    ("content", ["content", "value"]),
];

/// Sets the data files, the format of their rows, and the template.
pub(super) fn convert(converter: &mut Converter) {
    let Some(train) = only(converter, "datasets") else {
        return;
    };
    let (path, rows) = read(converter, &train);
    if let Some(path) = path {
        converter.set("dataset_path", Value::String(path), &train.whole);
    }
    let Some(rows) = rows else {
        return;
    };
    // The loss is on all tokens of a text in any case.
    if rows.format != "text" && converter.is_on("train_on_inputs") {
        let entry = converter.entry_or_file("train_on_inputs");
        converter.problem(&entry, "the loss is never on prompts here; set it to false");
    }
    let place = train.whole;
    converter.set("dataset_format", Value::String(rows.format.into()), &place);
    let template = Value::String(rows.template.to_string());
    converter.set("prompt_template", template, &place);
    if !rows.columns.is_empty() {
        let columns = rows.columns.iter().map(|(ours, theirs)| Entry {
            key: ours.to_string(),
            value: Value::String(theirs.clone()),
            line: None,
        });
        let columns = Value::Table(columns.collect());
        converter.set("dataset_columns", columns, &place);
    }
    let Some(test) = only(converter, "test_datasets") else {
        return;
    };
    let (path, others) = read(converter, &test);
    match (path, others) {
        (_, Some(others)) if others != rows => converter.problem(
            &test.whole,
            "must have the type and the fields of datasets: both files are read in the same way",
        ),
        (Some(path), _) => converter.set("val_dataset_path", Value::String(path), &test.whole),
        _ => {}
    }
}

/// Whether the data are conversations for a chat template.
pub(super) fn has_chat(converter: &Converter) -> bool {
    let messages = Value::String("messages".into());
    let mut ours = converter.ours.iter();
    ours.any(|entry| entry.key == "dataset_format" && entry.value == messages)
}

/// A data set of the list.
struct DataSet {
    /// The list's key, for messages.
    whole: RawEntry,
    entries: Vec<Entry>,
}

impl DataSet {
    fn get(&self, key: &str) -> Option<&Value> {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        entry
            .map(|entry| &entry.value)
            .filter(|value| !is_off(value))
    }

    /// An entry in messages.
    fn place(&self, key: &str) -> RawEntry {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        let line = entry.and_then(|entry| entry.line);
        let file = self.whole.location.rsplit_once(':');
        RawEntry {
            key: format!("{}[0].{key}", self.whole.key),
            value: entry.map_or(Value::Null, |entry| entry.value.clone()),
            location: match (line, file) {
                (Some(line), Some((file, _))) => format!("{file}:{line}"),
                _ => self.whole.location.clone(),
            },
        }
    }
}

/// The one data set of a list.
fn only(converter: &mut Converter, key: &str) -> Option<DataSet> {
    let whole = converter.on(key)?;
    let message = match &whole.value {
        Value::List(items) => match items.as_slice() {
            [Value::Table(entries)] => {
                let entries = entries.clone();
                return Some(DataSet { whole, entries });
            }
            [_] => "must be a list of mappings, as in - path: FILE".to_string(),
            items => format!(
                "has {} data sets, and only one is read; write their examples into one file",
                items.len()
            ),
        },
        _ => "must be a list of mappings, as in - path: FILE".into(),
    };
    converter.problem(&whole, message);
    None
}

/// The file of the data set and its format; problems are noted.
fn read(converter: &mut Converter, data: &DataSet) -> (Option<String>, Option<Rows>) {
    let path = file(data).map_err(|(key, message)| converter.problem(&data.place(key), message));
    let rows = match data.get("type") {
        Some(Value::Table(entries)) => format::custom(entries).map_err(|(key, message)| {
            let place = data.place(&format!("type.{key}"));
            let value = entries.iter().find(|entry| entry.key == key);
            let line = value.and_then(|entry| entry.line);
            let place = RawEntry {
                value: value.map_or(Value::Null, |entry| entry.value.clone()),
                location: match (line, place.location.rsplit_once(':')) {
                    (Some(line), Some((file, _))) => format!("{file}:{line}"),
                    _ => place.location.clone(),
                },
                ..place
            };
            converter.problem(&place, message);
        }),
        Some(Value::String(name)) if name == "completion" => Ok(completion(converter, data)),
        Some(Value::String(name)) if name == "chat_template" => Ok(chat(converter, data)),
        Some(Value::String(name)) => format::named(name).ok_or_else(|| {
            let message = format!(
                "is not read here; the types are {NAMED}, or a mapping with field_instruction, field_output, format and \
                 no_input_format"
            );
            converter.problem(&data.place("type"), message);
        }),
        _ => {
            let message = format!("must be one of {NAMED}, or a mapping with a format");
            converter.problem(&data.place("type"), message);
            Err(())
        }
    };
    unread(converter, data);
    (path.ok(), rows.ok())
}

/// The path of the data file.
fn file(data: &DataSet) -> Result<String, (&'static str, String)> {
    let Some(Value::String(path)) = data.get("path") else {
        return Err(("path", "must be the path of a data file".into()));
    };
    let path = match (READERS.contains(&path.as_str()), data.get("data_files")) {
        (false, None) => path,
        (false, Some(_)) => {
            return Err((
                "data_files",
                "write the path of the file itself as path".into(),
            ));
        }
        (true, Some(Value::String(file))) => file,
        (true, Some(Value::List(files))) => match files.as_slice() {
            [Value::String(file)] => file,
            _ => {
                return Err((
                    "data_files",
                    "only one file is read; write all examples into one".into(),
                ));
            }
        },
        (true, _) => {
            return Err((
                "path",
                "names a file format; write the file's path in data_files".into(),
            ));
        }
    };
    if let Some(split) = data.get("split")
        && *split != Value::String("train".into())
    {
        return Err((
            "split",
            "files have no splits here; write train, or remove the key".into(),
        ));
    }
    let extension = Path::new(path).extension().and_then(|text| text.to_str());
    let extension = extension.unwrap_or_default().to_lowercase();
    let is_table = ["csv", "tsv", "parquet"].contains(&extension.as_str());
    match data.get("ds_type") {
        None => {}
        Some(Value::String(kind)) if kind == "json" && is_table => {
            let message = format!(
                "the file's extension .{extension} determines its format; rename the file or correct ds_type"
            );
            return Err(("ds_type", message));
        }
        Some(Value::String(kind)) if kind == "json" || *kind == extension => {}
        Some(_) => {
            let message =
                "the format comes from the file name: .jsonl, .json, .csv, .tsv or .parquet";
            return Err(("ds_type", message.into()));
        }
    }
    Ok(path.clone())
}

fn completion(converter: &mut Converter, data: &DataSet) -> Rows {
    let mut columns = Vec::new();
    match data.get("field") {
        None => {}
        Some(Value::String(name)) if name == "text" => {}
        Some(Value::String(name)) => columns.push(("text", name.clone())),
        Some(_) => converter.problem(&data.place("field"), "must be the name of a column"),
    }
    let note =
        "texts of more than sequence_len tokens are skipped and counted; axolotl splits them";
    converter.notes.push(note.into());
    Rows {
        format: "text",
        columns,
        template: PromptTemplate::Raw,
    }
}

fn chat(converter: &mut Converter, data: &DataSet) -> Rows {
    let mut columns = Vec::new();
    for (key, ours) in [("field_messages", "messages"), ("field_tools", "tools")] {
        match data.get(key) {
            None => {}
            Some(Value::String(name)) if name == ours || name == "conversations" => {}
            Some(Value::String(name)) => columns.push((ours, name.clone())),
            Some(_) => converter.problem(&data.place(key), "must be the name of a column"),
        }
    }
    let own = Value::String("tokenizer_default".into());
    for place in [
        data.get("chat_template")
            .map(|_| data.place("chat_template")),
        converter.on("chat_template"),
        converter.on("chat_template_jinja"),
        data.get("chat_template_jinja")
            .map(|_| data.place("chat_template_jinja")),
    ]
    .into_iter()
    .flatten()
    .filter(|entry| entry.value != own)
    {
        converter.problem(
            &place,
            "the chat template of the model's folder renders conversations; write it there (chat_template.jinja), and \
             tokenizer_default here",
        );
    }
    let words = |words: &[&str]| {
        words
            .iter()
            .map(|word| Value::String(word.to_string()))
            .collect()
    };
    for (key, allowed) in [
        ("train_on_eos", words(&["turn"])),
        ("train_on_eot", words(&["turn"])),
        (
            "message_field_training",
            words(&["train", "training", "weight"]),
        ),
        ("message_field_role", words(&PROPERTIES[0].1)),
        ("message_field_content", words(&PROPERTIES[1].1)),
    ] as [(&str, Vec<Value>); 5]
    {
        if data.get(key).is_some_and(|value| !allowed.contains(value)) {
            let names: Vec<String> = allowed.iter().map(Value::to_string).collect();
            let message = format!("must be {}, or left out", names.join(" or "));
            converter.problem(&data.place(key), message);
        }
    }
    let assistant = |item: &Value| matches!(item, Value::String(role) if ["assistant", "gpt", "model"].contains(&role.as_str()));
    match data.get("roles_to_train") {
        None => {}
        Some(Value::List(roles)) if roles.iter().all(assistant) => {}
        Some(_) => converter.problem(
            &data.place("roles_to_train"),
            "the loss is on the assistant's turns only; write [assistant]",
        ),
    }
    let is_usual = |entry: &Entry| {
        let property = PROPERTIES.iter().find(|(name, _)| *name == entry.key);
        let names = property.map(|(_, names)| names.map(|name| Value::String(name.into())));
        names.is_some_and(|names| names.contains(&entry.value))
    };
    match data.get("message_property_mappings") {
        None => {}
        Some(Value::Table(entries)) if entries.iter().all(is_usual) => {}
        Some(_) => converter.problem(
            &data.place("message_property_mappings"),
            "messages have role and content, or from and value; rename the keys in the data file",
        ),
    }
    converter.notes.push(
        "conversations: the end-of-turn token written by the chat template is in the loss; in axolotl only the tokenizer's \
         EOS token and eot_tokens are"
            .into(),
    );
    Rows {
        format: "messages",
        columns,
        template: PromptTemplate::Chat,
    }
}

/// Keys of a data set that are on and not read above.
fn unread(converter: &mut Converter, data: &DataSet) {
    const READ: [&str; 5] = ["path", "data_files", "split", "ds_type", "type"];
    const OF_CHAT: [&str; 11] = [
        "field_messages",
        "field_tools",
        "chat_template",
        "chat_template_jinja",
        "train_on_eos",
        "train_on_eot",
        "message_field_training",
        "message_field_role",
        "message_field_content",
        "message_property_mappings",
        "roles_to_train",
    ];
    let kind = data.get("type");
    let is = |name: &str| kind == Some(&Value::String(name.into()));
    let (is_chat, is_completion) = (is("chat_template"), is("completion"));
    for entry in data.entries.iter().filter(|entry| !is_off(&entry.value)) {
        let key = entry.key.as_str();
        let is_read = READ.contains(&key)
            || (is_chat && OF_CHAT.contains(&key))
            || (is_completion && key == "field");
        match key {
            _ if is_read => {}
            // These do not concern a file.
            "trust_remote_code" | "preprocess_shards" => {}
            _ => converter.problem(
                &data.place(key),
                "is not supported for this type of data; remove it, or prepare the data file so that it is not needed",
            ),
        }
    }
}
