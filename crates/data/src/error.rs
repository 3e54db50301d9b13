//! What can be wrong with the data, the tokenizer or the chat template.

use std::path::PathBuf;

use serde_json::Value;

use super::integers;

/// What is wrong with one line of a data file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// The line is not text.
    #[error("not UTF-8 text (byte {column} of the line); save the file as UTF-8")]
    NotUtf8 {
        /// The first byte that is wrong, from 1.
        column: usize,
    },
    /// The line is not JSON.
    #[error(
        "not valid JSON: {message} at column {column}; every line must be one complete JSON object"
    )]
    Json {
        /// The message of the parser.
        message: String,
        /// Where in the line, from 1.
        column: usize,
    },
    /// A line that is longer than any row can be.
    #[error("longer than {} MiB; an example is one line", limit >> 20)]
    TooLong {
        /// Bytes of the longest line that is read.
        limit: usize,
    },
    /// The line is JSON, but not an object.
    #[error("expected an object {{\"context\": …, \"target\": …}}, got {got}")]
    NotAnObject {
        /// The JSON type of the value.
        got: &'static str,
    },
    /// A key is missing.
    #[error("the key \"{key}\" is missing; the line has {}", keys(present))]
    MissingKey {
        /// The key.
        key: &'static str,
        /// The keys that the line has.
        present: Vec<String>,
    },
    /// A value has the wrong type.
    #[error("\"{key}\" must be {wanted}, got {got}")]
    WrongType {
        /// The key.
        key: String,
        /// What it must be.
        wanted: &'static str,
        /// The JSON type of the value.
        got: &'static str,
    },
    /// An answer is empty.
    #[error("\"{key}\" is empty; remove the line or write its text")]
    Empty {
        /// The key.
        key: &'static str,
    },
    /// No format has these keys.
    #[error(
        "unknown format (it has {}); expected \"context\" and \"target\", \"messages\", \
         \"instruction\" and \"output\", \"prompt\" and \"completion\", or \"text\"",
        keys(present)
    )]
    UnknownFormat {
        /// The keys that the row has.
        present: Vec<String>,
    },
    /// A key that would change the training and is not supported.
    #[error("\"{key}\" is not supported in Alpaca examples; write the example as \"messages\"")]
    NotSupported {
        /// The key.
        key: &'static str,
    },
    /// A message of a conversation is not valid.
    #[error("{place} {problem}")]
    WrongMessage {
        /// Which.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A conversation without an assistant turn.
    #[error(
        "no assistant turn: the messages are of {}; the loss is on messages with the role \"assistant\"",
        if roles.is_empty() { "no messages".into() } else { roles.join(", ") }
    )]
    NoAssistant {
        /// The roles that are there.
        roles: Vec<String>,
    },
    /// Every assistant turn is marked as not in the loss.
    #[error(
        "no turn is in the loss: every assistant turn is marked as not trained on (\"weight\": 0 or the like)"
    )]
    NothingLearned,
    /// A system prompt in a column and one among the messages.
    #[error(
        "both a \"system\" column and a first message with the role \"system\"; remove one of them"
    )]
    TwoSystemPrompts,
    /// A column that would change the training and is not supported.
    #[error("the column \"{key}\" would change the training and is not supported; {remedy}")]
    NotHonoured {
        /// The column.
        key: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// An assistant turn without content.
    #[error("messages[{turn}] is an empty assistant turn; remove the turn or write its content")]
    EmptyTurn {
        /// Which message.
        turn: usize,
    },
    /// A row of a table does not fit the table.
    #[error("{0}")]
    Table(String),
}

fn keys(present: &[String]) -> String {
    match present {
        [] => "no keys".into(),
        keys => keys
            .iter()
            .map(|key| format!("{key:?}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// Why there are no rows to train on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A GGUF file that is damaged or has no tokenizer that can be used.
    #[error(transparent)]
    Gguf(#[from] llama_burn::gguf::GgufError),
    /// A data file cannot be read.
    #[error("cannot read the data file {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A line is not a valid row.
    #[error("{path}:{line}: {problem}\n  the line begins: {beginning}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: LineError,
        /// How the line begins.
        beginning: String,
    },
    /// A row of a binary file is not valid.
    #[error("{path}, example {row}: {problem}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: usize,
        /// What is wrong.
        problem: LineError,
    },
    /// A file is not of the type that its name states.
    #[error("{path} is not a valid {container} file: {message}", path = path.display())]
    Container {
        /// The file.
        path: PathBuf,
        /// What it should be.
        container: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A data file has no rows.
    #[error("{path} has no examples; expected one JSON object {{\"context\", \"target\"}} per line", path = path.display())]
    NoRows {
        /// The file.
        path: PathBuf,
    },
    /// The prompt template does not fit the format.
    #[error(
        "{path} holds {format}, which prompt_template = \"{template}\" does not support; {remedy}",
        path = path.display()
    )]
    TemplateForFormat {
        /// The data file.
        path: PathBuf,
        /// What it holds.
        format: &'static str,
        /// As configured.
        template: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A conversation that the chat template does not render, or not turn by turn.
    #[error("{path}:{line}: {message}", path = path.display())]
    Conversation {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Rows without an answer to compare with.
    #[error("{path} holds plain texts, which have no answers; evaluation needs examples with an answer", path = path.display())]
    NoQuestion {
        /// The data file.
        path: PathBuf,
    },
    /// A text with fewer than two tokens.
    #[error("{path}:{line}: the text has {tokens} token, so there is nothing to predict", path = path.display())]
    TooShort {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// Its tokens.
        tokens: usize,
    },
    /// The split leaves one side without rows.
    #[error(
        "val_set_size = {val_set_size} holds out {validation} of {rows} examples and leaves none to train on; \
         use a smaller val_set_size, or name a val_dataset_path"
    )]
    Split {
        /// As configured.
        val_set_size: f64,
        /// The rows that the split takes.
        validation: usize,
        /// The number of rows.
        rows: usize,
    },
    /// A file of the model's folder that tokenization needs is missing or wrong.
    #[error("cannot use {path}: {message}", path = path.display())]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// The folder does not name the end token.
    #[error(
        "{folder} names no end token; give \"eos_token\" in tokenizer_config.json or \"eos_token_id\" \
         in generation_config.json or config.json", folder = folder.display()
    )]
    NoEndToken {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A chat template is needed, and the model has none.
    #[error(
        "prompt_template = \"chat\", but {folder} has no chat template (\"chat_template\" in \
         tokenizer_config.json, or chat_template.jinja); use \"raw\", \"inst\" or \"custom:…{{context}}…\"",
        folder = folder.display()
    )]
    NoChatTemplate {
        /// The model's folder.
        folder: PathBuf,
    },
    /// The chat template cannot be rendered.
    #[error("the chat template of {path} fails: {message}", path = path.display())]
    ChatTemplate {
        /// The file that it is in.
        path: PathBuf,
        /// The message of the template engine, or of the template itself.
        message: String,
    },
    /// The tokenizer refuses a row.
    #[error("{path}:{line}: the tokenizer fails on this example: {message}", path = path.display())]
    Tokenize {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// The message of the tokenizer.
        message: String,
    },
    /// A token is outside of the model's embedding.
    #[error(
        "{path}:{line}: token {token:?} has id {id}, but the model's vocabulary has {vocab_size} tokens \
         (ids below {vocab_size}); the tokenizer does not belong to this model", path = path.display()
    )]
    TokenOutsideVocabulary {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// The prompt has no token, so no token predicts the first token of the target.
    #[error(
        "{path}:{line}: the prompt has no tokens (the context is empty and the tokenizer adds none), so \
         nothing predicts the target's first token; give the example a context, or use a prompt_template with text",
        path = path.display()
    )]
    EmptyPrompt {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
    },
    /// All rows are too long.
    #[error(
        "all {rows} examples of {path} are longer than max_seq_len = {max_seq_len} (the shortest has \
         {shortest} tokens); raise max_seq_len to at least that", path = path.display()
    )]
    AllTooLong {
        /// The data file.
        path: PathBuf,
        /// How many rows there are.
        rows: usize,
        /// The tokens of the shortest.
        shortest: usize,
        /// As configured.
        max_seq_len: usize,
    },
}

/// The type of a value, for messages.
pub(super) fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        object if integers::digits(object).is_some() => "a number",
        Value::Object(_) => "an object",
    }
}
